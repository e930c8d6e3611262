//! Requests that complete in any order.

use crate::search::{self, Found, Memory, Shared, search};
use pvio_ring::RingLayout;
use pvio_ring::inflight::RequestLog;
use pvio_ring::shm::{HeapMemory, Region};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

const RESPONSE: usize = 16;
/// Marks a response; no request has this bit.
const ANSWERED: u64 = 1 << 63;

/// A guest with requests 1 to `last`.
#[derive(Clone)]
struct Guest {
    ring: HeapMemory,
    layout: RingLayout,
    last: u64,
    made: u64,
    consumed: u32,
    /// Requests without a response.
    open: BTreeSet<u64>,
}

impl Guest {
    fn slot(&self, index: u32) -> usize {
        64 + (index & (self.layout.slots() - 1)) as usize * self.layout.slot_size()
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {} {}", self.open, self.made, self.consumed)
    }
}

impl search::Guest for Guest {
    fn act(&mut self) {
        while self.consumed != self.ring.load_u32(8, Acquire).unwrap() {
            let found = self.ring.load_u64(self.slot(self.consumed), Relaxed).unwrap();
            assert_eq!(found & ANSWERED, ANSWERED, "a slot without a response was published");
            assert!(self.open.remove(&(found & !ANSWERED)), "response {found:x} without a request");
            self.consumed = self.consumed.wrapping_add(1);
        }
        let mut produced = self.ring.load_u32(0, Relaxed).unwrap();
        while self.made < self.last && produced.wrapping_sub(self.consumed) < self.layout.slots() {
            self.made += 1;
            self.open.insert(self.made);
            self.ring.store_u64(self.slot(produced), self.made, Relaxed);
            produced = produced.wrapping_add(1);
            self.ring.store_u32(0, produced, Release);
        }
    }

    fn is_done(&self) -> bool {
        self.made == self.last && self.open.is_empty()
    }
}

#[derive(Clone, Debug)]
struct Process {
    log: RequestLog<Memory>,
    /// Entries whose requests are being executed.
    executing: Vec<u32>,
}

/// One step of the backend.
#[derive(Clone, Copy, Debug)]
enum Step {
    Take,
    /// Completes the request with this position among those being executed.
    Complete(usize),
    Publish,
}

struct Backend;

impl search::Backend for Backend {
    type Guest = Guest;
    type Process = Process;
    type Step = Step;

    fn steps(&self, process: &Process) -> Vec<Step> {
        let completions = (0..process.executing.len()).map(Step::Complete);
        completions.chain([Step::Take, Step::Publish]).collect()
    }

    fn step(&self, shared: &Shared<Guest>, process: &mut Process, step: Step) {
        let Process { log, executing } = process;
        let ring = &mut shared.back_ring(log.entries() - log.free());
        match step {
            Step::Take => {
                if let Some((entry, mut request)) = log.take(ring).unwrap() {
                    execute(shared, u64::from_le_bytes(request.read_array().unwrap()));
                    executing.push(entry);
                }
            }
            Step::Complete(n) => {
                let entry = executing.remove(n);
                let mut request = log.request(entry).unwrap();
                let id = u64::from_le_bytes(request.read_array().unwrap());
                let mut response = [0; RESPONSE];
                response[..8].copy_from_slice(&(id | ANSWERED).to_le_bytes());
                log.complete(entry, &response);
            }
            Step::Publish => drop(log.publish(ring)),
        }
    }

    fn resume(&self, shared: &Shared<Guest>) -> Process {
        let mut ring = shared.back_ring(0);
        let resumed = RequestLog::resume(shared.record.clone(), &ring, RESPONSE).unwrap();
        ring.resume(resumed.taken).unwrap();
        for entry in &resumed.again {
            let mut request = resumed.log.request(*entry).unwrap();
            execute(shared, u64::from_le_bytes(request.read_array().unwrap()));
        }
        Process { log: resumed.log, executing: resumed.again }
    }
}

/// Only requests of the guest without a response may be executed.
fn execute(shared: &Shared<Guest>, id: u64) {
    let open = &shared.guest().open;
    assert!(open.contains(&id), "{id:x} is executed; the guest waits for {open:?}");
}

fn run(slots: u32, requests: u64, kills: u32, start: u32) -> Found {
    let shared = Shared::new(slots, start, RequestLog::<Memory>::section_len);
    let guest = Guest {
        ring: shared.guest_ring(),
        layout: shared.layout,
        last: requests,
        made: 0,
        consumed: start,
        open: BTreeSet::new(),
    };
    let log = RequestLog::new(shared.record.clone(), &shared.back_ring(0), RESPONSE).unwrap();
    search(&Backend, &shared, guest, Process { log, executing: Vec::new() }, kills)
}

#[test]
fn requests_of_killed_backend_are_resumed_across_index_wrap() {
    assert!(run(2, 3, 1, u32::MAX - 1).complete > 0);
}

#[test]
fn requests_of_backend_killed_at_any_store_are_completed_once() {
    let Found { states, complete } = run(2, 4, 3, 0);
    println!("{states} states, {complete} with every request answered");
    assert!(complete > 0);
}
