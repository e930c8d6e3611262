//! A disk that outlives every process, and an engine whose operations may outlive their process.

use pvio_blkback::engine::{Discard, Done, Full, Geometry, Io, Segments};
use pvio_blkback::{BlockEngine, Buf};
use pvio_ring::shm::Region;
use pvio_sim::kill::{Mortal, moment};
use pvio_sim::local::memory::LocalMapping;
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;

pub type Page = Buf<Mortal<LocalMapping>>;

/// Sectors of each request's own area.
pub const AREA: u64 = 16;
pub const AREAS: u64 = 256;

/// State that outlives every process: the disk, and the guest's outstanding requests.
pub struct Disk {
    pub bytes: Vec<u8>,
    /// By area: submitted requests without a visible response.
    pub open: HashSet<u64>,
    /// Outstanding flushes of any kind.
    pub flushes: usize,
    /// Areas that this process has read, written or discarded.
    pub executed: HashSet<u64>,
    /// Whether no operation completes.
    pub stuck: bool,
}

impl Disk {
    pub fn area(&self, area: u64) -> &[u8] {
        let at = (area * AREA) as usize * 512;
        &self.bytes[at..at + AREA as usize * 512]
    }

    /// Checks an operation that a process starts.
    fn begins(&mut self, io: Io) {
        match io {
            Io::Flush => assert!(self.flushes > 0, "flush that was not requested"),
            Io::Read { sector } | Io::Write { sector } | Io::Discard { sector, .. } => {
                let area = sector / AREA;
                assert!(
                    self.open.contains(&area),
                    "{io:?} already has a response or was not requested"
                );
                assert!(self.executed.insert(area), "{io:?} executed twice by one process");
            }
            Io::WriteZeroes { .. } => panic!("write-zeroes was not requested"),
        }
    }

    pub fn execute(&mut self, io: Io, segments: &Segments<Page>) {
        match io {
            Io::Flush | Io::WriteZeroes { .. } => {}
            Io::Discard { sector, sectors, .. } => {
                self.bytes[sector as usize * 512..][..sectors as usize * 512].fill(0);
            }
            Io::Read { sector } | Io::Write { sector } => {
                let mut at = sector as usize * 512;
                for segment in segments {
                    let bytes = &mut self.bytes[at..at + segment.len];
                    match io {
                        Io::Read { .. } => segment.buf.write_bytes(segment.offset, bytes).unwrap(),
                        _ => segment.buf.read_bytes(segment.offset, bytes).unwrap(),
                    }
                    at += segment.len;
                }
            }
        }
    }
}

/// Operations in the kernel: they may complete after their process has ended.
pub type Waiting = Rc<RefCell<Vec<(u32, Io, Segments<Page>)>>>;

/// Executes some operations at each call, in no particular order.
pub struct Engine {
    pub disk: Rc<RefCell<Disk>>,
    pub waiting: Waiting,
    pub turn: usize,
}

impl BlockEngine<Page> for Engine {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: AREAS * AREA,
            sector_size: 512,
            physical_sector_size: 512,
            copied: false,
            read_only: false,
            discard: Some(Discard { granularity: 512, alignment: 0, secure: false }),
        }
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<Page>) -> Result<(), Full> {
        moment();
        self.disk.borrow_mut().begins(io);
        self.waiting.borrow_mut().push((tag, io, std::mem::take(segments)));
        Ok(())
    }

    fn kick(&mut self) {
        moment();
    }

    fn reap(&mut self, done: &mut Done<'_, Page>) {
        moment();
        if self.disk.borrow().stuck {
            return;
        }
        self.turn += 1;
        for _ in 0..self.turn % 3 {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.is_empty() {
                break;
            }
            let at = self.turn * 7 % waiting.len();
            let (tag, io, mut segments) = waiting.remove(at);
            drop(waiting);
            self.disk.borrow_mut().execute(io, &segments);
            moment();
            done(tag, Ok(()), &mut segments);
        }
    }
}
