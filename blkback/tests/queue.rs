//! A queue against our own frontend and against a hostile one, over memory.

use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::{Progress, Queue, QueueParts, Stats};
use pvio_blkfront::{Op, Queue as Front, SLOT_BYTES};
use pvio_event_channel::{DomId, EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper, GrantRef, Granter};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Response, Status};
use pvio_ring::{BackRing, FrontRing};
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;

const FRONT: DomId = DomId(2);
const BACK: DomId = DomId(1);
const SECTORS: usize = 4096;

type Channel = <LocalDomain as EventChannels>::Channel;
type Pages = <LocalDomain as Granter>::Pages;
type Backend = Queue<LocalDomain, Channel, MemEngine>;

fn serve(
    back: LocalDomain,
    ring: GrantRef,
    channel: Channel,
    abi: Abi,
    engine: MemEngine,
) -> Backend {
    let ring = back.map(FRONT, &[ring], Access::ReadWrite).unwrap();
    let ring = BackRing::attach(ring, abi.slot_size()).unwrap();
    let stats = Arc::new(Stats::default());
    let parts = QueueParts { frontend: FRONT, mapper: back, ring, channel, abi, stats };
    Queue::new(parts, engine)
}

fn run(back: &mut Backend) {
    while back.poll(32).unwrap() == Progress::Some {}
}

fn pair(engine: MemEngine) -> (LocalMachine, Front<LocalDomain>, Backend) {
    let machine = LocalMachine::new();
    let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
    let front = Front::new(guest, BACK, 51712).unwrap();
    let channel = driver.bind_interdomain(FRONT, front.channel().port()).unwrap();
    let back = serve(driver, front.ring_gref(), channel, Abi::X86_64, engine);
    (machine, front, back)
}

#[test]
fn every_size_written_is_read_back_and_nothing_stays_mapped() {
    let (machine, mut front, mut back) = pair(MemEngine::zeroed(SECTORS));
    let mut sector = 0;
    for sectors in [1, 7, 8, 9, 16, 87, 88] {
        let bytes = sectors * 512;
        let data: Vec<u8> = (0..bytes).map(|i| (i * 7 + sectors) as u8).collect();
        let slot = front.reserve().unwrap();
        front.fill(slot, 0, &data).unwrap();
        front.start(slot, Op::Write { sector, bytes }).unwrap();
        front.publish().unwrap();
        run(&mut back);
        let answered = front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
        assert_eq!(answered, 1);
        front.fill(slot, 0, &[0; SLOT_BYTES]).unwrap();
        front.start(slot, Op::Read { sector, bytes }).unwrap();
        front.publish().unwrap();
        run(&mut back);
        front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
        let mut got = vec![0; bytes];
        front.fetch(slot, 0, &mut got).unwrap();
        assert_eq!(got, data, "{sectors} sectors");
        front.release(slot);
        sector += sectors as u64;
    }
    assert_eq!(machine.domain(BACK).pages_mapped(), 1, "only the ring stays mapped");
    drop(back);
    assert_eq!(machine.domain(BACK).pages_mapped(), 0);
    drop(front);
    assert_eq!(machine.domain(FRONT).pages_granted(), 0);
    assert_eq!(machine.domain(FRONT).pages_allocated(), 0);
}

#[test]
fn a_batch_costs_one_notification_each_way() {
    let (machine, mut front, mut back) = pair(MemEngine::zeroed(SECTORS));
    run(&mut back);
    assert!(!back.final_check().unwrap());
    front.final_check().unwrap();
    let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
    let before = (guest.events_sent(), driver.events_sent());
    for _ in 0..front.depth() {
        let slot = front.reserve().unwrap();
        front.start(slot, Op::Read { sector: 0, bytes: 4096 }).unwrap();
    }
    assert!(front.reserve().is_none(), "as many slots as the ring holds");
    front.publish().unwrap();
    run(&mut back);
    assert_eq!((guest.events_sent() - before.0, driver.events_sent() - before.1), (1, 1));
    assert_eq!(front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap(), 32);
}

#[test]
fn unanswered_requests_are_replayed_to_the_next_backend() {
    let (machine, mut front, mut back) = pair(MemEngine::zeroed(SECTORS));
    run(&mut back);
    let mut slots = Vec::new();
    for i in 0..5_u8 {
        let slot = front.reserve().unwrap();
        front.fill(slot, 0, &[i + 1; 1024]).unwrap();
        front.start(slot, Op::Write { sector: u64::from(i) * 2, bytes: 1024 }).unwrap();
        slots.push(slot);
    }
    front.publish().unwrap();
    // The driver domain dies with five requests in the ring.
    drop(back);
    machine.kill(BACK);
    let driver = machine.domain(BACK);
    let mut again = front.replay(BACK).unwrap();
    drop(front);
    again.publish().unwrap();
    let channel = driver.bind_interdomain(FRONT, again.channel().port()).unwrap();
    let mut back =
        serve(driver, again.ring_gref(), channel, Abi::X86_64, MemEngine::zeroed(SECTORS));
    run(&mut back);
    let mut answered = Vec::new();
    again
        .poll(|slot, _, status| {
            assert_eq!(status, Status::Okay);
            answered.push(slot);
        })
        .unwrap();
    assert_eq!(answered, slots);
    for i in 0..5 {
        let at = i * 1024;
        assert_eq!(back.engine_mut().bytes()[at..at + 1024], [i as u8 + 1; 1024]);
    }
}

/// A frontend that writes whatever bytes it likes.
struct Hostile {
    ring: FrontRing<Pages>,
    back: Backend,
    data: GrantRef,
    readonly: GrantRef,
    _pages: [Pages; 2],
}

impl Hostile {
    fn new(abi: Abi, engine: MemEngine) -> Self {
        let machine = LocalMachine::new();
        let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
        let granted = |access| {
            let page = guest.alloc_pages(1).unwrap();
            (guest.grant(BACK, &page, 0, access).unwrap(), page)
        };
        let (ring_gref, ring_page) = granted(Access::ReadWrite);
        let (data, data_page) = granted(Access::ReadWrite);
        let (readonly, readonly_page) = granted(Access::ReadOnly);
        let ring = FrontRing::init(ring_page, abi.slot_size()).unwrap();
        let end = guest.alloc_unbound(BACK).unwrap();
        let channel = driver.bind_interdomain(FRONT, end.port()).unwrap();
        let back = serve(driver, ring_gref, channel, abi, engine);
        Self { ring, back, data, readonly, _pages: [data_page, readonly_page] }
    }

    fn ask(&mut self, request: &[u8]) -> Response {
        self.ring.push(request).unwrap();
        let _ = self.ring.publish();
        run(&mut self.back);
        Response::read(&mut self.ring.pop().unwrap().expect("an answer")).unwrap()
    }

    fn refused(&self, reason: RefusalReason) -> u64 {
        self.back.stats().refused().find(|(r, _)| *r == reason).unwrap().1
    }
}

/// A request in the native layout: op, count, id 7, sector, segments.
fn raw(op: u8, count: u8, sector: u64, segments: &[(u32, u8, u8)]) -> Vec<u8> {
    let mut bytes = vec![op, count, 0, 0, 0, 0, 0, 0];
    bytes.extend(7_u64.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    for (gref, first, last) in segments {
        bytes.extend(gref.to_le_bytes());
        bytes.extend([*first, *last, 0, 0]);
    }
    bytes.resize(112, 0xee);
    bytes
}

#[test]
fn bad_requests_get_the_status_real_backends_give_and_are_counted() {
    use RefusalReason as R;
    let (okay, error, unknown) = (Status::Okay, Status::Error, Status::NotSupported);
    let mut h = Hostile::new(Abi::X86_64, MemEngine::zeroed(SECTORS));
    let (g, ro) = (h.data.0, h.readonly.0);
    let last = SECTORS as u64 - 8;
    let cases: Vec<(&str, Vec<u8>, Status, Option<R>)> = vec![
        ("a good read", raw(0, 1, 0, &[(g, 0, 7)]), okay, None),
        ("the last sectors", raw(0, 1, last, &[(g, 0, 7)]), okay, None),
        ("one sector too far", raw(0, 1, last + 1, &[(g, 0, 7)]), error, Some(R::OutOfRange)),
        ("sector 2^64 - 1", raw(0, 1, u64::MAX, &[(g, 0, 7)]), error, Some(R::OutOfRange)),
        ("reserved operation 4", raw(4, 1, 0, &[(g, 0, 7)]), unknown, Some(R::UnknownOperation)),
        ("operation 255", raw(255, 1, 0, &[(g, 0, 7)]), unknown, Some(R::UnknownOperation)),
        ("no segments", raw(0, 0, 0, &[]), error, Some(R::SegmentCount)),
        ("12 segments", raw(0, 12, 0, &[(g, 0, 7); 11]), error, Some(R::SegmentCount)),
        ("255 segments", raw(1, 255, 0, &[(g, 0, 7); 11]), error, Some(R::SegmentCount)),
        ("inverted segment", raw(0, 1, 0, &[(g, 5, 4)]), error, Some(R::SegmentBounds)),
        ("segment past its page", raw(0, 1, 0, &[(g, 0, 8)]), error, Some(R::SegmentBounds)),
        ("a reference never granted", raw(0, 1, 0, &[(400, 0, 7)]), error, Some(R::Grant)),
        ("a reference out of the table", raw(0, 1, 0, &[(u32::MAX, 0, 7)]), error, Some(R::Grant)),
        ("one bad of two", raw(0, 2, 0, &[(g, 0, 7), (400, 0, 7)]), error, Some(R::Grant)),
        ("reading into a read-only grant", raw(0, 1, 0, &[(ro, 0, 7)]), error, Some(R::Grant)),
        ("writing from a read-only grant", raw(1, 1, 0, &[(ro, 0, 7)]), okay, None),
        ("flush without data", raw(3, 0, 0, &[]), okay, None),
        ("flush with data", raw(3, 1, 0, &[(g, 0, 7)]), okay, None),
        ("barrier without data", raw(2, 0, 0, &[]), okay, None),
        ("barrier with data", raw(2, 1, 0, &[(g, 0, 7)]), okay, None),
    ];
    for (what, request, status, reason) in cases {
        let before = reason.map(|r| h.refused(r));
        let answer = h.ask(&request);
        assert_eq!((answer.status, answer.id, answer.op), (status, 7, request[0]), "{what}");
        if let (Some(reason), Some(before)) = (reason, before) {
            assert_eq!(h.refused(reason), before + 1, "{what} is counted");
        }
    }
}

#[test]
fn a_read_only_disk_refuses_to_be_changed() {
    let mut h = Hostile::new(Abi::X86_64, MemEngine::zeroed(SECTORS).read_only());
    let g = h.data.0;
    assert_eq!(h.ask(&raw(0, 1, 0, &[(g, 0, 7)])).status, Status::Okay);
    assert_eq!(h.ask(&raw(3, 0, 0, &[])).status, Status::Okay);
    for (op, count) in [(1, 1), (2, 1), (3, 1), (5, 0)] {
        assert_eq!(h.ask(&raw(op, count, 0, &[(g, 0, 7)])).status, Status::Error, "operation {op}");
    }
}

#[test]
fn a_discard_gives_zeroes_and_is_bounded() {
    let mut h = Hostile::new(Abi::X86_64, MemEngine::zeroed(SECTORS));
    let discard = |sector: u64, sectors: u64, secure| {
        let mut bytes = raw(5, secure, sector, &[]);
        bytes[24..32].copy_from_slice(&sectors.to_le_bytes());
        bytes
    };
    assert_eq!(h.ask(&discard(0, 8, 0)).status, Status::Okay);
    assert_eq!(h.ask(&discard(0, 8, 1)).status, Status::NotSupported, "secure is not offered");
    assert_eq!(h.ask(&discard(0, SECTORS as u64 + 1, 0)).status, Status::Error);
    assert_eq!(h.ask(&discard(u64::MAX, u64::MAX, 0)).status, Status::Error);
}

#[test]
fn a_producer_index_that_lies_ends_the_queue_and_nothing_else() {
    use pvio_ring::shm::Region;
    let mut h = Hostile::new(Abi::X86_64, MemEngine::zeroed(SECTORS));
    h.ring.memory().store_u32(0, 1000, std::sync::atomic::Ordering::Release);
    let fault = h.back.poll(32).unwrap_err();
    assert_eq!(fault.code(), "ring-producer-overflow");
}

#[test]
fn the_32_bit_layout_is_understood() {
    let mut h = Hostile::new(Abi::X86_32, MemEngine::zeroed(SECTORS));
    let g = h.data.0;
    let native = raw(0, 1, 8, &[(g, 0, 7)]);
    // The same fields without the padding before `id`.
    let mut packed = native[..4].to_vec();
    packed.extend(&native[8..108]);
    packed.resize(108, 0);
    assert_eq!(h.ask(&packed), Response { id: 7, op: 0, status: Status::Okay });
}
