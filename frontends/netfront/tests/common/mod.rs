//! Both sides of a vif in one thread, and backends that a test controls.
#![allow(dead_code, reason = "each test file uses its own part")]

use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, DomId, GrantMapper};
use pvio_netback::port::memory::{MemoryPort, loopback, pair};
use pvio_netback::queue::{EventPorts, Policy, QueueRefs};
use pvio_netback::{NetPort, Stats};
use pvio_netfront::{Features, Queue};
use pvio_ring::BackRing;
use pvio_ring::proto::netif::{RX_SLOT_SIZE, RxRequest, TX_SLOT_SIZE};
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalMapping;
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;

pub const FRONT: DomId = DomId(7);
pub const BACK: DomId = DomId(0);

/// Default negotiated features of the tests.
pub const FRONT_FEATURES: Features =
    Features { sg: true, checksum_v4: true, checksum_v6: true, ..NO_FEATURES };
pub const NO_FEATURES: Features = Features {
    sg: false,
    checksum_v4: false,
    checksum_v6: false,
    gso_v4: false,
    gso_v6: false,
    takes_gso_v4: false,
    takes_gso_v6: false,
};
pub const BACK_FEATURES: pvio_netback::Features = pvio_netback::Features {
    sg: true,
    checksum_v4: true,
    checksum_v6: true,
    rx_notify: true,
    ..pvio_netback::Features::LEAST
};

pub fn refs(queue: &Queue<LocalDomain>) -> QueueRefs {
    QueueRefs {
        tx_ring: queue.tx_gref(),
        rx_ring: queue.rx_gref(),
        events: EventPorts::Shared(queue.channel().port()),
    }
}

/// Attaches the backend's queue. The frontend must behave the same with every data path policy: the
/// test program `mapped` runs all these tests again with another one.
pub fn attach(
    driver: LocalDomain,
    guest: DomId,
    front: &Queue<LocalDomain>,
    features: pvio_netback::Features,
    stats: &Arc<Stats>,
) -> pvio_netback::Queue<LocalDomain, Box<[u8]>> {
    let stats = Arc::clone(stats);
    let back = pvio_netback::Queue::attach(driver, guest, &refs(front), features, stats);
    let mut back = back.unwrap();
    back.set_policy(if module_path!().starts_with("mapped::") {
        Policy::Map
    } else {
        Policy::Copy
    });
    back
}

/// A frontend with the real backend.
pub struct Vif {
    pub front: Queue<LocalDomain>,
    pub back: pvio_netback::Queue<LocalDomain, Box<[u8]>>,
    pub port: MemoryPort,
    pub stats: Arc<Stats>,
}

impl Vif {
    pub fn on(machine: &LocalMachine, guest: DomId, port: MemoryPort) -> Self {
        let (domain, driver) = (machine.domain(guest), machine.domain(BACK));
        let mut front = Queue::new(&domain, BACK).unwrap();
        front.set_features(FRONT_FEATURES);
        let stats = Arc::new(Stats::default());
        let back = attach(driver, guest, &front, BACK_FEATURES, &stats);
        Self { front, back, port, stats }
    }

    pub fn poll(&mut self) {
        while self.back.poll(&mut self.port, 64).unwrap().any() {}
    }
}

/// Creates a vif whose packets are sent back to it.
pub fn echo() -> (LocalMachine, Vif) {
    let machine = LocalMachine::new();
    let vif = Vif::on(&machine, FRONT, loopback(64));
    (machine, vif)
}

/// Creates two vifs that are connected to each other.
pub fn wire() -> (LocalMachine, Vif, Vif) {
    let machine = LocalMachine::new();
    let (a, b) = pair(64);
    let (a, b) = (Vif::on(&machine, FRONT, a), Vif::on(&machine, DomId(8), b));
    (machine, a, b)
}

/// A frontend whose backend is the test.
pub struct Hostile {
    pub front: Queue<LocalDomain>,
    pub tx: BackRing<LocalMapping>,
    pub rx: BackRing<LocalMapping>,
    /// A second mapping of the same page, to overwrite it.
    pub tx_page: LocalMapping,
    pub rx_page: LocalMapping,
    pub channel: LocalChannel,
    pub back: LocalDomain,
    pub machine: LocalMachine,
}

pub fn hostile() -> Hostile {
    let machine = LocalMachine::new();
    let (domain, back) = (machine.domain(FRONT), machine.domain(BACK));
    let mut front = Queue::new(&domain, BACK).unwrap();
    front.set_features(FRONT_FEATURES);
    let map = |gref| back.map(FRONT, &[gref], Access::ReadWrite).unwrap();
    let (tx_page, rx_page) = (map(front.tx_gref()), map(front.rx_gref()));
    let tx = BackRing::attach(map(front.tx_gref()), TX_SLOT_SIZE).unwrap();
    let rx = BackRing::attach(map(front.rx_gref()), RX_SLOT_SIZE).unwrap();
    let channel = back.bind_interdomain(FRONT, front.channel().port()).unwrap();
    Hostile { front, tx, rx, tx_page, rx_page, channel, back, machine }
}

impl Hostile {
    /// Takes the next posted receive buffer.
    pub fn buffer(&mut self) -> RxRequest {
        let mut slot = self.rx.pop().unwrap().expect("a posted buffer");
        RxRequest::read(&mut slot).unwrap()
    }
}

/// Returns bytes that differ by position.
pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251 + seed * 17) as u8).collect()
}

pub fn drain(port: &mut MemoryPort) {
    while let Some(packet) = port.receive() {
        port.recycle(packet.buf);
    }
}
