//! The search: every step of a backend, with the guest acting at any store of it, and the process
//! killed at any store.

use pvio_ring::shm::{HeapMemory, Region, SharedMemory, Watched};
use pvio_ring::{BackRing, RingLayout};
use std::cell::{Cell, Ref, RefCell, RefMut};
use std::collections::HashSet;
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// A correct guest, and all other state that persists when the backend's process dies.
pub trait Guest: Clone + Debug {
    /// Reads the responses that are visible, then submits as many requests as there is room for.
    fn act(&mut self);

    /// Returns whether every request was submitted and has a response.
    fn is_done(&self) -> bool;
}

/// The code under search.
pub trait Backend {
    type Guest: Guest + 'static;
    type Process: Clone + Debug;
    type Step: Copy;

    /// Returns the possible next steps of the process.
    fn steps(&self, process: &Self::Process) -> Vec<Self::Step>;

    fn step(&self, shared: &Shared<Self::Guest>, process: &mut Self::Process, step: Self::Step);

    /// Another process takes over.
    fn resume(&self, shared: &Shared<Self::Guest>) -> Self::Process;
}

/// Actions before each store: a step of the guest, or the end of the process.
struct Stores<G> {
    seen: Cell<usize>,
    /// The store at which the process is killed.
    kill_at: Cell<Option<usize>>,
    /// The store at which the guest acts.
    guest_at: Cell<Option<usize>>,
    guest: RefCell<Option<G>>,
}

/// Memory that reports every store.
pub type Memory = Watched<HeapMemory>;

struct Killed;

thread_local! {
    /// The function that is called before each store.
    static ON_STORE: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
}

impl<G: Guest> Stores<G> {
    fn before(&self) {
        let n = self.seen.replace(self.seen.get() + 1);
        if self.guest_at.get() == Some(n)
            && let Some(guest) = self.guest.borrow_mut().as_mut()
        {
            guest.act();
        }
        if self.kill_at.get() == Some(n) {
            resume_unwind(Box::new(Killed));
        }
    }
}

/// The memory of guest, backend and record.
pub struct Shared<G> {
    pub ring: Memory,
    pub record: Memory,
    pub layout: RingLayout,
    stores: Rc<Stores<G>>,
}

impl<G: Guest + 'static> Shared<G> {
    /// Creates a ring of 2 or 4 slots whose indices are at `start`, and a record of the given size
    /// in bytes.
    pub fn new(slots: u32, start: u32, record: impl FnOnce(RingLayout) -> usize) -> Self {
        let slot_size = [(2, 1344), (4, 1008)].iter().find(|(n, _)| *n == slots).unwrap().1;
        let layout = RingLayout::new(4096, slot_size).unwrap();
        assert_eq!(layout.slots(), slots);
        let stores = Rc::new(Stores {
            seen: Cell::new(0),
            kill_at: Cell::new(None),
            guest_at: Cell::new(None),
            guest: RefCell::new(None),
        });
        let called = Rc::clone(&stores);
        ON_STORE.set(Some(Rc::new(move || called.before())));
        let before = || {
            let call = ON_STORE.with_borrow(Clone::clone);
            call.iter().for_each(|call| call());
        };
        let watched = |pages| Watched::new(HeapMemory::pages(pages), Arc::new(before));
        let (ring, record) = (watched(1), watched(record(layout).div_ceil(4096)));
        for index in [0, 8] {
            ring.inner().store_u32(index, start, Relaxed);
        }
        Self { ring, record, layout, stores }
    }

    /// Returns the ring as mapped by the guest.
    pub fn guest_ring(&self) -> HeapMemory {
        self.ring.inner().clone()
    }

    /// Returns the backend's ring. Between two steps everything published is visible, so its state
    /// can be derived.
    pub fn back_ring(&self, taken: u32) -> BackRing<Memory> {
        let mut ring = BackRing::attach(self.ring.clone(), self.layout.slot_size()).unwrap();
        ring.resume(taken).unwrap();
        ring
    }

    pub fn guest(&self) -> Ref<'_, G> {
        Ref::map(self.stores.guest.borrow(), |guest| guest.as_ref().unwrap())
    }

    pub fn guest_mut(&self) -> RefMut<'_, G> {
        RefMut::map(self.stores.guest.borrow_mut(), |guest| guest.as_mut().unwrap())
    }
}

/// All state that persists when the process dies, and the process, if there is one.
#[derive(Clone)]
struct State<G, P> {
    ring: Vec<u8>,
    record: Vec<u8>,
    guest: G,
    process: Option<P>,
    kills: u32,
}

/// Number of states found, and number of those in which every request has a response.
pub struct Found {
    pub states: usize,
    pub complete: usize,
}

type StateOf<B> = State<<B as Backend>::Guest, <B as Backend>::Process>;

/// Visits all states reachable from the first one, with the process killed up to `kills` times.
pub fn search<B: Backend>(
    backend: &B,
    shared: &Shared<B::Guest>,
    guest: B::Guest,
    process: B::Process,
    kills: u32,
) -> Found {
    let search = Search { backend, shared, kills };
    let mut open = vec![search.state(guest, Some(process), 0)];
    let (mut seen, mut complete) = (HashSet::new(), 0);
    while let Some(state) = open.pop() {
        for next in search.follow(&state) {
            if seen.insert(search.key(&next)) {
                complete += usize::from(next.guest.is_done());
                open.push(next);
            }
        }
    }
    Found { states: seen.len(), complete }
}

struct Search<'a, B: Backend> {
    backend: &'a B,
    shared: &'a Shared<B::Guest>,
    kills: u32,
}

impl<B: Backend> Search<'_, B> {
    fn state(&self, guest: B::Guest, process: Option<B::Process>, kills: u32) -> StateOf<B> {
        let bytes = |memory: &HeapMemory| {
            let mut bytes = vec![0; memory.len()];
            memory.read_bytes(0, &mut bytes).unwrap();
            bytes
        };
        let (ring, record) = (bytes(self.shared.ring.inner()), bytes(self.shared.record.inner()));
        State { ring, record, guest, process, kills }
    }

    /// Returns all successors of a state, for each store of the step that leads there.
    fn follow(&self, state: &StateOf<B>) -> Vec<StateOf<B>> {
        let mut next = Vec::new();
        let steps = match &state.process {
            None => vec![None],
            Some(process) => self.backend.steps(process).into_iter().map(Some).collect(),
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

    fn restore(&self, state: &StateOf<B>) {
        self.shared.ring.inner().write_bytes(0, &state.ring).unwrap();
        self.shared.record.inner().write_bytes(0, &state.record).unwrap();
    }

    /// Executes one step, with the guest acting at one store of it and the process killed at
    /// another.
    fn run(
        &self,
        state: &StateOf<B>,
        step: Option<B::Step>,
        guest_at: Option<usize>,
        kill_at: Option<usize>,
        next: &mut Vec<StateOf<B>>,
    ) -> usize {
        self.restore(state);
        let stores = &self.shared.stores;
        *stores.guest.borrow_mut() = Some(state.guest.clone());
        stores.seen.set(0);
        stores.guest_at.set(guest_at);
        stores.kill_at.set(kill_at);
        let ran = catch_unwind(AssertUnwindSafe(|| match (step, state.process.clone()) {
            (Some(step), Some(mut process)) => {
                self.backend.step(self.shared, &mut process, step);
                process
            }
            _ => self.backend.resume(self.shared),
        }));
        stores.guest_at.set(None);
        stores.kill_at.set(None);
        let guest = stores.guest.borrow_mut().take().unwrap();
        match ran {
            Ok(process) => next.push(self.state(guest, Some(process), state.kills)),
            Err(cause) if cause.is::<Killed>() => {
                next.push(self.state(guest, None, state.kills + 1));
            }
            Err(cause) => resume_unwind(cause),
        }
        stores.seen.get()
    }

    /// Returns a key that identifies a state.
    fn key(&self, state: &StateOf<B>) -> Vec<u8> {
        let State { guest, process, kills, .. } = state;
        let mut key = format!("{guest:?} {process:?} {kills}").into_bytes();
        key.extend(&state.ring[..16]);
        for n in 0..self.shared.layout.slots() as usize {
            key.extend(&state.ring[64 + n * self.shared.layout.slot_size()..][..16]);
        }
        // Only a few words of a record are not zero.
        for (at, word) in state.record.chunks_exact(8).enumerate() {
            if word != [0; 8] {
                key.extend((at as u16).to_ne_bytes());
                key.extend(word);
            }
        }
        key
    }
}
