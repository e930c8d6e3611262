//! The control ring: pages that the backend keeps mapped, and backends that lie about it.

mod common;

use common::{BACK, BACK_FEATURES, FRONT, FRONT_FEATURES, attach, drain, pattern};
use pvio_event_channel::EventChannel;
use pvio_grant_table::{Access, GrantMapper};
use pvio_netback::port::memory::loopback;
use pvio_netback::queue::{ControlRefs, Siblings, Waker};
use pvio_netback::{Queue as Back, Stats};
use pvio_netfront::{BackendFault, Checksum, Control, Queue};
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, GrefEntry,
};
use pvio_ring::shm::Region;
use pvio_ring::{BackRing, RingFault};
use pvio_sim::local::memory::LocalMapping;
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Two queues and the real backend of each.
struct Pair {
    fronts: Vec<Queue<LocalDomain>>,
    backs: Vec<Back<LocalDomain, Box<[u8]>>>,
    stats: Arc<Stats>,
    control: Control<LocalDomain>,
    back: LocalDomain,
    front: LocalDomain,
}

fn pair(stages: bool) -> Pair {
    let machine = LocalMachine::new();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    let stats = Arc::new(Stats::default());
    let mut fronts: Vec<_> = (0..2).map(|_| Queue::new(&front, BACK).unwrap()).collect();
    fronts.iter_mut().for_each(|queue| queue.set_features(FRONT_FEATURES));
    let attach = |queue| attach(back.clone(), FRONT, queue, BACK_FEATURES, &stats);
    let mut backs: Vec<_> = fronts.iter().map(attach).collect();
    let control = Control::new(&front, BACK).unwrap();
    let siblings = Siblings::new((0..2).map(|_| Arc::new(|| ()) as Waker));
    backs.iter_mut().enumerate().for_each(|(index, queue)| queue.join(&siblings, index));
    let refs = ControlRefs { ring: control.ring_gref(), event: control.channel().port() };
    backs[0].serve_control(&refs, stages).unwrap();
    Pair { fronts, backs, stats, control, back, front }
}

impl Pair {
    fn settle(&mut self) {
        let mut port = loopback(4);
        for _ in 0..20 {
            self.control.step(&self.fronts).unwrap();
            self.backs.iter_mut().for_each(|back| assert!(back.poll(&mut port, 8).is_ok()));
        }
    }

    /// A large packet to the backend and back again, on each queue.
    fn echo(&mut self) {
        for (front, back) in self.fronts.iter_mut().zip(&mut self.backs) {
            let mut port = loopback(4);
            let frame = pattern(9000, 7);
            front.send(&frame, Checksum::Unknown).unwrap();
            front.publish().unwrap();
            while back.poll(&mut port, 8).unwrap().any() {}
            assert_eq!(front.receive(|got, _| got.to_vec()), Ok(Some(frame)));
            front.publish().unwrap();
            drain(&mut port);
        }
    }
}

#[test]
fn every_page_of_every_queue_is_staged_and_then_used() {
    let mut p = pair(true);
    p.echo();
    assert_eq!(p.stats.staged(), 0);
    p.settle();
    assert!(p.control.is_done());
    assert_eq!(p.control.staged(), 2 * 512);
    assert_eq!(p.backs[1].staged(), 512);
    let mapped = p.back.pages_mapped();
    for round in 1..100 {
        p.echo();
        // Three slots out and three in, on two queues.
        assert_eq!(p.stats.staged(), round * 12);
        assert_eq!(p.back.pages_mapped(), mapped);
    }
    // A frontend whose pages are mapped cannot have them back; it can when the backend has gone.
    let queue = p.fronts.remove(0).dismantle().unwrap_err();
    drop(p.backs);
    assert!(queue.dismantle().is_ok());
    drop((p.fronts, p.control));
    assert_eq!((p.front.pages_granted(), p.front.pages_allocated()), (0, 0));
}

#[test]
fn a_backend_that_stages_nothing_is_used_as_ever() {
    let mut p = pair(false);
    p.settle();
    assert!(p.control.is_done());
    assert_eq!(p.control.staged(), 0);
    p.echo();
    assert_eq!(p.stats.staged(), 0);
}

/// A control ring in the hands of a test that plays the backend.
struct Hostile {
    control: Control<LocalDomain>,
    queues: Vec<Queue<LocalDomain>>,
    ring: BackRing<LocalMapping>,
    page: LocalMapping,
    back: LocalDomain,
}

fn hostile() -> Hostile {
    let machine = LocalMachine::new();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    let queues = vec![Queue::new(&front, BACK).unwrap()];
    let control = Control::new(&front, BACK).unwrap();
    let map = || back.map(FRONT, &[control.ring_gref()], Access::ReadWrite).unwrap();
    let (ring, page) = (BackRing::attach(map(), CTRL_SLOT_SIZE).unwrap(), map());
    Hostile { control, queues, ring, page, back }
}

impl Hostile {
    fn asked(&mut self) -> CtrlRequest {
        self.control.step(&self.queues).unwrap();
        let mut slot = self.ring.pop().unwrap().expect("a request");
        CtrlRequest::read(&mut slot).unwrap()
    }

    fn answer(&mut self, answer: CtrlResponse) -> Result<(), BackendFault> {
        self.ring.push(&answer.to_bytes()).unwrap();
        let _ = self.ring.publish();
        self.control.step(&self.queues)
    }
}

fn good(request: CtrlRequest, data: u32) -> CtrlResponse {
    CtrlResponse { id: request.id, kind: request.kind, status: 0, data }
}

#[test]
fn sizes_of_all_kinds_and_what_is_asked_for_then() {
    for (size, len) in [(1, 1), (511, 511), (512, 512), (513, 512), (u32::MAX, 512)] {
        let mut h = hostile();
        let request = h.asked();
        assert_eq!(request.ask(), Some(CtrlAsk::GetGrefMappingSize { queue: 0 }));
        h.answer(good(request, size)).unwrap();
        let request = h.asked();
        let Some(CtrlAsk::AddGrefMapping(list)) = request.ask() else { panic!("{request:?}") };
        assert_eq!((list.queue, list.len), (0, len));
        let page = h.back.map(FRONT, &[list.page], Access::ReadWrite).unwrap();
        let mut bytes = vec![0; len as usize * 8];
        page.read_bytes(0, &mut bytes).unwrap();
        let listed: Vec<_> =
            bytes.as_chunks().0.iter().map(|e| GrefEntry::from_bytes(*e)).collect();
        assert_eq!(listed, h.queues[0].staging_list().take(len as usize).collect::<Vec<_>>());
        h.answer(good(request, u32::MAX)).unwrap();
        assert!(h.control.is_done());
        assert_eq!(h.control.staged(), len as usize);
    }
}

#[test]
fn a_refusal_or_a_size_of_none_ends_the_asking() {
    for (status, data) in [(0, 0), (1, 5), (2, 5), (3, 5), (4, 5), (u32::MAX, 5)] {
        let mut h = hostile();
        let request = h.asked();
        h.answer(CtrlResponse { status, ..good(request, data) }).unwrap();
        assert!(h.control.is_done());
        assert_eq!(h.control.staged(), 0);
        assert!(h.ring.pop().unwrap().is_none());
    }
    let mut h = hostile();
    let request = h.asked();
    h.answer(good(request, 512)).unwrap();
    let request = h.asked();
    let status = CtrlStatus::InvalidParameter as u32;
    h.answer(CtrlResponse { status, ..good(request, 0) }).unwrap();
    assert!(h.control.is_done());
    assert_eq!(h.control.staged(), 0);
}

#[test]
fn every_lie_on_the_control_ring() {
    let lies: [fn(CtrlRequest) -> CtrlResponse; 3] = [
        |r| CtrlResponse { id: r.id.wrapping_add(1), ..good(r, 1) },
        |r| CtrlResponse { kind: 9, ..good(r, 1) },
        |_| CtrlResponse::default(),
    ];
    for lie in lies {
        let mut h = hostile();
        let answer = lie(h.asked());
        let fault = BackendFault::CtrlAnswer { id: answer.id, kind: answer.kind };
        assert_eq!(h.answer(answer), Err(fault));
        assert_eq!(h.control.step(&h.queues), Err(fault), "for ever");
        assert_eq!((h.control.fault(), fault.code()), (Some(fault), "ctrl-wrong-answer"));
    }
    // More answers than questions.
    let mut h = hostile();
    h.asked();
    h.page.store_u32(8, 7, Ordering::SeqCst);
    let fault = RingFault::ProducerOverflow { prod: 7, ahead: 7, most: 1 };
    assert_eq!(h.control.step(&h.queues), Err(BackendFault::CtrlRing(fault)));
    assert_eq!(BackendFault::CtrlRing(fault).code(), "ctrl-ring-producer-overflow");
}

#[test]
fn split_channels_wake_each_for_itself() {
    let machine = LocalMachine::new();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    let mut queue = Queue::with_channels(&front, BACK, true).unwrap();
    let rx_port = queue.rx_channel().expect("its own").port();
    let refs = pvio_netback::queue::QueueRefs {
        tx_ring: queue.tx_gref(),
        rx_ring: queue.rx_gref(),
        events: pvio_netback::queue::EventPorts::Split { tx: queue.channel().port(), rx: rx_port },
    };
    let stats = Arc::new(Stats::default());
    let mut peer = Back::attach(back.clone(), FRONT, &refs, BACK_FEATURES, stats).unwrap();
    let mut port = loopback(8);
    queue.publish().unwrap();
    peer.take_events().unwrap();
    for round in 0..3 {
        assert_eq!(queue.final_check(), Ok(false));
        queue.send(&pattern(60, 1), Checksum::Unknown).unwrap();
        queue.publish().unwrap();
        while peer.poll(&mut port, 8).unwrap().any() {}
        assert!(queue.rx_channel().unwrap().is_pending(), "a packet came");
        // A new ring asks for one event by itself (ring.h); after that nobody has asked.
        assert_eq!(queue.channel().is_pending(), round == 0);
        for channel in queue.channels() {
            channel.take().unwrap();
        }
        assert_eq!(queue.receive(|frame, _| frame.len()), Ok(Some(60)));
    }
    assert_eq!(queue.channels().count(), 2);
}

#[test]
fn a_storm_of_events_is_no_work() {
    let mut h = common::hostile();
    assert_eq!(h.front.final_check(), Ok(false));
    for _ in 0..10_000 {
        h.channel.notify().unwrap();
    }
    // However many there were, they are one: taken once, and nothing is found.
    h.front.channel().take().unwrap();
    assert!(!h.front.channel().is_pending());
    assert_eq!(h.front.has_work(), Ok(false));
    assert_eq!(h.front.final_check(), Ok(false));
    assert_eq!(h.front.receive(|_, _| ()), Ok(None));
}
