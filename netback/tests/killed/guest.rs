//! A guest that uses every feature, and checks every result.

use crate::common::{self, pattern};
use crate::wire::Wire;
use pvio_netback::queue::QueueRefs;
use pvio_ring::proto::netif::{
    Extra, ExtraKind, RxFlags, RxResponse, TxFlags, TxRequest, TxResponse, rsp,
};
use pvio_sim::LocalDomain;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// Number of pages that packets are sent from; the others are receive buffers.
const SENDING: usize = 32;
const RECEIVING: usize = common::DATA_PAGES - SENDING;

/// Expected response of a request.
enum Expected {
    /// For a packet's slot: the id and the number of the packet.
    Sent(u16, u64),
    /// For another request: the id and the status.
    Status(u16, i16),
}

/// One queue of the guest.
pub struct Guest {
    guest: common::Guest,
    pub wire: Rc<RefCell<Wire>>,
    number: u8,
    /// Packets without a response, each with its frame and the number of times it was seen on the
    /// wire.
    packets: BTreeMap<u64, (Vec<u8>, u32)>,
    made: u64,
    expected: VecDeque<Expected>,
    /// Number of frames on the wire that were checked.
    seen: usize,
    next_page: usize,
    /// Receive buffers in the order of posting.
    posted: VecDeque<u16>,
    /// Frames for the guest that have not arrived, by number.
    incoming: BTreeMap<u64, Vec<u8>>,
    /// Frames that may arrive or may be lost with a process.
    doubtful: BTreeMap<u64, Vec<u8>>,
    injected: u64,
    pub received: u64,
    /// Number of processes that have ended.
    deaths: u32,
    /// Number of packets and of buffers that got an error response since.
    pub given_up: [u64; 2],
}

impl Guest {
    pub fn new(domain: LocalDomain, number: u8, start: u32, split: bool) -> Self {
        let guest = common::Guest::new(domain, start, split);
        let mut made = Self {
            guest,
            wire: Rc::default(),
            number,
            packets: BTreeMap::new(),
            made: 0,
            expected: VecDeque::new(),
            seen: 0,
            next_page: 0,
            posted: VecDeque::new(),
            incoming: BTreeMap::new(),
            doubtful: BTreeMap::new(),
            injected: 0,
            received: 0,
            deaths: 0,
            given_up: [0; 2],
        };
        (SENDING..common::DATA_PAGES).for_each(|page| made.post(page as u16));
        made
    }

    pub fn refs(&self) -> QueueRefs {
        self.guest.refs
    }

    pub const fn number(&self) -> u8 {
        self.number
    }

    pub fn grefs(&self) -> &[pvio_grant_table::GrantRef] {
        &self.guest.grefs
    }

    fn post(&mut self, page: u16) {
        self.guest.post(usize::from(page)..usize::from(page) + 1);
        self.posted.push_back(page);
    }

    fn page(&mut self) -> usize {
        let page = self.next_page;
        self.next_page = (page + 1) % SENDING;
        page
    }

    /// Sends a packet of several parts, each in its own page.
    pub fn send(&mut self, sizes: &[usize]) {
        if self.expected.len() + sizes.len() > SENDING {
            return;
        }
        self.made += 1;
        let number = self.made;
        let mut frame = pattern(sizes.iter().sum(), number as usize);
        frame[0] = 2;
        frame[6..14].copy_from_slice(&number.to_le_bytes());
        frame[14] = self.number;
        let mut rest = frame.as_slice();
        let mut slots: Vec<TxRequest> = Vec::new();
        for (n, size) in sizes.iter().enumerate() {
            let (part, tail) = rest.split_at(*size);
            rest = tail;
            let page = self.page();
            // The page's earlier contents belong to a packet that has its response.
            let mut slot = self.guest.slot(page, 0, part);
            slot.flags = if n + 1 < sizes.len() { TxFlags::MORE_DATA } else { TxFlags::empty() };
            slots.push(slot);
            self.expected.push_back(Expected::Sent(slot.id, number));
        }
        slots[0].size = frame.len() as u16;
        self.packets.insert(number, (frame, 0));
        self.guest.send(&slots);
    }

    /// Sends a request that is not a valid packet: shorter than an Ethernet header.
    pub fn send_short(&mut self) {
        if self.expected.len() >= SENDING {
            return;
        }
        let page = self.page();
        let slot = self.guest.slot(page, 0, &[9; 10]);
        self.expected.push_back(Expected::Status(slot.id, rsp::ERROR));
        self.guest.send(&[slot]);
    }

    /// Selects a multicast group.
    pub fn name(&mut self, group: [u8; 6]) {
        if self.expected.len() + 2 > SENDING {
            return;
        }
        let flags = TxFlags::EXTRA_INFO;
        self.guest.push(&[TxRequest { id: 99, flags, ..TxRequest::default() }]);
        let extra = Extra { kind: ExtraKind::McastAdd(group), more: false };
        self.guest.tx.push(&extra.to_bytes()).unwrap();
        let _ = self.guest.tx.publish();
        self.expected.push_back(Expected::Status(99, rsp::OKAY));
        self.expected.push_back(Expected::Status(0, rsp::NULL));
    }

    /// Queues a frame for the guest, to this address.
    pub fn inject(&mut self, station: [u8; 6], len: usize) {
        self.injected += 1;
        let number = self.injected;
        let mut frame = pattern(len, 100 + number as usize);
        frame[..6].copy_from_slice(&station);
        frame[6..14].copy_from_slice(&number.to_le_bytes());
        frame[14] = self.number;
        self.incoming.insert(number, frame.clone());
        self.wire.borrow_mut().incoming.push_back(frame);
    }

    /// Checks that only packets of the guest without a visible response are sent.
    pub fn check_wire(&mut self) {
        let wire = Rc::clone(&self.wire);
        let wire = wire.borrow();
        for frame in &wire.sent[self.seen..] {
            let number = u64::from_le_bytes(frame[6..14].try_into().unwrap());
            let open = self.packets.get_mut(&number);
            let (packet, count) =
                open.unwrap_or_else(|| panic!("packet {number} is not outstanding"));
            assert!(frame == packet, "packet {number} was sent with other contents");
            *count += 1;
        }
        self.seen = wire.sent.len();
    }

    /// Takes all responses. Frames for any queue are looked up in `all`.
    pub fn take(&mut self) -> Vec<Vec<u8>> {
        self.check_wire();
        while let Some(mut slot) = self.guest.tx.pop().unwrap() {
            let response = TxResponse::read(&mut slot).unwrap();
            let (id, status) = match self.expected.pop_front().expect("one response too many") {
                Expected::Status(id, status) => (id, status),
                Expected::Sent(id, number) if self.deaths > 1 && response.status == rsp::ERROR => {
                    self.given_up[0] += u64::from(self.packets.remove(&number).is_some());
                    (id, rsp::ERROR)
                }
                Expected::Sent(id, number) => {
                    let last = !self
                        .expected
                        .iter()
                        .any(|other| matches!(other, Expected::Sent(_, other) if *other == number));
                    let (_, count) = self.packets[&number];
                    assert!((1..=3).contains(&count), "packet {number} was sent {count} times");
                    if last {
                        self.packets.remove(&number);
                    }
                    (id, rsp::OKAY)
                }
            };
            assert_eq!((response.id, response.status), (id, status));
        }
        self.take_received()
    }

    fn take_received(&mut self) -> Vec<Vec<u8>> {
        let (mut frames, mut frame, mut more) = (Vec::new(), Vec::new(), false);
        let mut used = Vec::new();
        let mut raw = self.guest.received_raw().into_iter();
        while let Some(slot) = raw.next() {
            let response = parse(slot);
            let page = self.posted.pop_front().expect("more buffers than were posted");
            assert_eq!(response.id, page, "buffers are used in order, each once");
            if self.deaths > 1 && response.status == rsp::ERROR {
                assert!(frame.is_empty() && response.flags.is_empty());
                self.given_up[1] += 1;
                used.push(page);
                continue;
            }
            let len = usize::try_from(response.status).expect("a buffer that can be written");
            frame.extend(self.guest.page(usize::from(page), len));
            used.push(page);
            if response.flags.contains(RxFlags::EXTRA_INFO) {
                // It occupies the slot of the next buffer.
                let [_, flags, ..] = raw.next().expect("an extra segment");
                assert_eq!(flags & 1, 0, "one of them");
                used.push(self.posted.pop_front().expect("a buffer"));
            }
            more = response.flags.contains(RxFlags::MORE_DATA);
            if !more {
                frames.push(std::mem::take(&mut frame));
                self.received += 1;
            }
        }
        assert!(!more, "half a packet was published");
        for page in used {
            // If the backend writes to the buffer before it is posted again, it corrupts a packet.
            let at = usize::from(page);
            let id = self.guest.slot(at, 0, &[0xee; 64]).id;
            self.post(id);
        }
        assert_eq!(self.posted.len(), RECEIVING);
        frames
    }

    /// Records the arrival of a frame of this queue's wire, on any queue.
    pub fn came(&mut self, frame: &[u8]) {
        let number = u64::from_le_bytes(frame[6..14].try_into().unwrap());
        let sent = self.incoming.remove(&number).or_else(|| self.doubtful.remove(&number));
        assert!(sent.as_deref() == Some(frame), "frame {number} is received unchanged and once");
    }

    /// Makes the newest packet end every process that sends it.
    pub fn make_deadly(&mut self) {
        self.wire.borrow_mut().deadly = Some(self.packets[&self.made].0.clone());
    }

    /// Allows that frames in flight are lost, since the backend's process ended.
    pub fn forgive(&mut self) {
        self.deaths += 1;
        let waiting: Vec<_> = self.wire.borrow().incoming.iter().cloned().collect();
        let (waiting, lost): (BTreeMap<_, _>, BTreeMap<_, _>) = std::mem::take(&mut self.incoming)
            .into_iter()
            .partition(|(_, frame)| waiting.contains(frame));
        self.incoming = waiting;
        self.doubtful.extend(lost);
    }

    /// Removes frames to groups that were not selected, which do not arrive.
    pub fn drop_unheard(&mut self) {
        self.incoming.clear();
    }

    pub fn is_done(&self) -> bool {
        self.expected.is_empty() && self.incoming.is_empty()
    }
}

fn parse(slot: [u8; 8]) -> RxResponse {
    let half = |at: usize| u16::from_le_bytes([slot[at], slot[at + 1]]);
    RxResponse {
        id: half(0),
        offset: half(2),
        flags: RxFlags::from_bits_truncate(half(4)),
        status: half(6).cast_signed(),
    }
}
