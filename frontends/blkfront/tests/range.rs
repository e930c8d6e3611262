//! No request is sent beyond the end of the disk, whatever the caller requests and the backend
//! would do.

use pvio_blkfront::queue::Queue;
use pvio_blkfront::{Disk, Op, RequestedFeatures, SlotId, StartError};
use pvio_grant_table::{Access, DomId, GrantMapper, GrantRef};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_sim::local::memory::LocalMapping;
use pvio_sim::{LocalDomain, LocalMachine};
use pvio_xenbus::driver::FrontendDriver;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, create_domain, write_state};
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, Discard, DiskInfo, FrontRequest, ToolstackBack, announce_resize,
    create_device,
};
use pvio_xenbus::{XenbusState, transaction};
use pvio_xenstored::{LocalClient, Quota, Store};
use std::cell::RefCell;
use std::rc::Rc;

const BACK: DomId = DomId(1);
const FRONT: DomId = DomId(2);
const SIZE: u64 = 1024;

/// A disk, and a test that acts as its backend.
struct World {
    driver: FrontendDriver<Disk<LocalDomain>>,
    front: LocalClient,
    back: LocalClient,
    addr: DeviceAddr,
    machine: LocalMachine,
}

fn disk(sectors: u64) -> BackDisk {
    let discard = Some(Discard { secure: true, ..Discard::default() });
    let offer = BackOffer {
        flush: true,
        discard,
        max_indirect_segments: Some(256),
        max_queues: Some(2),
        ..BackOffer::default()
    };
    let info = DiskInfo::default();
    BackDisk { sectors, info, sector_size: 512, physical_sector_size: 512, offer }
}

impl World {
    fn new(queues: usize) -> Self {
        let store = Rc::new(RefCell::new(Store::new(Quota::default())));
        let mut dom0 = LocalClient::connect(&store, DomId::DOM0);
        for id in [BACK, FRONT] {
            store.borrow_mut().introduce(id);
            create_domain(&mut dom0, id, "test").unwrap();
        }
        let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51712);
        create_device(&mut dom0, addr, &ToolstackBack::new(addr, "disk")).unwrap();
        let machine = LocalMachine::new();
        let wish = RequestedFeatures { queues, ..RequestedFeatures::default() };
        let driver = FrontendDriver::new(addr, Disk::with(machine.domain(FRONT), wish));
        let [front, back] = [FRONT, BACK].map(|id| LocalClient::connect(&store, id));
        let mut world = Self { driver, front, back, addr, machine };
        world.step();
        world.session(SIZE);
        world
    }

    /// Starts a session with a backend that advertises and serves `sectors` sectors.
    fn session(&mut self, sectors: u64) {
        let (back, disk) = (self.addr.backend_path(), disk(sectors));
        transaction(&mut self.back, |tx| {
            disk.offer.write(tx, &back)?;
            write_state(tx, &back, XenbusState::InitWait)
        })
        .unwrap();
        self.step();
        transaction(&mut self.back, |tx| {
            disk.write(tx, &back)?;
            write_state(tx, &back, XenbusState::Connected)
        })
        .unwrap();
        self.step();
        assert!(self.driver.class().is_connected());
    }

    fn step(&mut self) {
        self.driver.step(&mut self.front).unwrap();
    }

    fn resize(&mut self, sectors: u64) {
        announce_resize(&mut self.back, &self.addr.backend_path(), sectors).unwrap();
        self.step();
    }

    fn queue(&mut self) -> &mut Queue<LocalDomain> {
        self.driver.class_mut().queue().unwrap()
    }

    /// Returns the first queue's ring.
    fn ring(&mut self) -> BackRing<LocalMapping> {
        let front = self.addr.frontend_path();
        let request = FrontRequest::read(&mut self.back, &front, &disk(SIZE).offer).unwrap();
        let gref = GrantRef(request.queues[0].ring_refs[0]);
        let page = self.machine.domain(BACK).map(FRONT, &[gref], Access::ReadWrite).unwrap();
        BackRing::attach(page, Abi::X86_64.slot_size()).unwrap()
    }
}

/// Returns every kind of request for these sectors.
fn all(sector: u64, sectors: u64) -> Vec<Op> {
    let bytes = usize::try_from(sectors).unwrap_or(usize::MAX).saturating_mul(512);
    let mut ops = vec![Op::Discard { sector, sectors }, Op::SecureDiscard { sector, sectors }];
    if (1..=8).contains(&sectors) {
        ops.extend([Op::Read { sector, bytes }, Op::Write { sector, bytes }]);
    }
    ops
}

fn refused(queue: &mut Queue<LocalDomain>, slot: SlotId, op: Op, size: u64) {
    match queue.start(slot, op) {
        Err(StartError::OutOfRange { size: told, .. }) => assert_eq!(told, size, "{op:?}"),
        other => panic!("{op:?} on a disk of {size} sectors: {other:?}"),
    }
}

#[test]
fn request_beyond_disk_end_is_rejected_before_ring() {
    let mut world = World::new(1);
    let mut ring = world.ring();
    let queue = world.queue();
    let slot = queue.reserve().unwrap();
    for sector in [SIZE - 7, SIZE - 1, SIZE, 1 << 55, (1 << 55) - 1, u64::MAX - 8, u64::MAX] {
        for op in all(sector, 8) {
            refused(queue, slot, op, SIZE);
        }
    }
    for (sector, sectors) in
        [(0, SIZE + 1), (SIZE, 1), (1, u64::MAX), (u64::MAX, u64::MAX), (8, SIZE)]
    {
        for op in all(sector, sectors) {
            refused(queue, slot, op, SIZE);
        }
    }
    assert_eq!(queue.start(slot, Op::Discard { sector: 0, sectors: 0 }), Err(StartError::Size));
    queue.publish().unwrap();
    assert!(ring.pop().unwrap().is_none());
    // The last sectors of the disk.
    let mut slots = vec![slot];
    for op in all(SIZE - 8, 8) {
        let slot = slots.pop().or_else(|| queue.reserve()).unwrap();
        assert_eq!(queue.start(slot, op), Ok(()), "{op:?}");
    }
    queue.publish().unwrap();
    for _ in 0..4 {
        assert!(ring.pop().unwrap().is_some());
    }
}

#[test]
fn resized_disk_checks_range_by_current_size_on_every_queue() {
    let mut world = World::new(2);
    let mut out = world.driver.class_mut().take(1).unwrap();
    let out_slot = out.reserve().unwrap();
    let slot = world.queue().reserve().unwrap();
    for size in [SIZE / 2, 0, 2 * SIZE, SIZE] {
        world.resize(size);
        let beyond = Op::Write { sector: size, bytes: 512 };
        refused(world.queue(), slot, beyond, size);
        refused(&mut out, out_slot, beyond, size);
    }
    world.resize(2 * SIZE);
    let last = Op::Read { sector: 2 * SIZE - 1, bytes: 512 };
    assert_eq!(world.queue().start(slot, last), Ok(()));
    assert_eq!(out.start(out_slot, last), Ok(()));
    assert_eq!(out.limits().sectors, 2 * SIZE);
}

#[test]
fn request_beyond_end_of_smaller_reconnected_disk_completes_with_error() {
    let mut world = World::new(1);
    let ops = [Op::Write { sector: 0, bytes: 512 }, Op::Write { sector: SIZE - 1, bytes: 512 }];
    let queue = world.queue();
    for op in ops {
        let slot = queue.reserve().unwrap();
        queue.start(slot, op).unwrap();
    }
    queue.publish().unwrap();
    // Another backend, to which both requests are sent again.
    world.session(SIZE / 2);
    let mut ring = world.ring();
    let mut answers = Vec::new();
    world.queue().poll(|_, op, status| answers.push((op, status))).unwrap();
    assert_eq!(answers, [(ops[1], Status::Error)]);
    assert!(ring.pop().unwrap().is_some());
    assert!(ring.pop().unwrap().is_none(), "request beyond the end of the disk was sent");
}
