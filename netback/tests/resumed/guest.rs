//! A guest of two queues that checks every response, every frame on the wire and every page of its
//! memory.

use crate::memory::{CONTROL, CONTROL_DATA, Memory, PAGES, QUEUES, data, ungranted};
use pvio_grant_table::GrantRef;
use pvio_recordfile::RecordFile;
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, Extra, ExtraKind,
    HASH_TOEPLITZ, HashTypes, RX_SLOT_SIZE, RxFlags, RxRequest, TX_SLOT_SIZE, TxFlags, TxRequest,
    TxResponse, rsp,
};
use pvio_ring::shm::{PAGE_SIZE, Part, Region};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// Multicast group that the guest selects; it does not receive others.
pub const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
const OTHER_GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 2];
const STATION: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Largest number of packets that one poll of a backend sends.
const BATCH: u64 = 64;
const GUARD: u8 = 0x5a;

type Ring = FrontRing<Part<RecordFile>>;

/// Expected response of a slot of a transmit ring.
enum Expected {
    /// Page, number of the packet, and whether it is the packet's last slot.
    Sent(u16, u64, bool),
    Status(u16, i16),
}

struct Lane {
    tx: Ring,
    rx: Ring,
    made: u64,
    next_page: usize,
    expected: VecDeque<Expected>,
    /// Packets without a response: the frame, and the number of times it was on the wire.
    open: BTreeMap<u64, (Vec<u8>, u64)>,
    /// Packets that got an error response.
    failed: BTreeSet<u64>,
    /// Number of the last packet on the wire, and of the process that sent it.
    last: (u64, u64),
    /// Receive buffers in the order of posting.
    posted: VecDeque<u16>,
    /// Number of frames made for the guest by this queue's port. The next field is the last one
    /// that arrived.
    injected: u64,
    came: u64,
}

pub struct Guest {
    memory: Memory,
    lanes: Vec<Lane>,
    control: Ring,
    /// Requests of the control ring that are still to be made.
    asks: VecDeque<(Vec<u8>, CtrlAsk)>,
    asked: Option<u16>,
    wire: UnixDatagram,
    dir: PathBuf,
    steered: usize,
    /// Whether buffers are posted again and packets are sent.
    goes_on: bool,
    turn: u64,
    deaths: u64,
    pub answered: u64,
    pub received: u64,
    pub repeated: u64,
    pub heard_group: u64,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open: Vec<_> = self.lanes.iter().map(|lane| lane.expected.len()).collect();
        let posted: Vec<_> = self.lanes.iter().map(|lane| lane.posted.len()).collect();
        let (answered, received) = (self.answered, self.received);
        write!(f, "{answered} answered, {received} received, {open:?} open, {posted:?} posted")
    }
}

fn frame(to: [u8; 6], lane: usize, number: u64, len: usize) -> Vec<u8> {
    let byte = |at: usize| (at as u64 * 31 + at as u64 / 251 + number * 17) as u8;
    let mut frame: Vec<u8> = (0..len).map(byte).collect();
    frame[..6].copy_from_slice(&to);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[14..22].copy_from_slice(&number.to_le_bytes());
    frame[22] = lane as u8;
    frame
}

fn number_of(frame: &[u8]) -> u64 {
    u64::from_le_bytes(frame[14..22].try_into().unwrap())
}

/// Returns the destination and the length of the frame of that number.
fn incoming(number: u64) -> ([u8; 6], usize) {
    let to = [STATION, STATION, GROUP, OTHER_GROUP][number as usize % 4];
    (to, if number.is_multiple_of(7) { 9000 } else { 60 + number as usize % 900 })
}

impl Guest {
    pub fn new(dir: &Path, memory: Memory) -> Self {
        ungranted().for_each(|page| memory.page(page).fill(0, PAGE_SIZE, GUARD).unwrap());
        let lane = |queue: usize| Lane {
            tx: FrontRing::init(memory.page(2 * queue), TX_SLOT_SIZE).unwrap(),
            rx: FrontRing::init(memory.page(2 * queue + 1), RX_SLOT_SIZE).unwrap(),
            made: 0,
            next_page: 0,
            expected: VecDeque::new(),
            open: BTreeMap::new(),
            failed: BTreeSet::new(),
            last: (0, 0),
            posted: VecDeque::new(),
            injected: 0,
            came: 0,
        };
        let lanes = (0..QUEUES).map(lane).collect();
        let wire = UnixDatagram::bind(dir.join("wire")).unwrap();
        wire.set_nonblocking(true).unwrap();
        let (control_data, dir) = (GrantRef(CONTROL_DATA as u32), dir.to_path_buf());
        let asks = [
            (vec![], CtrlAsk::SetHashAlgorithm(HASH_TOEPLITZ)),
            (vec![], CtrlAsk::SetHashFlags(HashTypes::all().bits())),
            (vec![7; 40], CtrlAsk::SetHashKey { page: control_data, len: 40 }),
            (vec![], CtrlAsk::SetHashMappingSize(1)),
        ];
        let control = FrontRing::init(memory.page(CONTROL), CTRL_SLOT_SIZE).unwrap();
        let mut guest = Self {
            memory,
            lanes,
            control,
            asks: asks.into(),
            asked: None,
            wire,
            dir,
            steered: 0,
            goes_on: true,
            turn: 0,
            deaths: 0,
            answered: 0,
            received: 0,
            repeated: 0,
            heard_group: 0,
        };
        guest.steer_to(QUEUES - 1);
        for queue in 0..QUEUES {
            (0..PAGES).for_each(|page| guest.post(queue, page as u16));
        }
        let Lane { tx, expected, .. } = &mut guest.lanes[0];
        let name = TxRequest { id: 99, flags: TxFlags::EXTRA_INFO, ..TxRequest::default() };
        tx.push(&name.to_bytes()).unwrap();
        tx.push(&Extra { kind: ExtraKind::McastAdd(GROUP), more: false }.to_bytes()).unwrap();
        expected.extend([Expected::Status(99, rsp::OKAY), Expected::Status(0, rsp::NULL)]);
        guest
    }

    /// Steers every received frame to this queue.
    pub fn steer_to(&mut self, queue: usize) {
        self.steered = queue;
        let ask =
            CtrlAsk::SetHashMapping { page: GrantRef(CONTROL_DATA as u32), len: 1, offset: 0 };
        self.asks.push_back(((queue as u32).to_le_bytes().into(), ask));
    }

    /// Whether all requests of the control ring have their responses.
    pub fn is_set_up(&self) -> bool {
        self.asks.is_empty() && self.asked.is_none()
    }

    /// Stops sending packets, injecting frames, and posting buffers again.
    pub fn stop(&mut self) {
        self.goes_on = false;
    }

    pub fn is_quiet(&self) -> bool {
        self.lanes.iter().all(|lane| lane.expected.is_empty())
    }

    /// Injects a frame for each buffer that a queue has posted.
    pub fn fill(&mut self, queue: usize) {
        for _ in 0..self.lanes[queue].posted.len() {
            while !self.inject_one(queue, (STATION, 60)) {}
        }
    }

    pub fn has_all_buffers(&self, queue: usize) -> bool {
        self.lanes[queue].posted.is_empty()
    }

    /// Adjusts the expectations after the backend's process was killed.
    pub fn bury(&mut self) {
        self.deaths += 1;
        self.take();
        for page in ungranted() {
            let mut bytes = [0; PAGE_SIZE];
            self.memory.page(page).read_bytes(0, &mut bytes).unwrap();
            assert!(bytes == [GUARD; PAGE_SIZE], "page {page} was not granted");
        }
    }

    pub fn work(&mut self) {
        self.take();
        self.turn += 1;
        if !self.is_set_up() {
            return self.ask();
        }
        if self.goes_on {
            for queue in 0..QUEUES {
                self.send(queue);
                self.inject_one(queue, incoming(self.lanes[queue].injected + 1));
            }
        }
    }

    fn ask(&mut self) {
        if self.asked.is_none()
            && let Some((bytes, ask)) = self.asks.pop_front()
        {
            let id = self.turn as u16;
            self.memory.page(CONTROL_DATA).write_bytes(0, &bytes).unwrap();
            self.control.push(&CtrlRequest::new(id, ask).to_bytes()).unwrap();
            let _ = self.control.publish();
            self.asked = Some(id);
        }
    }

    fn post(&mut self, queue: usize, page: u16) {
        let number = data(queue, true, page.into());
        self.memory.page(number).fill(0, PAGE_SIZE, 0xee).unwrap();
        let lane = &mut self.lanes[queue];
        lane.rx.push(&RxRequest { id: page, gref: GrantRef(number as u32) }.to_bytes()).unwrap();
        lane.posted.push_back(page);
        let _ = lane.rx.publish();
    }

    /// Sends a packet of one to three slots.
    fn send(&mut self, queue: usize) {
        let lane = &mut self.lanes[queue];
        let slots = 1 + lane.made as usize % 3;
        if lane.expected.len() + slots > PAGES {
            return;
        }
        lane.made += 1;
        let number = lane.made;
        let bytes = frame(STATION, queue, number, slots * 300);
        for (at, part) in bytes.chunks(300).enumerate() {
            let page = lane.next_page;
            lane.next_page = (page + 1) % PAGES;
            let gref = data(queue, false, page);
            self.memory.page(gref).write_bytes(0, part).unwrap();
            let last = at + 1 == slots;
            let request = TxRequest {
                gref: GrantRef(gref as u32),
                offset: 0,
                flags: if last { TxFlags::empty() } else { TxFlags::MORE_DATA },
                id: page as u16,
                size: if at == 0 { bytes.len() } else { part.len() } as u16,
            };
            lane.tx.push(&request.to_bytes()).unwrap();
            lane.expected.push_back(Expected::Sent(page as u16, number, last));
        }
        lane.open.insert(number, (bytes, 0));
        let _ = lane.tx.publish();
    }

    /// Whether the backend accepted a frame for the guest.
    fn inject_one(&mut self, queue: usize, (to, len): ([u8; 6], usize)) -> bool {
        let lane = &mut self.lanes[queue];
        let bytes = frame(to, queue, lane.injected + 1, len);
        let sent = self.wire.send_to(&bytes, self.dir.join(format!("back-{queue}"))).is_ok();
        lane.injected += u64::from(sent);
        sent
    }

    /// Takes all visible responses, and then all frames on the wire: a frame is on the wire before
    /// its response is visible.
    fn take(&mut self) {
        while let Some(mut slot) = self.control.pop().unwrap() {
            let response = CtrlResponse::read(&mut slot).unwrap();
            assert_eq!(Some(response.id), self.asked.take());
            assert_eq!(response.status, CtrlStatus::Success as u32);
        }
        let mut done = Vec::new();
        for (queue, lane) in self.lanes.iter_mut().enumerate() {
            while let Some(mut slot) = lane.tx.pop().unwrap() {
                let response = TxResponse::read(&mut slot).unwrap();
                let found = (response.id, response.status);
                match lane.expected.pop_front().expect("one response too many") {
                    Expected::Status(id, status) => assert_eq!(found, (id, status)),
                    Expected::Sent(id, number, last) if response.status == rsp::ERROR => {
                        assert_eq!(response.id, id);
                        assert!(self.deaths > 1, "packet {number} is answered with an error");
                        lane.failed.insert(number);
                        if last {
                            lane.open.remove(&number);
                        }
                    }
                    Expected::Sent(id, number, last) => {
                        assert_eq!(found, (id, rsp::OKAY));
                        self.answered += 1;
                        if last {
                            done.push((queue, number));
                        }
                    }
                }
            }
        }
        self.read_wire();
        for (queue, number) in done {
            let (_, times) =
                self.lanes[queue].open.remove(&number).expect("request gets one response");
            assert!(times > 0, "packet {number} has a response but was not sent");
        }
        (0..QUEUES).for_each(|queue| self.receive(queue));
    }

    fn read_wire(&mut self) {
        let mut bytes = [0; 9 + PAGE_SIZE];
        while let Ok(len) = self.wire.recv(&mut bytes) {
            let (head, frame) = bytes[..len].split_at(9);
            let life = u64::from_le_bytes(head[..8].try_into().unwrap());
            let (lane, number) = (&mut self.lanes[usize::from(head[8])], number_of(frame));
            let open = lane.open.get_mut(&number);
            let (packet, times) =
                open.unwrap_or_else(|| panic!("packet {number} is not outstanding"));
            assert!(frame == packet, "packet {number} was sent with other contents");
            *times += 1;
            let (last, by) = lane.last;
            let next = (last + 1..).find(|number| !lane.failed.contains(number)).unwrap();
            if life == by {
                assert_eq!(number, next, "packets of a process are sent in order and once");
            } else {
                assert!(life > by, "packet of a dead process was sent late");
                assert!(number <= next, "packet {next} was not sent");
                assert!(number + BATCH >= next, "more than one batch was sent again");
            }
            self.repeated += u64::from(number < next);
            lane.last = (number, life);
        }
    }

    fn receive(&mut self, queue: usize) {
        let mut bytes = Vec::new();
        while let Some(mut slot) = self.lanes[queue].rx.pop().unwrap() {
            let raw: [u8; RX_SLOT_SIZE] = slot.read_array().unwrap();
            let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
            let (id, flags, status) = (half(0), half(4), half(6).cast_signed());
            let flags = RxFlags::from_bits_truncate(flags);
            let page = self.lanes[queue].posted.pop_front().expect("more than were posted");
            assert_eq!(id, page, "buffers are used in order, each once");
            assert!(!flags.contains(RxFlags::EXTRA_INFO), "of no protocol that is hashed");
            if status == rsp::ERROR {
                assert!(self.deaths > 1 && bytes.is_empty());
            } else {
                let mut part = vec![0; usize::try_from(status).unwrap()];
                let from = self.memory.page(data(queue, true, page.into()));
                from.read_bytes(0, &mut part).unwrap();
                bytes.extend(part);
                if !flags.contains(RxFlags::MORE_DATA) {
                    self.check(queue, &std::mem::take(&mut bytes));
                }
            }
            if self.goes_on {
                self.post(queue, page);
            }
        }
        assert!(bytes.is_empty(), "half a packet was published");
    }

    fn check(&mut self, queue: usize, bytes: &[u8]) {
        assert_eq!(queue, self.steered, "the hash and its mapping were lost");
        let (to, lane, number) = (&bytes[..6], usize::from(bytes[22]), number_of(bytes));
        assert!(to != OTHER_GROUP, "the groups were lost");
        let from = &mut self.lanes[lane];
        assert!((from.came + 1..=from.injected).contains(&number), "frames in order and once");
        from.came = number;
        let sent = frame(to.try_into().unwrap(), lane, number, bytes.len());
        assert!(bytes == sent, "frame {number} is received unchanged");
        if self.goes_on {
            assert_eq!((to, bytes.len()), (&incoming(number).0[..], incoming(number).1));
        }
        self.received += 1;
        self.heard_group += u64::from(to == GROUP);
    }
}
