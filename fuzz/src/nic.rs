//! A frontend of a virtual NIC that does exactly what an input says, and packets.

use crate::{BACK, Domains, Shared, pick_gref};
use arbitrary::Arbitrary;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::Access;
use pvio_netback::port::memory::MemoryPort;
use pvio_netback::port::{Checksum, Gso, NetPort, Offload, Packet};
use pvio_netback::queue::{EventPorts, QueueRefs};
use pvio_netback::{Features, Queue};
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{
    GsoKind, RX_SLOT_SIZE, RxRequest, TX_SLOT_SIZE, TxFlags, TxRequest, TxResponse,
};
use pvio_sim::LocalDomain;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalPages;
use std::collections::VecDeque;

/// Number of data pages of the frontend.
pub const PAGES: usize = 8;
/// Number of packets that a port holds in each direction.
pub const DEPTH: usize = 6;

/// The backend's queue.
pub type Back = Queue<LocalDomain, Box<[u8]>>;

/// Negotiated features, a bit each.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Bits(u16);

impl Bits {
    /// Returns the features.
    pub fn features(self) -> Features {
        let bit = |at: u16| self.0 >> at & 1 == 1;
        Features {
            sg: !bit(0),
            checksum_v4: !bit(1),
            checksum_v6: !bit(2),
            gso_v4: bit(3),
            gso_v6: bit(4),
            gso_prefix_v4: bit(5),
            gso_prefix_v6: bit(6),
            sends_gso_v4: bit(7),
            sends_gso_v6: bit(8),
            names_groups: bit(9),
            rx_notify: bit(10),
        }
    }
}

/// A slot of a packet to be sent.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct TxSlot {
    gref: u16,
    offset: u16,
    size: u16,
    flags: u8,
}

/// A packet of the port.
#[derive(Arbitrary, Clone, Debug)]
pub struct Frame {
    protocol: u8,
    len: u16,
    checksum: Option<(u8, u8)>,
    gso: Option<(u16, bool)>,
    bytes: Vec<u8>,
}

impl Frame {
    /// Returns an Ethernet frame that begins with valid headers, mostly, and has arbitrary bytes after
    /// them.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        let transport = if self.protocol & 1 == 0 { 6 } else { 17 };
        let len = usize::from(self.len).max(14);
        let ip_len = (len.saturating_sub(14)).min(65535) as u16;
        if self.protocol & 8 != 0 {
            frame.extend([0x81, 0, 0, 1]);
        }
        match self.protocol >> 1 & 3 {
            0 | 1 => {
                let [high, low] = ip_len.to_be_bytes();
                frame.extend([8, 0, 0x45, 0, high, low, 0, 0, 0x40, 0, 64, transport, 0, 0]);
                frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            }
            2 => {
                let [high, low] = ip_len.saturating_sub(40).to_be_bytes();
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, high, low, transport, 64]);
                frame.extend([0xfd; 32]);
            }
            _ => frame.extend([8, 6]),
        }
        if self.protocol & 16 == 0 {
            frame.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 16]);
        }
        frame.extend(&self.bytes);
        frame.resize(len, 0x77);
        frame
    }

    /// Returns the offloads that the port reports, consistent with the frame's length.
    pub fn offload(&self) -> Offload {
        let checksum = match self.checksum {
            None => Checksum::Unknown,
            Some((0, 0)) => Checksum::Validated,
            Some((start, offset)) => {
                Checksum::Partial { start: start.into(), offset: offset.into() }
            }
        };
        let gso = self
            .gso
            .filter(|gso| gso.0 > 0)
            .map(|(size, v6)| Gso { size, kind: if v6 { GsoKind::TcpV6 } else { GsoKind::TcpV4 } });
        Offload { checksum, gso }
    }

    /// Sends the frame from the wire to the port, if there is a free buffer.
    pub fn inject(&self, wire: &mut MemoryPort) {
        if let Ok(mut buf) = wire.reserve() {
            let frame = self.bytes();
            buf[..frame.len()].copy_from_slice(&frame);
            let packet = Packet { buf, start: 0, len: frame.len(), offload: self.offload() };
            wire.send(packet).expect("the other end exists");
        }
    }
}

/// The frontend of one queue.
pub struct Guest {
    /// Transmit ring.
    pub tx: FrontRing<LocalPages>,
    /// Receive ring.
    pub rx: FrontRing<LocalPages>,
    /// Page of the transmit ring.
    pub tx_page: Shared,
    /// Page of the receive ring.
    pub rx_page: Shared,
    /// Data pages, the last of which the backend may only read.
    pub data: Shared,
    /// Page that the backend may only read.
    pub fixed: Shared,
    /// Event channels.
    pub channels: Vec<LocalChannel>,
    /// What it writes to xenstore.
    pub refs: QueueRefs,
    /// Ids of transmit requests without a response, in order.
    pub sent: VecDeque<u16>,
    /// It has written only requests to its rings.
    pub honest: bool,
    next_id: u16,
}

impl Guest {
    /// Creates a frontend whose rings start at index `start`.
    pub fn new(domains: &Domains, start: u32, split: bool) -> Self {
        let front = &domains.front;
        let shared = |count, access| Shared::new(front, BACK, count, access);
        let (tx_page, rx_page) = (shared(1, Access::ReadWrite), shared(1, Access::ReadWrite));
        let mut data = shared(PAGES, Access::ReadWrite);
        let fixed = shared(1, Access::ReadOnly);
        data.grefs.extend(&fixed.grefs);
        let ring = |page: &Shared, size| FrontRing::init_at(page.pages.clone(), size, start);
        let count = if split { 2 } else { 1 };
        let channels: Vec<_> =
            (0..count).map(|_| front.alloc_unbound(BACK).expect("enough ports")).collect();
        let events = match &channels[..] {
            [tx, rx] => EventPorts::Split { tx: tx.port(), rx: rx.port() },
            _ => EventPorts::Shared(channels[0].port()),
        };
        Self {
            tx: ring(&tx_page, TX_SLOT_SIZE).expect("a valid size"),
            rx: ring(&rx_page, RX_SLOT_SIZE).expect("a valid size"),
            refs: QueueRefs { tx_ring: tx_page.grefs[0], rx_ring: rx_page.grefs[0], events },
            tx_page,
            rx_page,
            data,
            fixed,
            channels,
            sent: VecDeque::new(),
            honest: true,
            next_id: 0,
        }
    }

    /// Writes a transmit request; the ids are consecutive.
    pub fn send_slot(&mut self, slot: TxSlot) {
        let small = |value: u16, most: u16| if value < 0xf000 { value % most } else { value };
        let request = TxRequest {
            gref: pick_gref(&self.data.grefs, slot.gref),
            offset: small(slot.offset, 4097),
            // Mostly defined flags.
            flags: TxFlags::from_bits_truncate(slot.flags.into()),
            id: self.next_id,
            size: small(slot.size, 5000),
        };
        self.send_raw(request.to_bytes(), Some(self.next_id));
    }

    /// Writes a slot of the transmit ring. `id` is that of its response; a slot that may be an extra
    /// segment has none.
    pub fn send_raw(&mut self, bytes: [u8; TX_SLOT_SIZE], id: Option<u16>) {
        if self.tx.push(&bytes).is_ok() {
            self.honest &= id.is_some();
            self.sent.extend(id);
            self.next_id = self.next_id.wrapping_add(1);
        }
    }

    /// Posts receive buffers.
    pub fn post(&mut self, count: u8, gref: u16) {
        for n in 0..u16::from(count) {
            let gref = pick_gref(
                &self.data.grefs,
                if gref < 0xff00 { gref.wrapping_add(n) } else { gref },
            );
            if self.rx.push(&RxRequest { id: n, gref }.to_bytes()).is_err() {
                break;
            }
        }
    }

    /// Takes transmit responses. Those of an honest frontend are in the order of its requests.
    pub fn take_tx_responses(&mut self) {
        while self.honest {
            let Some(mut slot) = self.tx.pop().expect("the backend's indices are valid") else {
                break;
            };
            let response = TxResponse::read(&mut slot).expect("whole slots");
            let expected = self.sent.pop_front().expect("a response without a request");
            // An extra segment's response has no id.
            if response.status != pvio_ring::proto::netif::rsp::NULL {
                assert_eq!(response.id, expected, "id of a transmit response");
            }
        }
    }

    /// Takes receive responses.
    pub fn take_rx_responses(&mut self) {
        while self.honest && self.rx.pop().expect("the backend's indices are valid").is_some() {}
    }

    /// Asserts that the backend holds no page, and wrote none that it may only read.
    pub fn assert_released(mut self) {
        use pvio_ring::shm::{PAGE_SIZE, Region};
        let mut page = vec![0; PAGE_SIZE];
        self.fixed.pages.read_bytes(0, &mut page).expect("inside the page");
        assert!(page.iter().all(|byte| *byte == 0), "a read-only page was written");
        self.data.grefs.pop();
        for shared in [self.tx_page, self.rx_page, self.data, self.fixed] {
            shared.assert_unmapped();
        }
    }
}

/// Asserts that no buffer of the port is lost: the queue holds none.
pub fn assert_no_buffer_lost(port: &mut MemoryPort, wire: &mut MemoryPort) {
    for (to, from) in [(0, 1), (1, 0)] {
        let ends = [&mut *port, &mut *wire];
        while let Some(packet) = ends[to].receive() {
            ends[to].recycle(packet.buf);
        }
        let free: Vec<_> = std::iter::from_fn(|| ends[from].reserve().ok()).collect();
        assert_eq!(free.len(), DEPTH, "a port's buffer was lost");
        free.into_iter().for_each(|buf| ends[from].unreserve(buf));
    }
}
