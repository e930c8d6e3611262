//! A control ring that a test operates.
#![allow(dead_code, reason = "each test file uses its own part")]

use crate::common::{BACK, FRONT, Guest, Setup, policy};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantRef, Granter};
use pvio_netback::port::memory::{MemoryPort, pair};
use pvio_netback::queue::{ControlRefs, QueueSet, Waker};
use pvio_netback::{Features, Queue, Stats};
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, GrefEntry,
};
use pvio_ring::shm::Region;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalPages;
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Vif of several queues with a control ring.
pub struct Many {
    pub queues: Vec<Setup>,
    pub control: Control,
    /// Number of times that each queue was woken by another.
    pub woken: Vec<Arc<AtomicUsize>>,
    pub machine: LocalMachine,
}

/// Guest's view of the control ring, and a page for keys, mappings and lists.
pub struct Control {
    pub ring: FrontRing<LocalPages>,
    pub ring_page: LocalPages,
    pub channel: LocalChannel,
    pub page: LocalPages,
    pub gref: GrantRef,
    next_id: u16,
}

pub fn many(features: Features, count: usize) -> Many {
    many_with(features, count, true)
}

pub fn many_with(features: Features, count: usize, stages: bool) -> Many {
    let machine = LocalMachine::new();
    let woken: Vec<Arc<AtomicUsize>> = (0..count).map(|_| Arc::default()).collect();
    let set = QueueSet::new(woken.iter().map(|count| {
        let count = Arc::clone(count);
        Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }) as Waker
    }));
    let mut queues: Vec<Setup> = (0..count).map(|_| one(&machine, features)).collect();
    for (index, setup) in queues.iter_mut().enumerate() {
        setup.queue.join(&set, index);
    }
    let (control, refs) = Control::new(&machine.domain(FRONT));
    queues[0].queue.serve_control(&refs, stages).unwrap();
    Many { queues, control, woken, machine }
}

fn one(machine: &LocalMachine, features: Features) -> Setup {
    let back = machine.domain(BACK);
    let guest = Guest::new(machine.domain(FRONT), 0, false);
    let stats = Arc::new(Stats::default());
    let mut queue =
        Queue::attach(back.clone(), FRONT, &guest.refs, features, Arc::clone(&stats)).unwrap();
    queue.set_policy(policy());
    let (port, wire): (MemoryPort, MemoryPort) = pair(128);
    Setup { guest, queue, port, wire, back, machine: machine.clone(), stats }
}

impl Control {
    fn new(domain: &LocalDomain) -> (Self, ControlRefs) {
        let (ring_page, page) = (domain.alloc_pages(1).unwrap(), domain.alloc_pages(1).unwrap());
        let grant = |page: &LocalPages| domain.grant(BACK, page, 0, Access::ReadWrite).unwrap();
        let ring = FrontRing::init(ring_page.clone(), CTRL_SLOT_SIZE).unwrap();
        let channel = domain.alloc_unbound(BACK).unwrap();
        let refs = ControlRefs { ring: grant(&ring_page), event: channel.port() };
        let gref = grant(&page);
        (Self { ring, ring_page, channel, page, gref, next_id: 700 }, refs)
    }
}

impl Many {
    pub fn poll(&mut self) {
        // A message from one queue to another is processed in the next round.
        for _ in 0..3 {
            for setup in &mut self.queues {
                setup.poll();
            }
        }
    }

    /// Sends a request and returns its response.
    pub fn ask(&mut self, ask: CtrlAsk) -> (CtrlStatus, u32) {
        let id = self.control.next_id;
        self.control.next_id += 1;
        self.raw(CtrlRequest::new(id, ask))
    }

    pub fn raw(&mut self, request: CtrlRequest) -> (CtrlStatus, u32) {
        self.control.ring.push(&request.to_bytes()).unwrap();
        let _ = self.control.ring.publish();
        self.poll();
        let mut slot = self.control.ring.pop().unwrap().expect("an answer");
        let answer = CtrlResponse::read(&mut slot).unwrap();
        assert_eq!((answer.id, answer.kind), (request.id, request.kind));
        assert!(self.control.ring.pop().unwrap().is_none(), "one answer");
        (CtrlStatus::from_number(answer.status).expect("a status"), answer.data)
    }

    /// Sends a request whose response has no data.
    pub fn set(&mut self, ask: CtrlAsk) -> CtrlStatus {
        let (status, data) = self.ask(ask);
        assert_eq!(data, 0);
        status
    }

    /// Writes the control page.
    pub fn write(&self, bytes: &[u8]) {
        self.control.page.write_bytes(0, bytes).unwrap();
    }

    pub fn write_list(&self, list: &[GrefEntry]) {
        let bytes: Vec<u8> = list.iter().flat_map(|entry| entry.to_bytes()).collect();
        self.write(&bytes);
    }

    pub fn read_list(&self, count: usize) -> Vec<GrefEntry> {
        let mut bytes = vec![0; count * 8];
        self.control.page.read_bytes(0, &mut bytes).unwrap();
        bytes.as_chunks().0.iter().copied().map(GrefEntry::from_bytes).collect()
    }
}
