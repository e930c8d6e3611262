//! A queue of a virtual disk with a hostile frontend.
//!
//! As long as the frontend writes only requests to its ring, each request gets exactly one response. The
//! operations of the engine stay inside the disk, whatever the frontend does.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkback::engine::Discard;
use pvio_blkback::{DataPath, DiskState, Geometry, Queue, QueueParts, QueueRecord, Stats};
use pvio_event_channel::EventChannel;
use pvio_fuzz::disk::{Engine, INDIRECT, SECTORS, Segment};
use pvio_fuzz::{BACK, Domains, FRONT, Scribble, Shared, channel, pick_gref, write_somewhere};
use pvio_grant_table::{Access, GrantMapper};
use pvio_ring::proto::blkif::{Abi, Response};
use pvio_ring::shm::{PAGE_SIZE, Region};
use pvio_ring::{BackRing, FrontRing};
use pvio_sim::local::memory::LocalPages;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

const PAGES: usize = 12;

#[derive(Arbitrary, Debug)]
struct Input {
    path: u8,
    x86_32: bool,
    ring_pages: bool,
    large_sectors: bool,
    read_only: bool,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    /// A read, write, barrier, flush, or an operation that does not exist.
    Data {
        op: u8,
        count: Option<u8>,
        sector: u64,
        segments: Vec<Segment>,
    },
    Indirect {
        op: u8,
        count: u16,
        sector: u8,
        pages: [u8; 8],
    },
    /// Segments of an indirect request.
    Table {
        page: u8,
        at: u8,
        segments: Vec<Segment>,
    },
    Discard {
        flags: u8,
        sector: u16,
        sectors: u64,
    },
    Slot(Vec<u8>),
    Publish,
    Scribble(Scribble),
    /// Writes to a page that may be in use.
    Overwrite {
        at: u16,
        value: [u8; 8],
    },
    Revoke(u8),
    Notify,
    Poll(u8),
    Sleep,
    /// Some time passes.
    Tick(u8),
    /// The storage completes an operation.
    Complete {
        which: u8,
        result: u8,
    },
    Resize(u8),
}

struct Guest {
    ring: FrontRing<LocalPages>,
    abi: Abi,
    next_id: u64,
    outstanding: HashSet<u64>,
    /// It has written only requests, each with its own id.
    honest: bool,
}

impl Guest {
    fn put(&mut self, mut bytes: Vec<u8>) {
        let at = if self.abi == Abi::X86_64 { 8 } else { 4 };
        bytes.resize(self.abi.slot_size(), 0);
        bytes[at..at + 8].copy_from_slice(&self.next_id.to_le_bytes());
        if self.ring.push(&bytes).is_ok() {
            self.outstanding.insert(self.next_id);
            self.next_id += 1;
        }
    }

    /// Returns operation, number of segments, the space of the id, and the first sector.
    fn head(&self, op: u8, second: u8, third: u16, sector: u64) -> Vec<u8> {
        let mut bytes = vec![op, second];
        bytes.extend(third.to_le_bytes());
        bytes.resize(if self.abi == Abi::X86_64 { 16 } else { 12 }, 0);
        bytes.extend(sector.to_le_bytes());
        bytes
    }

    fn take_responses(&mut self) {
        if !self.honest {
            return;
        }
        while let Some(mut slot) = self.ring.pop().expect("the backend's indices are valid") {
            let response = Response::read(&mut slot).expect("whole slots");
            assert!(self.outstanding.remove(&response.id), "id {} is not outstanding", response.id);
        }
    }
}

fuzz_target!(|input: Input| {
    let domains = Domains::default();
    let abi = if input.x86_32 { Abi::X86_32 } else { Abi::X86_64 };
    let pages = if input.ring_pages { 2 } else { 1 };
    let ring_pages = Shared::new(&domains.front, BACK, pages, Access::ReadWrite);
    let mut data = Shared::new(&domains.front, BACK, PAGES, Access::ReadWrite);
    // Pages that the backend may only read.
    let fixed = Shared::new(&domains.front, BACK, 1, Access::ReadOnly);
    fixed.pages.fill(0, PAGE_SIZE, 0xa5).expect("inside the page");
    data.grefs.extend(&fixed.grefs);

    let ring = FrontRing::init(ring_pages.pages.clone(), abi.slot_size()).expect("a valid size");
    let (front_channel, channel) = channel(&domains.front, &domains.back);
    let mapped = domains.back.map(FRONT, &ring_pages.grefs, Access::ReadWrite).expect("granted");
    let back_ring = BackRing::attach(mapped, abi.slot_size()).expect("a valid ring");
    let geometry = Geometry {
        sector_size: if input.large_sectors { 4096 } else { 512 },
        read_only: input.read_only,
        discard: Some(Discard { granularity: 512, alignment: 0, secure: false }),
        ..Geometry::new(SECTORS)
    };
    let slots = back_ring.layout().slots() as usize;
    let engine = Engine::new(geometry, slots);
    let disk = Arc::new(DiskState::new(geometry));
    let parts = QueueParts {
        frontend: FRONT,
        disk: Arc::clone(&disk),
        grants: domains.back.clone(),
        data_path: DataPath::ALL[usize::from(input.path) % 4],
        record: QueueRecord::private(&back_ring, abi).expect("a record"),
        ring: back_ring,
        channel,
        abi,
        max_indirect_segments: INDIRECT,
        stats: Arc::new(Stats::default()),
    };
    let mut queue = Queue::new(parts, engine);
    let mut guest = Guest { ring, abi, next_id: 1, outstanding: HashSet::new(), honest: true };
    let mut dead = false;
    let mut now = Duration::ZERO;

    for action in input.actions {
        match action {
            Action::Data { op, count, sector, segments } => {
                let segments: Vec<_> = segments.iter().take(11).collect();
                let count = count.unwrap_or(segments.len() as u8);
                let sector = if sector >> 56 == 0xff { sector } else { sector % (SECTORS + 16) };
                let mut bytes = guest.head(op, count, 0, sector);
                bytes.extend(segments.iter().flat_map(|segment| segment.bytes(&data)));
                guest.put(bytes);
            }
            Action::Indirect { op, count, sector, pages } => {
                let count = if count >= 0xff00 { count } else { count % (INDIRECT as u16 + 2) };
                let mut bytes = guest.head(6, op % 4, count, sector.into());
                bytes.extend([0; 4]);
                bytes.extend(pages.iter().flat_map(|page| {
                    pick_gref(&data.grefs, u16::from(*page) << 8 | u16::from(*page)).0.to_le_bytes()
                }));
                guest.put(bytes);
            }
            Action::Table { page, at, segments } => {
                let bytes: Vec<u8> = segments.iter().flat_map(|s| s.bytes(&data)).collect();
                let at = u16::from(page) % PAGES as u16 * 512 + u16::from(at);
                write_somewhere(&data.pages, at, &bytes);
            }
            Action::Discard { flags, sector, sectors } => {
                let mut bytes = guest.head(5, flags, 0, sector.into());
                bytes.extend(sectors.to_le_bytes());
                guest.put(bytes);
            }
            Action::Slot(bytes) => guest.put(bytes),
            Action::Publish => {
                let _ = guest.ring.publish();
            }
            Action::Scribble(scribble) => {
                guest.honest = false;
                scribble.write(&ring_pages.pages);
            }
            Action::Overwrite { at, value } => write_somewhere(&data.pages, at, &value),
            Action::Revoke(which) => {
                // The read-only page is the last one, and stays.
                let fixed = data.grefs.pop();
                data.revoke(which);
                data.grefs.extend(fixed);
            }
            Action::Notify => front_channel.notify().expect("the domain is alive"),
            Action::Poll(budget) if !dead => {
                dead = queue.poll(budget.into()).is_err();
                guest.take_responses();
            }
            Action::Sleep if !dead => dead = queue.final_check().is_err(),
            Action::Tick(seconds) => {
                now += Duration::from_secs(seconds.into());
                queue.tick(now);
            }
            Action::Complete { which, result } => queue.engine_mut().complete(which, result),
            Action::Resize(sectors) => {
                disk.resize(sectors.into());
            }
            Action::Poll(_) | Action::Sleep => {}
        }
        assert!(!(dead && guest.honest), "the queue of an honest frontend ended");
        assert!(queue.in_flight() <= slots);
    }

    // The session ends: everything that is in flight is completed, and nothing else is taken.
    queue.drain();
    for round in 0.. {
        while !queue.engine_mut().waiting.is_empty() {
            queue.engine_mut().complete(0, 9);
        }
        let ended = queue.poll(0).is_err();
        dead |= ended;
        if (ended && queue.in_flight() == 0)
            || (!ended && queue.is_drained() && queue.in_flight() == 0)
        {
            break;
        }
        // A request has three operations at most, and a barrier waits for the others.
        assert!(round < 4 * slots, "the queue does not drain");
    }
    guest.take_responses();
    if guest.honest {
        assert!(!dead, "the queue of an honest frontend ended");
        assert_eq!(guest.outstanding.len(), guest.ring.in_flight() as usize, "a lost response");
    }
    drop((queue, front_channel));
    let mut page = vec![0; PAGE_SIZE];
    fixed.pages.read_bytes(0, &mut page).expect("inside the page");
    assert!(page.iter().all(|byte| *byte == 0xa5), "a read-only page was written");
    domains.assert_backend_is_empty();
    let own = data.grefs.len() - 1;
    data.grefs.truncate(own);
    ring_pages.assert_unmapped();
    data.assert_unmapped();
    fixed.assert_unmapped();
});
