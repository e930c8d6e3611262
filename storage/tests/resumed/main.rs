//! A server process that is killed repeatedly while a guest works: ring, record and the guest's
//! pages are in files that all processes map, and the disk is served through io_uring.
//!
//! | module | contents |
//! |---|---|
//! | this | servers that are killed while a guest works |
//! | [`fenced`] | writes of a killed server that are still in flight in the kernel |
//! | [`nbd`] | writes that are still in flight at an NBD server |

mod fenced;
#[path = "../support/fuse.rs"]
mod fuse;
mod nbd;
#[path = "../support/storage.rs"]
mod storage;
#[path = "../support/mod.rs"]
mod support;

use pvio_blkback::{DataPath, DiskState, Progress, Queue, QueueParts, QueueRecord, Stats};
use pvio_event_channel::{EventChannel, EventError, Port};
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_recordfile::{RecordDir, RecordFile};
use pvio_ring::inflight::{Record, RequestLog, SessionKey};
use pvio_ring::proto::blkif::{Abi, Response, Status};
use pvio_ring::shm::{PAGE_SIZE, Part, Region};
use pvio_ring::{BackRing, FrontRing, RingLayout};
use pvio_storage::engine::wait::WaitEngine;
use pvio_storage::image::{Image, ImageOptions};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Set in the process that will be killed: the directory of all files.
const SERVE: &str = "PVIO_TEST_SERVE_IN";
const TEST: &str = "guest_requests_complete_correctly_if_servers_are_killed";
const SLOTS: usize = 32;
/// Sectors of a slot's own area; requests use the first eight.
const AREA: usize = 16;
const ABI: Abi = Abi::X86_64;
/// Page 0 is the ring, the others are the slots' pages.
const MEMORY: usize = (1 + SLOTS) * PAGE_SIZE;
const FENCE: &str = "disk.fence";
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's memory, of which every page is granted: the grant reference is the page number.
#[derive(Clone)]
struct Memory(RecordFile);

impl Memory {
    fn page(&self, number: usize) -> Part<RecordFile> {
        Part::new(self.0.clone(), number * PAGE_SIZE, PAGE_SIZE).unwrap()
    }
}

impl GrantMapper for Memory {
    type Mapping = Part<RecordFile>;

    fn map(&self, _: DomId, grefs: &[GrantRef], _: Access) -> Result<Self::Mapping, GrantStatus> {
        assert_eq!(grefs.len(), 1);
        Ok(self.page(grefs[0].0 as usize))
    }
}

impl GrantCopier for Memory {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        for op in ops {
            let page = self.page(op.gref.0 as usize);
            match &mut op.with {
                CopyBuf::FromGrant(to) => page.read_bytes(op.offset, to).unwrap(),
                CopyBuf::ToGrant(from) => page.write_bytes(op.offset, from).unwrap(),
            }
            op.status = GrantStatus::Okay;
        }
    }
}

/// An event channel without events, because both sides poll the ring.
struct Silent;

impl EventChannel for Silent {
    fn port(&self) -> Port {
        Port(0)
    }

    fn notify(&self) -> Result<(), EventError> {
        Ok(())
    }

    fn take(&self) -> Result<bool, EventError> {
        Ok(false)
    }
}

fn key() -> SessionKey {
    let mut key = SessionKey::new();
    let layout = RingLayout::new(PAGE_SIZE, ABI.slot_size()).unwrap();
    key.section(RequestLog::<RecordFile>::section_len(layout));
    key
}

/// Serves until it is killed.
fn serve(dir: &Path) -> ! {
    let records = RecordDir::open(dir).unwrap();
    let fence = records.fence(FENCE).unwrap();
    assert!(fence.wait(PATIENCE).unwrap(), "I/O of the predecessor does not end");
    let fence: OwnedFd = fence.hold().unwrap();
    let memory = Memory(records.existing("memory", MEMORY).unwrap());
    let mut ring = BackRing::attach(memory.page(0), ABI.slot_size()).unwrap();
    let len = key().record_len();
    // The first server creates the record.
    let record = match records.existing("record", len) {
        Ok(file) => {
            let record = Record::open(file, key()).unwrap();
            QueueRecord::resume(&record, 0, &mut ring, ABI, true).unwrap()
        }
        Err(_) => {
            let record = Record::create(records.create("record", len).unwrap(), key()).unwrap();
            let first = QueueRecord::new(&record, 0, &ring, ABI).unwrap();
            record.commit();
            first
        }
    };
    let image = loop {
        // The kernel closes the files of a process one after the other.
        match Image::open(&dir.join("disk.img"), ImageOptions::default()) {
            Ok(image) => break image.fenced(fence),
            Err(error) => assert_eq!(error.code(), "image-busy"),
        }
    };
    let parts = QueueParts {
        frontend: DomId(1),
        disk: Arc::new(DiskState::new(image.geometry())),
        grants: memory,
        data_path: DataPath::Copy,
        ring,
        channel: Silent,
        abi: ABI,
        max_indirect_segments: 0,
        record,
        stats: Arc::new(Stats::default()),
    };
    let mut queue = Queue::new(parts, image.engine(SLOTS as u32).unwrap());
    loop {
        if queue.poll(32).unwrap() == Progress::None {
            queue.engine_mut().wait_due(Some(Duration::from_millis(1))).unwrap();
        }
    }
}

fn start(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(SERVE, dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    Read,
    Write,
    Flush,
}

/// The operations of one slot of the guest, one after the other, in a separate area.
struct Slot {
    /// Number of completed operations.
    done: u64,
    /// The byte in its area, if known.
    content: Option<u8>,
    /// The outstanding request: operation, byte written, number of servers killed before it.
    open: Option<(Op, u8, u32)>,
}

struct Guest {
    memory: Memory,
    ring: FrontRing<Part<RecordFile>>,
    slots: Vec<Slot>,
    /// By id.
    open: HashMap<u64, usize>,
    next: u64,
    answered: u64,
}

impl Guest {
    fn ask(&mut self) {
        for number in 0..SLOTS {
            let slot = &mut self.slots[number];
            if slot.open.is_some() {
                continue;
            }
            let op = [Op::Write, Op::Read, Op::Write, Op::Read, Op::Flush][slot.done as usize % 5];
            let byte = (slot.done * 7 + number as u64) as u8;
            self.memory.page(1 + number).fill(0, PAGE_SIZE, byte).unwrap();
            let (code, count) = match op {
                Op::Read => (0, 1),
                Op::Write => (1, 1),
                Op::Flush => (3, 0),
            };
            // Ids that have the bytes of operation codes: a response must not be taken for a
            // request.
            let id = self.next << 16 | [0, 1, 3, 5, 0x100, 0x101][self.next as usize % 6];
            self.next += 1;
            let mut bytes = vec![code, count, 0, 0, 0, 0, 0, 0];
            bytes.extend(id.to_le_bytes());
            bytes.extend(((number * AREA) as u64).to_le_bytes());
            bytes.extend((1 + number as u32).to_le_bytes());
            bytes.extend([0, 7, 0, 0]);
            bytes.resize(ABI.slot_size(), 0);
            self.ring.push(&bytes).unwrap();
            slot.open = Some((op, byte, 0));
            self.open.insert(id, number);
        }
        let _ = self.ring.publish();
    }

    fn take(&mut self) {
        while let Some(mut response) = self.ring.pop().unwrap() {
            let response = Response::read(&mut response).unwrap();
            let number = self.open.remove(&response.id);
            let number = number.unwrap_or_else(|| panic!("{response:?} without a request"));
            let slot = &mut self.slots[number];
            let (op, byte, deaths) = slot.open.take().unwrap();
            self.answered += 1;
            slot.done += 1;
            if response.status == Status::Error && deaths > 1 {
                if op == Op::Write {
                    slot.content = None;
                }
                continue;
            }
            assert_eq!(response.status, Status::Okay, "{op:?} after {deaths} deaths");
            match op {
                Op::Write => slot.content = Some(byte),
                Op::Read => {
                    let mut found = [0; PAGE_SIZE];
                    self.memory.page(1 + number).read_bytes(0, &mut found).unwrap();
                    if let Some(content) = slot.content {
                        assert!(found == [content; PAGE_SIZE], "slot {number}");
                    }
                }
                Op::Flush => {}
            }
        }
    }
}

#[test]
fn guest_requests_complete_correctly_if_servers_are_killed() {
    if let Some(dir) = std::env::var_os(SERVE) {
        serve(Path::new(&dir));
    }
    const KILLS: u64 = 60;
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("records");
    let records = RecordDir::open(&dir).unwrap();
    std::fs::write(dir.join("disk.img"), vec![0xaa; SLOTS * AREA * 512]).unwrap();
    let memory = Memory(records.create("memory", MEMORY).unwrap());
    let ring = FrontRing::init(memory.page(0), ABI.slot_size()).unwrap();
    let slot = |_| Slot { done: 0, content: Some(0xaa), open: None };
    let slots = (0..SLOTS).map(slot).collect();
    let mut guest = Guest { memory, ring, slots, open: HashMap::new(), next: 1, answered: 0 };
    for kill in 0..KILLS {
        let mut server = start(&dir);
        // At a different point of its work each time.
        let enough = guest.answered + 100 + kill * 37 % 101;
        while guest.answered < enough {
            guest.take();
            guest.ask();
            assert!(server.try_wait().unwrap().is_none(), "server exited unexpectedly");
        }
        server.kill().unwrap();
        server.wait().unwrap();
        guest.take();
        for slot in &mut guest.slots {
            if let Some((_, _, deaths)) = &mut slot.open {
                *deaths += 1;
            }
        }
    }
    let mut server = start(&dir);
    while !guest.open.is_empty() {
        guest.take();
        assert!(server.try_wait().unwrap().is_none(), "server exited unexpectedly");
    }
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(records.fence(FENCE).unwrap().wait(PATIENCE).unwrap());
    let disk = std::fs::read(dir.join("disk.img")).unwrap();
    for (number, slot) in guest.slots.iter().enumerate() {
        let area = &disk[number * AREA * 512..][..AREA * 512];
        if let Some(content) = slot.content {
            assert!(area[..PAGE_SIZE].iter().all(|byte| *byte == content), "slot {number}");
        }
        assert!(
            area[PAGE_SIZE..].iter().all(|byte| *byte == 0xaa),
            "data outside the written range changed"
        );
    }
}
