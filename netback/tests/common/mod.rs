//! A frontend that does exactly what a test specifies, valid or not.
#![allow(dead_code, reason = "each test file uses its own part")]

use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_netback::port::memory::{MemoryPort, pair};
use pvio_netback::port::{NetPort, Offload, Packet};
use pvio_netback::queue::{EventPorts, Policy, Progress, QueueRefs};
use pvio_netback::{Features, Queue, Stats};
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{
    RX_SLOT_SIZE, RxRequest, RxResponse, TX_SLOT_SIZE, TxFlags, TxRequest, TxResponse,
};
use pvio_ring::shm::{PAGE_SIZE, Region};
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalPages;
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;

pub const FRONT: DomId = DomId(7);
pub const BACK: DomId = DomId(0);
/// Number of data pages of the guest, each granted.
pub const DATA_PAGES: usize = 64;
/// All features of this backend.
pub const ALL: Features =
    Features { sg: true, checksum_v4: true, checksum_v6: true, rx_notify: true, ..Features::LEAST };

/// How the guest's pages are accessed. The test program `mapped` runs all these tests with the
/// other policy.
pub fn policy() -> Policy {
    if module_path!().starts_with("mapped::") { Policy::Map } else { Policy::Copy }
}

/// Guest and the backend's queue for it. The test holds the other end of the queue's port.
pub struct Setup {
    pub guest: Guest,
    pub queue: Queue<LocalDomain, Box<[u8]>>,
    pub port: MemoryPort,
    pub wire: MemoryPort,
    pub back: LocalDomain,
    pub machine: LocalMachine,
    pub stats: Arc<Stats>,
}

pub struct Guest {
    pub domain: LocalDomain,
    pub tx: FrontRing<LocalPages>,
    pub rx: FrontRing<LocalPages>,
    pub tx_channel: LocalChannel,
    pub rx_channel: Option<LocalChannel>,
    pub data: LocalPages,
    pub grefs: Vec<GrantRef>,
    pub tx_page: LocalPages,
    pub rx_page: LocalPages,
    pub refs: QueueRefs,
}

pub fn setup(features: Features) -> Setup {
    setup_at(features, 0, false)
}

/// Creates a setup whose rings start at index `start`.
pub fn setup_at(features: Features, start: u32, split: bool) -> Setup {
    setup_deep(features, start, split, 128)
}

/// Creates a setup whose port holds `depth` packets in each direction.
pub fn setup_deep(features: Features, start: u32, split: bool, depth: usize) -> Setup {
    let machine = LocalMachine::new();
    let back = machine.domain(BACK);
    let guest = Guest::new(machine.domain(FRONT), start, split);
    let stats = Arc::new(Stats::default());
    let mut queue =
        Queue::attach(back.clone(), FRONT, &guest.refs, features, Arc::clone(&stats)).unwrap();
    queue.set_policy(policy());
    let (port, wire) = pair(depth);
    Setup { guest, queue, port, wire, back, machine, stats }
}

impl Setup {
    pub fn poll(&mut self) -> Progress {
        self.queue.poll(&mut self.port, 256).unwrap()
    }

    /// Takes every packet that was sent to the wire.
    pub fn sent(&mut self) -> Vec<(Vec<u8>, Offload)> {
        let mut all = Vec::new();
        while let Some(packet) = self.wire.receive() {
            all.push((packet.frame().to_vec(), packet.offload));
            self.wire.recycle(packet.buf);
        }
        all
    }

    /// Sends a packet from the wire to the port.
    pub fn inject(&mut self, frame: &[u8], offload: Offload) {
        let mut buf = self.wire.reserve().unwrap();
        buf[..frame.len()].copy_from_slice(frame);
        self.wire.send(Packet { buf, start: 0, len: frame.len(), offload }).unwrap();
    }
}

impl Guest {
    pub fn new(domain: LocalDomain, start: u32, split: bool) -> Self {
        let grant =
            |pages: &LocalPages, page| domain.grant(BACK, pages, page, Access::ReadWrite).unwrap();
        let (tx_page, rx_page) = (domain.alloc_pages(1).unwrap(), domain.alloc_pages(1).unwrap());
        let data = domain.alloc_pages(DATA_PAGES).unwrap();
        let tx = FrontRing::init_at(tx_page.clone(), TX_SLOT_SIZE, start).unwrap();
        let rx = FrontRing::init_at(rx_page.clone(), RX_SLOT_SIZE, start).unwrap();
        let tx_channel = domain.alloc_unbound(BACK).unwrap();
        let rx_channel = split.then(|| domain.alloc_unbound(BACK).unwrap());
        let events = match &rx_channel {
            None => EventPorts::Shared(tx_channel.port()),
            Some(rx) => EventPorts::Split { tx: tx_channel.port(), rx: rx.port() },
        };
        let refs = QueueRefs { tx_ring: grant(&tx_page, 0), rx_ring: grant(&rx_page, 0), events };
        let grefs = (0..DATA_PAGES).map(|page| grant(&data, page)).collect();
        Self { domain, tx, rx, tx_channel, rx_channel, data, grefs, tx_page, rx_page, refs }
    }

    /// Fills part of a data page and returns its request.
    pub fn slot(&self, page: usize, offset: u16, bytes: &[u8]) -> TxRequest {
        self.data.write_bytes(page * PAGE_SIZE + usize::from(offset), bytes).unwrap();
        TxRequest {
            gref: self.grefs[page],
            offset,
            flags: TxFlags::empty(),
            id: page as u16,
            size: bytes.len() as u16,
        }
    }

    /// Returns the requests of a packet that is divided into parts, each in its own page. The first
    /// request has the total size.
    pub fn packet(&self, first_page: usize, parts: &[&[u8]]) -> Vec<TxRequest> {
        let mut slots: Vec<_> =
            parts.iter().enumerate().map(|(i, p)| self.slot(first_page + i, 0, p)).collect();
        slots[0].size = parts.iter().map(|p| p.len()).sum::<usize>() as u16;
        let last = slots.len() - 1;
        slots[..last].iter_mut().for_each(|s| s.flags |= TxFlags::MORE_DATA);
        slots
    }

    pub fn push(&mut self, slots: &[TxRequest]) {
        slots.iter().for_each(|s| self.tx.push(&s.to_bytes()).unwrap());
    }

    pub fn send(&mut self, slots: &[TxRequest]) {
        self.push(slots);
        let _ = self.tx.publish();
    }

    /// Takes every transmit response, in order.
    pub fn answers(&mut self) -> Vec<(u16, i16)> {
        let mut all = Vec::new();
        while let Some(mut slot) = self.tx.pop().unwrap() {
            let r = TxResponse::read(&mut slot).unwrap();
            all.push((r.id, r.status));
        }
        all
    }

    /// Posts receive buffers: numbers of data pages, which are also their ids.
    pub fn post(&mut self, pages: std::ops::Range<usize>) -> bool {
        for page in pages {
            let request = RxRequest { id: page as u16, gref: self.grefs[page] };
            self.rx.push(&request.to_bytes()).unwrap();
        }
        self.rx.publish()
    }

    /// Takes every receive response, in order.
    pub fn received(&mut self) -> Vec<RxResponse> {
        let mut all = Vec::new();
        while let Some(mut slot) = self.rx.pop().unwrap() {
            all.push(RxResponse::read(&mut slot).unwrap());
        }
        all
    }

    /// Takes every receive slot, in order, as raw bytes, including extra segments.
    pub fn received_raw(&mut self) -> Vec<[u8; RX_SLOT_SIZE]> {
        let mut all = Vec::new();
        while let Some(mut slot) = self.rx.pop().unwrap() {
            all.push(slot.read_array().unwrap());
        }
        all
    }

    pub fn page(&self, page: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.data.read_bytes(page * PAGE_SIZE, &mut out).unwrap();
        out
    }
}

/// Returns bytes that depend on their position.
pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251 + seed * 17) as u8).collect()
}

/// Takes the packets that wait in a port, and returns their buffers.
pub fn drain(port: &mut MemoryPort) {
    while let Some(packet) = port.receive() {
        port.recycle(packet.buf);
    }
}

/// Returns an Ethernet frame with TCP over IPv4 or IPv6, `payload` bytes of payload, and a wrong
/// checksum.
pub fn tcp(v6: bool, payload: usize) -> Vec<u8> {
    let mut f = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let len = 20 + payload;
    if v6 {
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, (len >> 8) as u8, len as u8, 6, 64]);
        f.extend([0xfd; 32]);
    } else {
        let total = 20 + len;
        f.extend([8, 0, 0x45, 0, (total >> 8) as u8, total as u8, 0, 0, 0x40, 0, 64, 6, 0, 0]);
        f.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let start = f.len();
    f.extend(pattern(len, 3));
    f[start + 16..start + 18].copy_from_slice(&[0xbe, 0xef]);
    f
}
