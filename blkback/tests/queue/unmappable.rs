//! Hosts that cannot map more pages, and budgets of cached mappings: data is copied in these cases.

use crate::rig::{BACK, Channel, FRONT, Mem, PATHS, Pages, SECTORS, raw};
use pvio_blkback::engine::flush::FlushState;
use pvio_blkback::{
    BlockEngine, Buf, DataPath, DiskState, Progress, Queue, QueueParts, QueueRecord, Stats,
};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::policy::MappingBudget;
use pvio_grant_table::{
    Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus, Granter,
};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Response, Segment, Status};
use pvio_ring::shm::{HeapMemory, Region};
use pvio_ring::{BackRing, FrontRing};
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;

/// Maps a limited number of pages at a time; further mappings fail with `status`.
struct Capped {
    driver: LocalDomain,
    most: usize,
    status: GrantStatus,
}

impl GrantMapper for Capped {
    type Mapping = <LocalDomain as GrantMapper>::Mapping;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus> {
        if self.driver.pages_mapped() + grefs.len() > self.most {
            return Err(self.status);
        }
        self.driver.map(domain, grefs, access)
    }
}

impl GrantCopier for Capped {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        self.driver.copy(ops);
    }
}

type Engine = pvio_blkback::engine::mem::MemEngine<Buf<<LocalDomain as GrantMapper>::Mapping>>;

struct Disk {
    guest: LocalDomain,
    driver: LocalDomain,
    ring: FrontRing<Pages>,
    back: Queue<Capped, Channel, Engine, HeapMemory>,
    _machine: LocalMachine,
}

impl Disk {
    fn new(path: DataPath, most: usize, status: GrantStatus, budget: Arc<MappingBudget>) -> Self {
        let machine = LocalMachine::new();
        let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
        let page = guest.alloc_pages(1).unwrap();
        let gref = guest.grant(BACK, &page, 0, Access::ReadWrite).unwrap();
        let ring = FrontRing::init(page, Abi::X86_64.slot_size()).unwrap();
        let end = guest.alloc_unbound(BACK).unwrap();
        let channel = driver.bind_interdomain(FRONT, end.port()).unwrap();
        let mapped = driver.map(FRONT, &[gref], Access::ReadWrite).unwrap();
        let theirs = BackRing::attach(mapped, Abi::X86_64.slot_size()).unwrap();
        let record = QueueRecord::private(&theirs, Abi::X86_64).unwrap();
        let engine = Mem::zeroed(SECTORS);
        let live = DiskState::with(engine.geometry(), Arc::new(FlushState::default()), budget);
        let parts = QueueParts {
            frontend: FRONT,
            disk: Arc::new(live),
            grants: Capped { driver: driver.clone(), most, status },
            data_path: path,
            ring: theirs,
            channel,
            abi: Abi::X86_64,
            max_indirect_segments: 600,
            record,
            stats: Arc::new(Stats::default()),
        };
        let back = Queue::new(parts, engine);
        Self { guest, driver, ring, back, _machine: machine }
    }

    fn pages(&self, count: usize) -> (Pages, Vec<GrantRef>) {
        let pages = self.guest.alloc_pages(count).unwrap();
        let grant = |page| self.guest.grant(BACK, &pages, page, Access::ReadWrite).unwrap();
        let grefs = (0..count).map(grant).collect();
        (pages, grefs)
    }

    fn ask(&mut self, request: &[u8]) -> Status {
        self.ring.push(request).unwrap();
        let _ = self.ring.publish();
        while self.back.poll(32).unwrap() == Progress::Some {}
        let slot = self.ring.pop().unwrap();
        slot.map(|mut slot| Response::read(&mut slot).unwrap().status).expect("a response")
    }

    fn refused(&self) -> u64 {
        self.back.stats().refused().find(|(r, _)| *r == RefusalReason::Grant).unwrap().1
    }
}

fn direct(op: u8, sector: u64, grefs: &[GrantRef]) -> Vec<u8> {
    let segments: Vec<_> = grefs.iter().map(|gref| (gref.0, 0, 7)).collect();
    raw(op, grefs.len() as u8, sector, &segments)
}

fn indirect(op: u8, count: usize, sector: u64, table: GrantRef) -> Vec<u8> {
    let mut bytes = vec![6, op];
    bytes.extend((count as u16).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(7_u64.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(table.0.to_le_bytes());
    bytes.resize(112, 0);
    bytes
}

/// Writes every page of a set and reads it back, with requests of `step` pages.
fn moves_data(disk: &mut Disk, seed: u8, count: usize, step: usize) {
    let (pages, grefs) = disk.pages(count);
    let (table, table_gref) = disk.pages(1);
    let bytes = |page: usize| [seed ^ page as u8; 4096];
    for write in [true, false] {
        for page in 0..count {
            let data = if write { bytes(page) } else { [0; 4096] };
            pages.write_bytes(page * 4096, &data).unwrap();
        }
        for (n, grefs) in grefs.chunks(step).enumerate() {
            let sector = (n * step * 8) as u64;
            let request = if step <= 11 {
                direct(u8::from(write), sector, grefs)
            } else {
                for (i, gref) in grefs.iter().enumerate() {
                    let segment = Segment { gref: *gref, first: 0, last: 7 };
                    table.write_bytes(8 * i, &segment.write()).unwrap();
                }
                indirect(u8::from(write), grefs.len(), sector, table_gref[0])
            };
            assert_eq!(disk.ask(&request), Status::Okay, "pages {}", n * step);
        }
    }
    for page in 0..count {
        let mut found = [0; 4096];
        pages.read_bytes(page * 4096, &mut found).unwrap();
        assert!(found == bytes(page), "page {page}");
    }
}

#[test]
fn unmappable_pages_are_copied_on_every_data_path() {
    for path in PATHS {
        for status in [GrantStatus::NoDeviceSpace, GrantStatus::NoSpace] {
            let mut disk = Disk::new(path, 8, status, MappingBudget::unlimited());
            for (seed, step) in [(1, 1), (2, 11), (3, 40)] {
                moves_data(&mut disk, seed, 120, step);
            }
            assert_eq!((disk.refused(), disk.back.in_flight()), (0, 0), "{path}");
            assert!(disk.driver.pages_mapped() <= 8, "{path}");
            let stats = disk.back.stats();
            assert!(stats.copied_pages.get() > 0, "{path}");
            let told = stats.unmappable_pages.get() > 0;
            assert_eq!(told, path != DataPath::Copy, "{path}");
        }
    }
}

#[test]
fn data_is_transferred_if_only_ring_can_be_mapped() {
    for path in PATHS {
        let budget = MappingBudget::unlimited();
        let mut disk = Disk::new(path, 1, GrantStatus::NoSpace, budget.clone());
        moves_data(&mut disk, 5, 60, 30);
        assert_eq!((disk.back.cached_mappings(), budget.used()), (0, 0), "{path}");
    }
}

#[test]
fn bad_grant_reference_fails_whether_or_not_pages_can_be_mapped() {
    for path in PATHS {
        for most in [1, 1000] {
            let unlimited = MappingBudget::unlimited();
            let mut disk = Disk::new(path, most, GrantStatus::NoSpace, unlimited);
            let (_pages, grefs) = disk.pages(2);
            for op in [0, 1] {
                let request = direct(op, 0, &[grefs[0], GrantRef(u32::MAX), grefs[1]]);
                assert_eq!(disk.ask(&request), Status::Error, "{path}, {most}");
                assert_eq!(disk.ask(&direct(op, 0, &grefs)), Status::Okay, "{path}, {most}");
            }
            assert_eq!(disk.refused(), 2, "{path}, {most}");
        }
    }
}

#[test]
fn cached_mappings_of_all_queues_stay_within_guest_budget() {
    for path in [DataPath::PersistentOrMap, DataPath::PersistentOrCopy] {
        let process = MappingBudget::new(20);
        let guest = process.part(15);
        // Two queues, of one disk or of two.
        let [mut one, mut other] =
            [(); 2].map(|()| Disk::new(path, usize::MAX, GrantStatus::NoSpace, Arc::clone(&guest)));
        moves_data(&mut one, 7, 9, 3);
        assert_eq!((one.back.cached_mappings(), guest.used(), process.used()), (9, 9, 9), "{path}");
        moves_data(&mut other, 9, 40, 11);
        assert_eq!((other.back.cached_mappings(), guest.used()), (6, 15), "{path}");
        moves_data(&mut one, 8, 40, 11);
        assert_eq!((one.back.cached_mappings(), guest.used()), (9, 15), "{path}");
        assert_eq!([one.refused(), other.refused()], [0, 0], "{path}");
        // Another guest gets the rest of the budget.
        let another = process.part(15);
        let mut third = Disk::new(path, usize::MAX, GrantStatus::NoSpace, another);
        moves_data(&mut third, 1, 40, 11);
        assert_eq!((third.back.cached_mappings(), process.used()), (5, 20), "{path}");
        drop((one, other));
        assert_eq!((guest.used(), process.used()), (0, 5), "{path}");
    }
}
