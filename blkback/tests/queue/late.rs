//! Requests that are in flight together, with an engine that completes operations on command.

use crate::rig::{BACK, FRONT, Hostile, PATHS, PageBuf, SECTORS, raw, run};
use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::engine::{Done, Full, Geometry, Io, Segments};
use pvio_blkback::pages::{CACHED_MIN, PAGES_MOST};
use pvio_blkback::{
    BlockEngine, DataPath, DiskState, Progress, Queue, QueueFault, QueueParts, QueueRecord,
};
use pvio_blkfront::{Op, Queue as Front};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{
    Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus, Granter,
};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, RefusalReason, Status};
use pvio_ring::shm::{Guarded, Region, SharedMemory};
use pvio_sim::{LocalDomain, LocalMachine};
use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Executes operations only as far as permitted.
pub struct Late<B = PageBuf> {
    mem: MemEngine<B>,
    waiting: VecDeque<(u32, Io, Segments<B>)>,
    /// Number of operations that it may execute.
    may: Rc<Cell<usize>>,
}

impl<B> Late<B> {
    fn new() -> (Self, Rc<Cell<usize>>) {
        let may = Rc::new(Cell::new(0));
        let mem = MemEngine::zeroed(SECTORS);
        (Self { mem, waiting: VecDeque::new(), may: Rc::clone(&may) }, may)
    }

    /// Returns the contents of the disk.
    pub fn disk(&self) -> &[u8] {
        self.mem.bytes()
    }
}

impl<B: SharedMemory> BlockEngine<B> for Late<B> {
    fn geometry(&self) -> Geometry {
        BlockEngine::<B>::geometry(&self.mem)
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        self.waiting.push_back((tag, io, std::mem::take(segments)));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, B>) {
        let count = self.may.get().min(self.waiting.len());
        self.may.set(self.may.get() - count);
        for (tag, io, mut segments) in self.waiting.drain(..count) {
            self.mem.submit(tag, io, &mut segments).unwrap();
        }
        self.mem.reap(done);
    }
}

pub fn late(path: DataPath) -> (Hostile<Late>, Rc<Cell<usize>>) {
    let (engine, may) = Late::new();
    (Hostile::new(path, Abi::X86_64, engine), may)
}

fn with_id(mut request: Vec<u8>, id: u64) -> Vec<u8> {
    request[8..16].copy_from_slice(&id.to_le_bytes());
    request
}

#[test]
fn bad_grant_in_batch_fails_only_its_request() {
    for path in PATHS {
        let (mut h, may) = late(path);
        may.set(100);
        let g = h.data.0;
        for id in 0..10 {
            let bad = id % 3 == 1;
            let segments = if bad { [(g, 0, 7), (4000, 0, 7)] } else { [(g, 0, 7); 2] };
            h.put(&with_id(raw((id % 2) as u8, 2, 16 * id, &segments), id));
        }
        run(&mut h.back);
        let mut answers = [None; 10];
        while let Some(answer) = h.answer() {
            assert!(answers[answer.id as usize].replace(answer.status).is_none(), "twice");
        }
        for (id, status) in answers.into_iter().enumerate() {
            let expected = if id % 3 == 1 { Status::Error } else { Status::Okay };
            assert_eq!(status, Some(expected), "request {id}, {path}");
        }
        assert_eq!(h.refused(RefusalReason::Grant), 3, "{path}");
        drop(h.back);
        assert_eq!(h.driver.pages_mapped(), 0, "{path}");
        assert!(h.guest.end_access(h.data).is_ok(), "{path}");
    }
}

#[test]
fn page_shared_by_segments_and_requests_in_flight_is_transferred() {
    for path in PATHS {
        let (mut h, may) = late(path);
        let (gref, page) = h.page();
        page.write_bytes(0, &[7; 4096]).unwrap();
        let request = raw(1, 2, 0, &[(gref.0, 0, 7), (gref.0, 0, 3)]);
        for id in 0..8 {
            let mut request = with_id(request.clone(), id);
            request[16..24].copy_from_slice(&(16 * id).to_le_bytes());
            h.put(&request);
        }
        run(&mut h.back);
        assert_eq!((h.back.in_flight(), h.answer().is_none()), (8, true), "{path}");
        may.set(100);
        run(&mut h.back);
        for _ in 0..8 {
            assert_eq!(h.answer().unwrap().status, Status::Okay, "{path}");
        }
        // All data is on the disk, and one request reads it back into the same page.
        page.fill(0, 4096, 0).unwrap();
        let answer = h.ask(&raw(0, 1, 16 * 7 + 4, &[(gref.0, 0, 7)]));
        let mut seen = [0; 4096];
        page.read_bytes(0, &mut seen).unwrap();
        assert_eq!((answer.status, seen), (Status::Okay, [7; 4096]), "{path}");
    }
}

#[test]
fn read_fills_only_requested_sectors_before_response() {
    for path in PATHS {
        let (mut h, may) = late(path);
        let (gref, page) = h.page();
        page.write_bytes(0, &[9; 4096]).unwrap();
        h.put(&raw(0, 1, 0, &[(gref.0, 2, 5)]));
        run(&mut h.back);
        may.set(100);
        run(&mut h.back);
        assert_eq!(h.answer().unwrap().status, Status::Okay, "{path}");
        let mut seen = [0; 4096];
        page.read_bytes(0, &mut seen).unwrap();
        let mut expected = [9; 4096];
        expected[1024..3072].fill(0);
        assert_eq!(seen, expected, "{path}: only the requested sectors are written");
    }
}

#[test]
fn grant_revoked_during_copied_read_fails_only_that_read() {
    // Only with copies can the guest end access to the page during the request.
    let (mut h, may) = late(DataPath::Copy);
    let (gone, stays) = (h.page(), h.page());
    h.put(&with_id(raw(0, 1, 0, &[(gone.0.0, 0, 7)]), 1));
    h.put(&with_id(raw(0, 1, 8, &[(stays.0.0, 0, 7)]), 2));
    run(&mut h.back);
    h.guest.end_access(gone.0).unwrap();
    may.set(100);
    run(&mut h.back);
    let answers = [h.answer().unwrap(), h.answer().unwrap()].map(|a| (a.id, a.status));
    assert_eq!(answers, [(1, Status::Error), (2, Status::Okay)]);
    assert_eq!(h.refused(RefusalReason::Grant), 1);
}

#[test]
fn barrier_waits_for_earlier_requests_and_delays_later_ones() {
    for path in PATHS {
        let (mut h, may) = late(path);
        let (gref, page) = h.page();
        page.write_bytes(0, &[1; 4096]).unwrap();
        h.put(&with_id(raw(1, 1, 0, &[(gref.0, 0, 7)]), 1));
        h.put(&with_id(raw(2, 1, 8, &[(gref.0, 0, 7)]), 2));
        h.put(&with_id(raw(1, 1, 16, &[(gref.0, 0, 7)]), 3));
        run(&mut h.back);
        assert_eq!(h.back.in_flight(), 1, "{path}: the barrier waits for the write");
        assert!(!h.back.final_check().unwrap());
        may.set(100);
        run(&mut h.back);
        let answers: Vec<_> = std::iter::from_fn(|| h.answer()).map(|a| (a.id, a.status)).collect();
        assert_eq!(answers, [1, 2, 3].map(|id| (id, Status::Okay)), "{path}");
        drop(h.back);
        assert_eq!(h.driver.pages_mapped(), 0, "{path}");
    }
}

#[test]
fn queue_dropped_with_requests_in_flight_releases_all_mappings() {
    for path in PATHS {
        let (mut h, _) = late(path);
        let pages: Vec<_> = (0..20).map(|_| h.page()).collect();
        for (i, (gref, _)) in pages.iter().enumerate() {
            h.put(&raw((i % 3) as u8, 1, 8 * i as u64, &[(gref.0, 0, 7)]));
        }
        run(&mut h.back);
        assert!(h.back.in_flight() > 0);
        let stats = Arc::clone(h.back.stats());
        let used = |name| stats.budgets().find(|(n, ..)| *n == name).unwrap();
        // Two requests are in flight, and a barrier waits for them without pages.
        assert_eq!(used("requests"), ("requests", 3, 32), "{path}");
        assert_eq!(used("request-pages"), ("request-pages", 2, PAGES_MOST as u64), "{path}");
        let kept = if path.caches() { CACHED_MIN as u64 } else { 0 };
        assert_eq!(used("kept-pages").2, kept, "{path}");
        h.back.drain();
        h.back.tick(Duration::from_secs(1000));
        drop(h.back);
        let left = stats.budgets().filter(|(_, used, limit)| (*used, *limit) != (0, 0));
        assert_eq!(left.count(), 0, "{path}");
        assert_eq!(h.driver.pages_mapped(), 0, "{path}");
        for (gref, _) in pages {
            assert!(h.guest.end_access(gref).is_ok(), "{path}");
        }
    }
}

#[test]
fn request_in_flight_when_ring_faults_is_drained() {
    for path in PATHS {
        let (mut h, may) = late(path);
        let (gref, page) = h.page();
        page.write_bytes(0, &[3; 4096]).unwrap();
        h.put(&raw(1, 1, 0, &[(gref.0, 0, 7)]));
        assert!(h.back.poll(1).is_ok());
        h.ring.memory().store_u32(0, 1000, std::sync::atomic::Ordering::Release);
        let fault: QueueFault = h.back.poll(32).unwrap_err();
        assert_eq!((fault.code(), h.back.in_flight()), ("ring-producer-overflow", 1), "{path}");
        may.set(100);
        h.back.drain();
        let _ = h.back.poll(0);
        assert_eq!(h.back.in_flight(), 0, "{path}");
        assert_eq!(h.back.engine_mut().disk()[..4096], [3; 4096], "{path}");
    }
}

type LocalMapping = <LocalDomain as GrantMapper>::Mapping;

/// Unmaps pages only together with those mapped by the same call, as a kernel may.
struct Batches(LocalDomain);

impl GrantMapper for Batches {
    type Mapping = Guarded<Arc<LocalMapping>, Arc<Vec<Arc<LocalMapping>>>>;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus> {
        let page = Arc::new(self.0.map(domain, grefs, access)?);
        Ok(Guarded::new(page, Arc::default()))
    }

    fn map_each(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
        each: &mut dyn FnMut(usize, Result<Self::Mapping, GrantStatus>),
    ) {
        let mut all = Vec::new();
        self.0.map_each(domain, grefs, access, &mut |_, page| all.push(Arc::new(page.unwrap())));
        let all = Arc::new(all);
        for (i, page) in all.iter().enumerate() {
            each(i, Ok(Guarded::new(Arc::clone(page), Arc::clone(&all))));
        }
    }
}

impl GrantCopier for Batches {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        self.0.copy(ops);
    }
}

/// A frontend that finds a page in use after its request's response disables the disk (Linux's
/// blkfront, since XSA-396), unless persistent grants were negotiated.
#[test]
fn request_pages_are_unmapped_before_response_is_published() {
    for data_path in [DataPath::Map, DataPath::Copy] {
        let machine = LocalMachine::new();
        let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
        let mut front = Front::new(guest, BACK, 51712).unwrap();
        let channel = driver.bind_interdomain(FRONT, front.channel().port()).unwrap();
        let grants = Batches(driver.clone());
        let ring = grants.map(FRONT, front.ring_grefs(), Access::ReadWrite).unwrap();
        let ring = BackRing::attach(ring, Abi::X86_64.slot_size()).unwrap();
        let (stats, abi) = (Arc::default(), Abi::X86_64);
        let record = QueueRecord::private(&ring, abi).unwrap();
        let (engine, may) = Late::new();
        let parts = QueueParts {
            frontend: FRONT,
            disk: Arc::new(DiskState::new(engine.geometry())),
            grants,
            data_path,
            ring,
            channel,
            abi,
            max_indirect_segments: 0,
            record,
            stats,
        };
        let mut back = Queue::new(parts, engine);
        for sector in 0..4 {
            let slot = front.reserve().unwrap();
            front.start(slot, Op::Read { sector, bytes: 8192 }).unwrap();
        }
        front.publish().unwrap();
        // All four are one batch; they complete one after the other.
        for left in (0..4).rev() {
            may.set(1);
            while back.poll(32).unwrap() == Progress::Some {}
            assert_eq!(front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap(), 1);
            let mapped = if data_path == DataPath::Map { 2 * left } else { 0 };
            assert_eq!(
                driver.pages_mapped(),
                mapped + 1,
                "{data_path}: pages of requests in flight and the ring"
            );
        }
    }
}
