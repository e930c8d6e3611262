//! Control rings: between both sides of a vif, and with a test that acts as the backend.
#![allow(dead_code, reason = "each test file uses its own part")]

use crate::common::{BACK, BACK_FEATURES, FRONT, FRONT_FEATURES, attach, drain, pattern};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper};
use pvio_netback::port::memory::loopback;
use pvio_netback::queue::{ControlRefs, QueueSet, Waker};
use pvio_netback::{Queue as Back, Stats};
use pvio_netfront::{BackendFault, Checksum, Control, Queue};
use pvio_ring::BackRing;
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, GREF_ENTRY_SIZE, GrefEntry,
};
use pvio_ring::shm::Region;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalMapping;
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;

/// Two queues with the real backend of each.
pub struct Pair {
    pub fronts: Vec<Queue<LocalDomain>>,
    pub backs: Vec<Back<LocalDomain, Box<[u8]>>>,
    pub stats: Arc<Stats>,
    pub control: Control<LocalDomain>,
    pub back: LocalDomain,
    pub front: LocalDomain,
}

pub fn pair(stages: bool) -> Pair {
    let machine = LocalMachine::new();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    let stats = Arc::new(Stats::default());
    let mut fronts: Vec<_> = (0..2).map(|_| Queue::new(&front, BACK).unwrap()).collect();
    fronts.iter_mut().for_each(|queue| queue.set_features(FRONT_FEATURES));
    let attach = |queue| attach(back.clone(), FRONT, queue, BACK_FEATURES, &stats);
    let mut backs: Vec<_> = fronts.iter().map(attach).collect();
    let control = Control::new(&front, BACK).unwrap();
    let set = QueueSet::new((0..2).map(|_| Arc::new(|| ()) as Waker));
    backs.iter_mut().enumerate().for_each(|(index, queue)| queue.join(&set, index));
    let refs = ControlRefs { ring: control.ring_gref(), event: control.channel().port() };
    backs[0].serve_control(&refs, stages).unwrap();
    Pair { fronts, backs, stats, control, back, front }
}

impl Pair {
    pub fn settle(&mut self) {
        let mut port = loopback(4);
        for _ in 0..20 {
            self.control.step(&self.fronts).unwrap();
            self.backs.iter_mut().for_each(|back| assert!(back.poll(&mut port, 8).is_ok()));
        }
    }

    /// Sends a large packet to the backend and back again, on each queue.
    pub fn echo(&mut self) {
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

/// A control ring whose backend is the test.
pub struct Hostile {
    pub control: Control<LocalDomain>,
    pub queues: Vec<Queue<LocalDomain>>,
    pub ring: BackRing<LocalMapping>,
    pub page: LocalMapping,
    pub channel: LocalChannel,
    pub back: LocalDomain,
}

pub fn hostile() -> Hostile {
    let machine = LocalMachine::new();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    let queues = vec![Queue::new(&front, BACK).unwrap()];
    let control = Control::new(&front, BACK).unwrap();
    let map = || back.map(FRONT, &[control.ring_gref()], Access::ReadWrite).unwrap();
    let (ring, page) = (BackRing::attach(map(), CTRL_SLOT_SIZE).unwrap(), map());
    let channel = back.bind_interdomain(FRONT, control.channel().port()).unwrap();
    Hostile { control, queues, ring, page, channel, back }
}

impl Hostile {
    pub fn asked(&mut self) -> CtrlRequest {
        self.control.step(&self.queues).unwrap();
        let mut slot = self.ring.pop().unwrap().expect("a request");
        CtrlRequest::read(&mut slot).unwrap()
    }

    pub fn push(&mut self, answer: CtrlResponse) {
        self.ring.push(&answer.to_bytes()).unwrap();
        if self.ring.publish() {
            self.channel.notify().unwrap();
        }
    }

    pub fn answer(&mut self, answer: CtrlResponse) -> Result<(), BackendFault> {
        self.push(answer);
        self.control.step(&self.queues)
    }

    /// Returns the page that a request names, as mapped by the backend.
    pub fn named(&self, request: CtrlRequest) -> LocalMapping {
        let gref = match request.ask().expect("request of a defined type") {
            CtrlAsk::AddGrefMapping(list) | CtrlAsk::DelGrefMapping(list) => list.page,
            CtrlAsk::SetHashKey { page, .. } | CtrlAsk::SetHashMapping { page, .. } => page,
            other => panic!("{other:?} names no page"),
        };
        self.back.map(FRONT, &[gref], Access::ReadWrite).unwrap()
    }

    /// Reads the start of that page.
    pub fn read(&self, request: CtrlRequest, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.named(request).read_bytes(0, &mut bytes).unwrap();
        bytes
    }

    /// Writes a status into each of the first entries of a list.
    pub fn answer_entries(&self, request: CtrlRequest, statuses: &[u16]) {
        let list = self.read(request, statuses.len() * GREF_ENTRY_SIZE);
        let entries = list.as_chunks().0.iter().zip(statuses);
        let answered = entries.flat_map(|(bytes, status)| {
            GrefEntry { status: *status, ..GrefEntry::from_bytes(*bytes) }.to_bytes()
        });
        self.named(request).write_bytes(0, &answered.collect::<Vec<_>>()).unwrap();
    }
}

pub fn good(request: CtrlRequest, data: u32) -> CtrlResponse {
    CtrlResponse { id: request.id, kind: request.kind, status: 0, data }
}
