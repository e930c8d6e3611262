//! Requests that are completed in order: packets to be sent, of one or several requests each, and
//! buffers to be filled.

use crate::search::{self, Found, Memory, Shared, search};
use pvio_ring::inflight::OrderedLog;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_ring::{BackRing, RingLayout};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

const RESPONSE: usize = 16;
/// Marks a response; no request has this bit.
const ANSWERED: u64 = 1 << 63;

/// Offset in the record of the number of complete requests.
const COMPLETE: usize = 8;

type Ring = BackRing<Memory>;
type Log = OrderedLog<Memory>;

/// A guest that makes requests 1, 2, 3… in groups.
#[derive(Clone)]
struct Guest {
    ring: HeapMemory,
    layout: RingLayout,
    /// Sizes of the groups that are still to be submitted. The requests of a group become visible
    /// together.
    groups: VecDeque<u64>,
    /// The number of the first request in the record.
    start: u64,
    /// Number of requests submitted.
    made: u64,
    consumed: u32,
    /// Number of requests with a response.
    answered: u64,
    /// The content of each packet that was sent, or each buffer that was filled, and how often.
    done: BTreeMap<u64, (u64, u32)>,
    /// Number of packets that were written into buffers.
    received: u64,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { groups, made, consumed, answered, done, received, .. } = self;
        write!(f, "{} {made} {consumed} {answered} {done:?} {received}", groups.len())
    }
}

impl Guest {
    fn slot(&self, index: u32) -> usize {
        64 + (index & (self.layout.slots() - 1)) as usize * self.layout.slot_size()
    }

    /// Records that a packet was sent, or a buffer was filled.
    fn execute(&mut self, request: u64, with: u64) {
        assert!(request > self.answered && request <= self.made, "{request} is not outstanding");
        let count = self.done.get(&request).map_or(0, |(_, count)| *count);
        self.done.insert(request, (with, count + 1));
    }
}

impl search::Guest for Guest {
    fn act(&mut self) {
        while self.consumed != self.ring.load_u32(8, Acquire).unwrap() {
            let found = self.ring.load_u64(self.slot(self.consumed), Relaxed).unwrap();
            assert_eq!(found >> 32, ANSWERED >> 32, "a slot without a response was published");
            self.answered += 1;
            let (number, with) = (found >> 16 & 0xffff, found & 0xffff);
            assert_eq!(number, self.answered, "responses not in order and once");
            let done = self.done.remove(&number).map(|(with, _)| with);
            assert_eq!(
                done,
                Some(with),
                "request {number} has a response but was not executed accordingly"
            );
            self.consumed = self.consumed.wrapping_add(1);
        }
        let mut produced = self.ring.load_u32(0, Relaxed).unwrap();
        while let Some(&size) = self.groups.front() {
            let space = self.layout.slots() - produced.wrapping_sub(self.consumed);
            if u64::from(space) < size {
                break;
            }
            for left in (0..size).rev() {
                self.made += 1;
                self.ring.store_u64(self.slot(produced), self.made << 8 | left, Relaxed);
                produced = produced.wrapping_add(1);
            }
            self.ring.store_u32(0, produced, Release);
            self.groups.pop_front();
        }
    }

    fn is_done(&self) -> bool {
        self.groups.is_empty() && self.answered == self.made
    }
}

#[derive(Clone, Debug)]
struct Process {
    log: Log,
    /// Packets that were taken and not sent: the first request of each, and the number of its
    /// requests.
    batch: Vec<(u64, u64)>,
    /// Responses that wait until the packets are sent.
    responded: Vec<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Take,
    Deliver,
    Publish,
}

/// Sends packets.
struct Transmit;

/// Reads one slot: the request's number, and the number of requests that follow in its packet.
fn read(log: &mut Log, ring: &mut Ring) -> (u64, u64) {
    let mut slot = log.take(ring).unwrap().expect("a request");
    let word = u64::from_le_bytes(slot.read_array().unwrap());
    assert_eq!(word & ANSWERED, 0, "a response was taken for a request");
    (word >> 8, word & 0xff)
}

/// Requests that are complete in the record must not be executed again.
fn carry_out(shared: &Shared<Guest>, request: u64, with: u64) {
    let mut guest = shared.guest_mut();
    let number = guest.start + request - 1;
    assert!(number >= shared.record.load_u64(COMPLETE, Relaxed).unwrap(), "{request} was complete");
    guest.execute(request, with);
}

fn respond(log: &mut Log, request: u64, with: u64) {
    let mut response = [0; RESPONSE];
    response[..8].copy_from_slice(&(ANSWERED | request << 16 | with).to_le_bytes());
    log.respond(&response);
}

impl search::Backend for Transmit {
    type Guest = Guest;
    type Process = Process;
    type Step = Step;

    fn steps(&self, _: &Process) -> Vec<Step> {
        vec![Step::Take, Step::Deliver, Step::Publish]
    }

    fn step(&self, shared: &Shared<Guest>, process: &mut Process, step: Step) {
        let Process { log, batch, responded } = process;
        let ring = &mut shared.back_ring(log.unanswered());
        match step {
            Step::Take => {
                if log.has_requests(ring).unwrap() {
                    let (first, more) = read(log, ring);
                    for follows in 1..=more {
                        assert_eq!(
                            read(log, ring),
                            (first + follows, more - follows),
                            "one packet"
                        );
                    }
                    log.record_taken();
                    batch.push((first, more + 1));
                }
            }
            Step::Deliver => {
                for request in batch.drain(..).flat_map(|(first, len)| first..first + len) {
                    respond(log, request, 0);
                    responded.push(request);
                }
            }
            Step::Publish => {
                // The port is flushed.
                for request in responded.drain(..) {
                    carry_out(shared, request, 0);
                }
                let _ = log.publish(ring);
            }
        }
    }

    fn resume(&self, shared: &Shared<Guest>) -> Process {
        Process { log: resume(shared), batch: Vec::new(), responded: Vec::new() }
    }
}

fn resume(shared: &Shared<Guest>) -> Log {
    let mut ring = shared.back_ring(0);
    let log = Log::resume(shared.record.clone(), &ring, RESPONSE).unwrap();
    ring.resume(log.unanswered()).unwrap();
    log
}

/// Fills buffers: alternately packets of one and of two buffers.
struct Receive;

impl search::Backend for Receive {
    type Guest = Guest;
    type Process = Process;
    type Step = Step;

    fn steps(&self, _: &Process) -> Vec<Step> {
        vec![Step::Deliver, Step::Publish]
    }

    fn step(&self, shared: &Shared<Guest>, process: &mut Process, step: Step) {
        let log = &mut process.log;
        let ring = &mut shared.back_ring(log.unanswered());
        if matches!(step, Step::Publish) {
            let _ = log.publish(ring);
            return;
        }
        let packet = shared.guest().received + 1;
        let needed = 1 + (packet % 2) as u32;
        if log.waiting(ring) < needed && log.look(ring).unwrap() < needed {
            return;
        }
        // If the process dies, the packet is lost.
        shared.guest_mut().received = packet;
        let buffers: Vec<u64> = (0..needed).map(|_| read(log, ring).0).collect();
        log.record_taken();
        for buffer in buffers {
            carry_out(shared, buffer, packet);
            respond(log, buffer, packet);
        }
    }

    fn resume(&self, shared: &Shared<Guest>) -> Process {
        Transmit.resume(shared)
    }
}

fn run<B>(backend: &B, slots: u32, groups: &[u64], kills: u32, start: u32) -> Found
where
    B: search::Backend<Guest = Guest, Process = Process>,
{
    let shared = Shared::new(slots, start, |layout| Log::section_len(layout, RESPONSE));
    let guest = Guest {
        ring: shared.guest_ring(),
        layout: shared.layout,
        groups: groups.iter().copied().collect(),
        start: start.into(),
        made: 0,
        consumed: start,
        answered: 0,
        done: BTreeMap::new(),
        received: 0,
    };
    let log = Log::new(shared.record.clone(), &shared.back_ring(0), RESPONSE).unwrap();
    let process = Process { log, batch: Vec::new(), responded: Vec::new() };
    let found = search(backend, &shared, guest, process, kills);
    println!("{} states, {} with every request answered", found.states, found.complete);
    found
}

#[test]
fn packets_of_backend_killed_at_any_store_are_all_sent_and_completed() {
    assert!(run(&Transmit, 4, &[1, 3, 2, 4, 1], 3, 0).complete > 0);
}

#[test]
fn packets_of_killed_backend_are_resumed_across_index_wrap() {
    assert!(run(&Transmit, 2, &[2, 1, 2], 1, u32::MAX - 1).complete > 0);
}

#[test]
fn rx_buffers_of_backend_killed_at_any_store_are_used_once() {
    assert!(run(&Receive, 4, &[2, 3, 1, 1], 3, 0).complete > 0);
}
