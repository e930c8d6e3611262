//! Storage of a simulated disk: stable storage behind a volatile cache, and the engine in front of
//! it.

use crate::disk::actions::Flaw;
use pvio_blkback::engine::{BlockEngine, Discard, Done, EngineError, Full, Geometry, Io, Segments};
use pvio_ring::IoSeg;
use pvio_ring::shm::{Region, SharedMemory};
use pvio_sim::Sim;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Size of a sector of the protocol in bytes.
pub const SECTOR: usize = 512;

type Sector = [u8; SECTOR];

/// Storage of a disk: stable data, and data in the cache.
pub struct Medium {
    stable: Vec<Sector>,
    /// Data that the next flush writes to stable storage.
    cache: BTreeMap<u64, Sector>,
    /// Data that a failed flush did not write and that no later flush writes: Linux marks such pages
    /// clean. Reads find it until the cache is lost.
    forgotten: BTreeMap<u64, Sector>,
    /// Whether a flush that fails forgets the data.
    forgets: bool,
    /// Whether the queue was told of a failed flush in this session: it must not flush again.
    flush_failed: bool,
    /// Sectors that the kernel still has to write for a dead process.
    late: Vec<(u64, Sector)>,
    sector_size: u32,
    /// One of `errors` operations fails; none if 0.
    errors: u64,
    chance: Sim,
}

pub type SharedMedium = Rc<RefCell<Medium>>;

impl Medium {
    pub fn new(sim: &mut Sim, sectors: usize) -> SharedMedium {
        Rc::new(RefCell::new(Self {
            stable: vec![[0; SECTOR]; sectors],
            cache: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            forgets: sim.one_in(2),
            flush_failed: false,
            late: Vec::new(),
            sector_size: sim.pick(&[512, 512, 4096]),
            errors: sim.pick(&[0, 0, 8, 40]),
            chance: sim.handle(),
        }))
    }

    pub fn sectors(&self) -> u64 {
        self.stable.len() as u64
    }

    pub fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors(),
            sector_size: self.sector_size,
            physical_sector_size: self.sector_size,
            copied: false,
            read_only: false,
            discard: Some(Discard { granularity: self.sector_size, alignment: 0, secure: false }),
        }
    }

    pub fn is_dirty(&self) -> bool {
        !self.cache.is_empty()
    }

    /// Discards the cache, as a power loss does.
    pub fn lose_cache(&mut self) {
        self.cache.clear();
        self.forgotten.clear();
        self.late.clear();
    }

    /// Records that a new session of the guest starts.
    pub fn begin_session(&mut self) {
        self.flush_failed = false;
    }

    /// Whether writes of a dead process are still in flight.
    pub fn is_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// Completes one of those sectors.
    pub fn land_one(&mut self) {
        let at = self.chance.index(self.late.len());
        let (sector, data) = self.late.swap_remove(at);
        self.write(sector, data);
    }

    /// Completes all of those sectors.
    pub fn fence(&mut self) {
        while self.is_late() {
            self.land_one();
        }
    }

    /// Writes one sector of the cache to stable storage, without a flush.
    pub fn write_back_one(&mut self) {
        let dirty: Vec<u64> = self.cache.keys().copied().collect();
        let sector = self.chance.pick(&dirty);
        self.write_back(&[sector]);
    }

    fn write_back(&mut self, sectors: &[u64]) {
        for sector in sectors {
            if let Some(data) = self.cache.remove(sector) {
                self.stable[*sector as usize] = data;
            }
        }
    }

    fn read(&self, sector: u64) -> Sector {
        let cached = self.cache.get(&sector).or_else(|| self.forgotten.get(&sector));
        *cached.unwrap_or(&self.stable[sector as usize])
    }

    fn write(&mut self, sector: u64, data: Sector) {
        assert!(sector < self.sectors(), "the queue let sector {sector} pass");
        self.forgotten.remove(&sector);
        self.cache.insert(sector, data);
    }

    /// Marks data clean that a failed flush did not write.
    fn forget(&mut self, sectors: &[u64]) {
        for sector in sectors.iter().filter(|_| self.forgets) {
            if let Some(data) = self.cache.remove(sector) {
                self.forgotten.insert(*sector, data);
            }
        }
    }
}

/// Operation in flight.
struct Job<B> {
    tag: u32,
    io: Io,
    segments: Segments<B>,
    /// For a flush: the sectors in the cache when it was submitted.
    dirty: Vec<u64>,
}

/// Engine that completes operations late and in any order; some fail.
pub struct SimEngine<B> {
    medium: SharedMedium,
    /// Submitted operations, before `kick`.
    submitted: Vec<Job<B>>,
    begun: Vec<Job<B>>,
    done: Vec<Completion<B>>,
    /// What a failed flush did not write, if the queue was told of it in its last call.
    told_failure: Option<Vec<u64>>,
    flaw: Flaw,
}

/// Completed operation.
struct Completion<B> {
    tag: u32,
    result: Result<(), EngineError>,
    segments: Segments<B>,
    /// For a flush that failed: the sectors that were in the cache.
    unwritten: Option<Vec<u64>>,
}

impl<B: SharedMemory> SimEngine<B> {
    pub fn new(medium: SharedMedium, flaw: Flaw) -> Self {
        let (submitted, begun, done) = (Vec::new(), Vec::new(), Vec::new());
        Self { medium, flaw, submitted, begun, done, told_failure: None }
    }

    /// Whether an operation could complete.
    pub fn is_busy(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Whether a completion can be reaped: an io_uring would wake its thread for it.
    pub fn is_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// Completes a random operation in flight.
    pub fn complete_one(&mut self) {
        let mut medium = self.medium.borrow_mut();
        let at = medium.chance.index(self.begun.len());
        let job = self.begun.swap_remove(at);
        let failing = medium.errors > 0 && {
            let errors = medium.errors;
            medium.chance.one_in(errors)
        };
        let forgotten = match (self.flaw, job.io) {
            (Flaw::ForgetsWrites, Io::Write { .. }) => medium.chance.one_in(10),
            (Flaw::ForgetsFlushes, Io::Flush) => true,
            _ => false,
        };
        let result = if forgotten { Ok(()) } else { perform(&mut medium, &job, failing) };
        let unwritten = (job.io == Io::Flush && result.is_err()).then_some(job.dirty);
        self.done.push(Completion { tag: job.tag, result, segments: job.segments, unwritten });
    }

    /// Records the failure of a flush of which the queue was told in an earlier call: it had the time
    /// to record the failure, too.
    fn note_failure(&mut self) {
        if let Some(unwritten) = self.told_failure.take() {
            let mut medium = self.medium.borrow_mut();
            medium.flush_failed = true;
            medium.forget(&unwritten);
        }
    }

    /// Kills the process: operations in flight are executed completely, partly, or not at all, and
    /// some of them later.
    pub fn crash(&mut self) {
        let mut medium = self.medium.borrow_mut();
        for job in self.begun.drain(..) {
            let partly = medium.chance.one_in(3);
            if !partly && medium.chance.one_in(2) {
                continue;
            }
            match job.io {
                Io::Write { sector } if medium.chance.one_in(2) => {
                    for (n, (seg, at)) in places(&job.segments).enumerate() {
                        let mut data = [0; SECTOR];
                        seg.buf.read_bytes(at, &mut data).expect("inside the page");
                        medium.late.push((sector + n as u64, data));
                    }
                }
                _ => drop(perform(&mut medium, &job, partly)),
            }
        }
        self.submitted.clear();
        self.done.clear();
    }
}

/// Executes an operation; one that fails may be executed partly.
fn perform<B: SharedMemory>(
    medium: &mut Medium,
    job: &Job<B>,
    failing: bool,
) -> Result<(), EngineError> {
    let sectors: u64 = match job.io {
        Io::Read { .. } | Io::Write { .. } => {
            job.segments.iter().map(|s| s.len / SECTOR).sum::<usize>() as u64
        }
        Io::Discard { sectors, .. } | Io::WriteZeroes { sectors, .. } => sectors,
        Io::Flush => job.dirty.len() as u64,
    };
    let count = if failing { medium.chance.below(sectors) } else { sectors };
    match job.io {
        Io::Read { sector } => {
            for (n, (seg, at)) in places(&job.segments).take(count as usize).enumerate() {
                let data = medium.read(sector + n as u64);
                seg.buf.write_bytes(at, &data).expect("inside the page, and writable");
            }
        }
        Io::Write { sector } => {
            for (n, (seg, at)) in places(&job.segments).take(count as usize).enumerate() {
                let mut data = [0; SECTOR];
                seg.buf.read_bytes(at, &mut data).expect("inside the page");
                medium.write(sector + n as u64, data);
            }
        }
        Io::Discard { sector, .. } | Io::WriteZeroes { sector, .. } => {
            (sector..sector + count).for_each(|s| medium.write(s, [0; SECTOR]));
        }
        Io::Flush => medium.write_back(&job.dirty[..count as usize]),
    }
    if failing { Err(EngineError::Os(5)) } else { Ok(()) }
}

/// Returns the location of every sector in an operation's buffers.
fn places<B>(segments: &[IoSeg<B>]) -> impl Iterator<Item = (&IoSeg<B>, usize)> {
    segments
        .iter()
        .flat_map(|s| (s.offset..s.offset + s.len).step_by(SECTOR).map(move |at| (s, at)))
}

impl<B: SharedMemory> BlockEngine<B> for SimEngine<B> {
    fn geometry(&self) -> Geometry {
        self.medium.borrow().geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let dirty = match io {
            Io::Flush => {
                let medium = self.medium.borrow();
                assert!(!medium.flush_failed, "a flush is submitted after a failed flush");
                medium.cache.keys().copied().collect()
            }
            _ => Vec::new(),
        };
        self.submitted.push(Job { tag, io, segments: std::mem::take(segments), dirty });
        Ok(())
    }

    fn kick(&mut self) {
        self.note_failure();
        self.begun.append(&mut self.submitted);
        // Sometimes an operation completes before the call returns.
        while self.is_busy() && self.medium.borrow_mut().chance.one_in(4) {
            self.complete_one();
        }
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.note_failure();
        for Completion { tag, result, mut segments, unwritten } in self.done.drain(..) {
            self.told_failure = unwritten.or(self.told_failure.take());
            done(tag, result, &mut segments);
        }
    }
}
