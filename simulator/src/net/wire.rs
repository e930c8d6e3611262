//! The cable between two vifs, and the record of each frame.

use pvio_netback::port::{FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// Number of frames that a direction of the cable holds.
const DEPTH: usize = 32;
/// Limit of the bytes in flight in a direction. It is less than a backend's backlog for a guest
/// that is slow to post buffers, so that no frame has to be dropped.
const WINDOW: usize = 256 * 1024;
/// Size of an Ethernet header, a frame's number, its length and its lane, in bytes.
pub const LEAST: usize = 14 + 8 + 4 + 1;
/// Number of lanes of a direction: one for each possible queue of a NIC. A queue sends into the
/// lane of its number. Of `n` queues, number `q` receives from the lanes whose numbers are `q`
/// modulo `n`.
pub const LANES: usize = 4;

/// Record of one direction of the cable: the frames of each lane.
#[derive(Default)]
pub struct Ledger {
    flows: [Flow; LANES],
    pub received: u64,
}

/// Frames that were sent in a lane, in order, and those that arrived.
#[derive(Default)]
struct Flow {
    next: u64,
    last: u64,
    /// Frames in flight: their numbers and lengths.
    flying: VecDeque<(u64, usize)>,
    /// Frames that may arrive more than once or late, and how often.
    again: BTreeMap<u64, u32>,
}

impl Ledger {
    pub fn has_room(&self, len: usize) -> bool {
        let flying = self.flows.iter().flat_map(|flow| &flow.flying);
        flying.map(|(_, len)| len).sum::<usize>() + len <= WINDOW
    }

    /// Returns the next frame to send in a lane.
    pub fn frame(&self, lane: usize, len: usize) -> Vec<u8> {
        content(lane, self.flows[lane].next + 1, len)
    }

    pub fn sent(&mut self, lane: usize, len: usize) {
        let flow = &mut self.flows[lane];
        flow.next += 1;
        flow.flying.push_back((flow.next, len));
    }

    /// Records a frame that arrived on queue `queue` of `queues`.
    ///
    /// # Panics
    /// If the frame was never sent, is a duplicate, overtook another one of its lane, left one
    /// behind, or arrives on the wrong queue for its lane.
    pub fn received(&mut self, frame: &[u8], queue: usize, queues: usize) {
        let lane = usize::from(*frame.get(26).expect("a frame shorter than any that was sent"));
        assert_eq!(
            lane % queues,
            queue,
            "a frame of lane {lane} comes on queue {queue} of {queues}"
        );
        self.received += u64::from(self.flows[lane].received(lane, frame));
    }

    /// Returns the number of frames in flight in each lane.
    pub fn flying(&self) -> [usize; LANES] {
        self.flows.each_ref().map(|flow| flow.flying.len())
    }

    /// Permits one repetition of the frames in flight: their sender may send them again.
    pub fn may_repeat(&mut self) {
        self.flows.iter_mut().for_each(Flow::may_repeat);
    }

    /// Permits the loss of the frames in flight, since a participant that carried them has ended.
    pub fn forgive(&mut self) {
        self.flows.iter_mut().for_each(Flow::forgive);
    }
}

impl Flow {
    /// Records an arrival. Returns whether the frame is new.
    fn received(&mut self, lane: usize, frame: &[u8]) -> bool {
        let number =
            frame.get(14..22).and_then(|b| b.first_chunk()).map(|b| u64::from_le_bytes(*b));
        let number = number.expect("a frame shorter than any that was sent");
        assert!(number <= self.next, "frame {number} was never sent");
        let late = number <= self.last;
        assert!(content(lane, number, frame.len()) == frame, "frame {number} was modified");
        if late {
            let left = self.again.get_mut(&number).filter(|left| **left > 0);
            *left.unwrap_or_else(|| panic!("frame {number} comes after frame {}", self.last)) -= 1;
            return false;
        }
        self.last = number;
        // Frames that may be lost may still arrive; the others must arrive in order.
        if self.flying.front().is_some_and(|(n, _)| number >= *n) {
            let (expected, len) = self.flying.pop_front().unwrap_or_default();
            assert_eq!((number, frame.len()), (expected, len), "a frame was lost");
        }
        true
    }

    fn may_repeat(&mut self) {
        self.again.values_mut().for_each(|left| *left += 1);
        self.flying.iter().for_each(|(number, _)| *self.again.entry(*number).or_default() += 1);
    }

    fn forgive(&mut self) {
        for (number, _) in self.flying.drain(..) {
            self.again.entry(number).or_default();
        }
    }
}

/// Returns the bytes of a frame.
fn content(lane: usize, number: u64, len: usize) -> Vec<u8> {
    let mut frame = vec![0; len];
    for (i, word) in frame.chunks_mut(8).enumerate() {
        let mixed = (number << 16 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&mixed.to_le_bytes()[..word.len()]);
    }
    // A unicast address, and the type for local experiments (IEEE 802): the contents are not
    // parsed.
    frame[0] = 2;
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[14..22].copy_from_slice(&number.to_le_bytes());
    frame[22..26].copy_from_slice(&(len as u32).to_le_bytes());
    frame[26] = lane as u8;
    frame
}

type Lane = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of the cable, in a driver domain.
#[derive(Clone)]
pub struct CableEnd {
    out: [Lane; LANES],
    inward: [Lane; LANES],
}

pub fn cable() -> [CableEnd; 2] {
    let (there, back) = (<[Lane; LANES]>::default(), <[Lane; LANES]>::default());
    let end = |out: &[Lane; LANES], inward: &[Lane; LANES]| CableEnd {
        out: out.each_ref().map(Rc::clone),
        inward: inward.each_ref().map(Rc::clone),
    };
    [end(&there, &back), end(&back, &there)]
}

impl CableEnd {
    /// Returns the port of queue `queue` of `queues`.
    pub fn port(&self, queue: usize, queues: usize) -> CablePort {
        let inward = self.inward.iter().skip(queue).step_by(queues);
        let inward = inward.map(Rc::clone).collect();
        CablePort { out: Rc::clone(&self.out[queue]), inward, free: Vec::new(), blocked: false }
    }
}

/// Port of a queue at one end of the cable.
pub struct CablePort {
    out: Lane,
    inward: Vec<Lane>,
    /// Buffers to be used again. They keep the bytes of earlier frames.
    free: Vec<Box<[u8]>>,
    blocked: bool,
}

impl CablePort {
    /// Whether it would wake a waiting thread.
    pub fn is_ready(&self) -> bool {
        self.inward.iter().any(|lane| !lane.borrow().is_empty())
            || self.blocked && self.out.borrow().len() < DEPTH
    }
}

impl NetPort for CablePort {
    type Buf = Box<[u8]>;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<Box<[u8]>, WouldBlock> {
        self.blocked = self.out.borrow().len() >= DEPTH;
        if self.blocked {
            return Err(WouldBlock);
        }
        Ok(self.free.pop().unwrap_or_else(|| vec![0; FRAME_MAX].into()))
    }

    fn unreserve(&mut self, buf: Box<[u8]>) {
        self.free.push(buf);
    }

    fn send(&mut self, packet: Packet<Box<[u8]>>) -> Result<(), PortError> {
        self.out.borrow_mut().push_back(packet.frame().to_vec());
        self.free.push(packet.buf);
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<Box<[u8]>>> {
        let frame = self.inward.iter().find_map(|lane| lane.borrow_mut().pop_front())?;
        let len = frame.len();
        Some(Packet { buf: frame.into(), start: 0, len, offload: Offload::default() })
    }

    fn recycle(&mut self, _: Box<[u8]>) {}

    fn flush(&mut self) {}
}
