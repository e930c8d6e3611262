//! The in-flight record, killed at every store: all interleavings of the very code that runs with an
//! honest guest are searched. A guest must see every request answered once, and a backend must execute
//! what the guest asked for and nothing else.

use pvio_ring::inflight::RequestLog;
use pvio_ring::shm::{HeapMemory, Region, SharedMemory};
use pvio_ring::{BackRing, RingLayout};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

const RESPONSE: usize = 16;
/// Marks a response, as nothing a guest writes is marked.
const ANSWERED: u64 = 1 << 63;

/// What happens before each store: a step of the guest, or the end of the process.
#[derive(Default)]
struct Stores {
    seen: Cell<usize>,
    /// The store at which the process is killed.
    kill_at: Cell<Option<usize>>,
    /// The store at which the guest does what it can.
    guest_at: Cell<Option<usize>>,
    guest: RefCell<Option<Guest>>,
}

/// Memory that tells of every store to it.
#[derive(Clone)]
struct Watched {
    memory: HeapMemory,
    stores: Rc<Stores>,
}

struct Killed;

// SAFETY: all that matters is the heap memory's promise.
#[allow(unsafe_code, reason = "a test's own memory, which passes on its inner memory's promise")]
unsafe impl SharedMemory for Watched {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn before_store(&self) {
        let stores = &self.stores;
        let n = stores.seen.replace(stores.seen.get() + 1);
        if stores.guest_at.get() == Some(n)
            && let Some(guest) = stores.guest.borrow_mut().as_mut()
        {
            guest.act();
        }
        if stores.kill_at.get() == Some(n) {
            resume_unwind(Box::new(Killed));
        }
    }
}

/// An honest guest with requests 1 to `last`.
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

    /// Reads the responses that are visible, then makes as many requests as there is space for.
    fn act(&mut self) {
        while self.consumed != self.ring.load_u32(8, Acquire).unwrap() {
            let found = self.ring.load_u64(self.slot(self.consumed), Relaxed).unwrap();
            assert_eq!(found & ANSWERED, ANSWERED, "a slot without a response was published");
            assert!(self.open.remove(&(found & !ANSWERED)), "{found:x} answered, not asked for");
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
}

#[derive(Clone)]
struct Process {
    log: RequestLog<Watched>,
    /// Entries whose requests are being executed.
    executing: Vec<u32>,
}

/// One step of the backend.
#[derive(Clone, Copy, Debug)]
enum Step {
    Take,
    /// Number so many of those executing completes.
    Complete(usize),
    Publish,
}

/// All that outlives the process, and the process, if there is one.
#[derive(Clone)]
struct State {
    ring: Vec<u8>,
    record: Vec<u8>,
    guest: Guest,
    process: Option<Process>,
    kills: u32,
}

struct Search {
    stores: Rc<Stores>,
    ring: Watched,
    record: Watched,
    layout: RingLayout,
    kills: u32,
    seen: HashSet<Vec<u8>>,
    /// States in which every request has its one response.
    complete: usize,
}

impl Search {
    fn new(slots: u32, requests: u64, kills: u32, start: u32) -> (Self, State) {
        let slot_size = [(2, 1344), (4, 1008)].iter().find(|(n, _)| *n == slots).unwrap().1;
        let layout = RingLayout::new(4096, slot_size).unwrap();
        assert_eq!(layout.slots(), slots);
        let stores = Rc::new(Stores::default());
        let watched = |pages| Watched { memory: HeapMemory::pages(pages), stores: stores.clone() };
        let pages = RequestLog::<Watched>::section_len(layout).div_ceil(4096);
        let (ring, record) = (watched(1), watched(pages));
        for index in [0, 8] {
            ring.memory.store_u32(index, start, Relaxed);
        }
        let guest = Guest {
            ring: ring.memory.clone(),
            layout,
            last: requests,
            made: 0,
            consumed: start,
            open: BTreeSet::new(),
        };
        let back = BackRing::attach(ring.clone(), slot_size).unwrap();
        let log = RequestLog::new(record.clone(), &back, RESPONSE).unwrap();
        let process = Process { log, executing: Vec::new() };
        let search =
            Self { stores, ring, record, layout, kills, seen: HashSet::new(), complete: 0 };
        let state = search.state(guest, Some(process), 0);
        (search, state)
    }

    fn state(&self, guest: Guest, process: Option<Process>, kills: u32) -> State {
        let bytes = |memory: &HeapMemory| {
            let mut bytes = vec![0; memory.len()];
            memory.read_bytes(0, &mut bytes).unwrap();
            bytes
        };
        let (ring, record) = (bytes(&self.ring.memory), bytes(&self.record.memory));
        State { ring, record, guest, process, kills }
    }

    /// Everything that can follow a state, each at every store of the step that leads there.
    fn follow(&self, state: &State) -> Vec<State> {
        let mut next = Vec::new();
        let steps = match &state.process {
            None => vec![None],
            Some(process) => {
                let completions = (0..process.executing.len()).map(Step::Complete);
                let steps = completions.chain([Step::Take, Step::Publish]);
                steps.map(Some).collect()
            }
        };
        let mut idle = state.clone();
        self.restore(state);
        idle.guest.act();
        next.push(self.state(idle.guest, state.process.clone(), state.kills));
        for step in steps {
            let stores = self.run(state, step, None, None, &mut next);
            for guest in 0..stores {
                self.run(state, step, Some(guest), None, &mut next);
                if state.kills < self.kills {
                    for kill in guest..stores {
                        self.run(state, step, Some(guest), Some(kill), &mut next);
                    }
                }
            }
            if state.kills < self.kills {
                for kill in 0..stores {
                    self.run(state, step, None, Some(kill), &mut next);
                }
            }
        }
        next
    }

    fn restore(&self, state: &State) {
        self.ring.memory.write_bytes(0, &state.ring).unwrap();
        self.record.memory.write_bytes(0, &state.record).unwrap();
    }

    /// One step, with the guest acting at one store of it and the process killed at another.
    fn run(
        &self,
        state: &State,
        step: Option<Step>,
        guest_at: Option<usize>,
        kill_at: Option<usize>,
        next: &mut Vec<State>,
    ) -> usize {
        self.restore(state);
        *self.stores.guest.borrow_mut() = Some(state.guest.clone());
        self.stores.seen.set(0);
        self.stores.guest_at.set(guest_at);
        self.stores.kill_at.set(kill_at);
        let ran = catch_unwind(AssertUnwindSafe(|| match (step, state.process.clone()) {
            (Some(step), Some(mut process)) => {
                self.step(&mut process, step);
                process
            }
            _ => self.resume(),
        }));
        self.stores.guest_at.set(None);
        self.stores.kill_at.set(None);
        let guest = self.stores.guest.borrow_mut().take().unwrap();
        match ran {
            Ok(process) => next.push(self.state(guest, Some(process), state.kills)),
            Err(cause) if cause.is::<Killed>() => {
                next.push(self.state(guest, None, state.kills + 1));
            }
            Err(cause) => resume_unwind(cause),
        }
        self.stores.seen.get()
    }

    fn step(&self, process: &mut Process, step: Step) {
        let Process { log, executing } = process;
        // Between two steps all it has published is visible, so the rest of its ring's state follows.
        let ring = &mut BackRing::attach(self.ring.clone(), self.layout.slot_size()).unwrap();
        ring.resume(log.entries() - log.free()).unwrap();
        match step {
            Step::Take => {
                if let Some((entry, mut request)) = log.take(ring).unwrap() {
                    let id = u64::from_le_bytes(request.read_array().unwrap());
                    self.execute(id);
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

    /// Another process takes over.
    fn resume(&self) -> Process {
        let mut ring = BackRing::attach(self.ring.clone(), self.layout.slot_size()).unwrap();
        let resumed = RequestLog::resume(self.record.clone(), &ring, RESPONSE).unwrap();
        ring.resume(resumed.taken).unwrap();
        for entry in &resumed.again {
            let mut request = resumed.log.request(*entry).unwrap();
            self.execute(u64::from_le_bytes(request.read_array().unwrap()));
        }
        Process { log: resumed.log, executing: resumed.again }
    }

    /// Only what the guest asked for, and has no answer to, may be executed.
    fn execute(&self, id: u64) {
        let guest = self.stores.guest.borrow();
        let open = &guest.as_ref().unwrap().open;
        assert!(open.contains(&id), "{id:x} is executed; the guest waits for {open:?}");
    }

    /// All there is to tell two states apart.
    fn key(&self, state: &State) -> Vec<u8> {
        let mut key = format!(
            "{:?} {:?} {} {:?} {}",
            state.guest.open,
            state.guest.made,
            state.guest.consumed,
            state.kills,
            match &state.process {
                Some(p) => format!("{:?} {:?}", p.executing, p.log),
                None => String::new(),
            }
        )
        .into_bytes();
        key.extend(&state.ring[..16]);
        for n in 0..self.layout.slots() as usize {
            key.extend(&state.ring[64 + n * self.layout.slot_size()..][..16]);
        }
        key.extend(state.record.chunks(64).flat_map(|line| &line[..56]));
        key
    }

    fn run_all(mut self, start: State) -> (usize, usize) {
        let mut open = vec![start];
        while let Some(state) = open.pop() {
            for next in self.follow(&state) {
                if self.seen.insert(self.key(&next)) {
                    let guest = &next.guest;
                    if guest.made == guest.last && guest.open.is_empty() {
                        self.complete += 1;
                    }
                    open.push(next);
                }
            }
        }
        (self.seen.len(), self.complete)
    }
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

#[test]
fn indices_wrap_and_a_killed_backend_is_resumed() {
    let (search, start) = Search::new(2, 3, 1, u32::MAX - 1);
    let (_, complete) = search.run_all(start);
    assert!(complete > 0);
}

#[test]
fn two_slots_killed_at_any_store_every_request_is_answered_once() {
    let (search, start) = Search::new(2, 4, 3, 0);
    let (states, complete) = search.run_all(start);
    println!("{states} states, {complete} with every request answered");
    assert!(complete > 0);
}
