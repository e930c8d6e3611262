//! Simulated processes that can be killed, or interrupted by others, between any two of their accesses.
//!
//! A process accesses its platform through [`Mortal`] wrappers. Each store to shared memory, each
//! call of grants and event channels, and each request to xenstore is a [`moment`] at which the
//! process may be killed. [`run`] kills it at the selected moment by unwinding. Shared state stays
//! unchanged from that moment on.
//!
//! At each moment, and before each load from shared memory, other participants may run: those that
//! the function passed to [`interrupted`] executes. They run to the end of what they do there. So a
//! peer can change anything that it can reach between any two accesses.
//!
//! ```
//! use pvio_ring::shm::{HeapMemory, Region};
//! use pvio_sim::kill::{Mortal, run};
//! use std::sync::atomic::Ordering::Relaxed;
//!
//! let memory = Mortal(HeapMemory::pages(1));
//! let work = || (0..4).for_each(|n| drop(memory.store_u64(8 * n, 1, Relaxed)));
//! assert_eq!(run(2, work), (None, 2));
//! assert_eq!([0, 1, 2, 3].map(|n| memory.load_u64(8 * n, Relaxed).unwrap()), [1, 1, 0, 0]);
//! assert_eq!(run(usize::MAX, work), (Some(()), 4));
//! ```
//! A peer that changes a word between two loads of it:
//! ```
//! use pvio_ring::shm::{HeapMemory, Region};
//! use pvio_sim::kill::{Mortal, interrupted};
//! use std::sync::atomic::Ordering::Relaxed;
//!
//! let memory = HeapMemory::pages(1);
//! let (mine, mut times) = (Mortal(memory.clone()), 0);
//! let peer = || {
//!     times += 1;
//!     memory.store_u64(0, times, Relaxed);
//! };
//! let seen = interrupted(peer, || [0, 0].map(|at| mine.load_u64(at, Relaxed).unwrap()));
//! assert_eq!(seen, [1, 2], "fetched twice");
//! ```
#![allow(
    unsafe_code,
    reason = "memory that passes on its inner memory's promise; a scoped function"
)]

use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::{
    Access, Busy, CopyOp, DomId, GrantCopier, GrantError, GrantMapper, GrantRef, GrantStatus,
    Granter,
};
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::wire::Op;
use pvio_xenbus::{WatchEvent, Xenstore, XsError};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::time::Duration;

thread_local! {
    /// Number of moments so far.
    static MOMENTS: Cell<usize> = const { Cell::new(0) };
    /// Moment at which this thread's process is killed.
    static KILL_AT: Cell<usize> = const { Cell::new(usize::MAX) };
    /// The function that executes other participants. It is `None` while it runs: participants that
    /// interrupt a process are not interrupted and not killed.
    static PEERS: Cell<Option<NonNull<Peers>>> = const { Cell::new(None) };
    /// Whether [`PEERS`] runs.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

type Peers = dyn FnMut();

/// In place of a moment: the process is killed before it next notifies its peer, after all that it
/// published before.
pub const BEFORE_NOTIFY: usize = usize::MAX - 1;

struct Killed;

/// Counts a moment, kills the process if it is the selected one, and lets others run.
pub fn moment() {
    if INSIDE.get() {
        return;
    }
    if MOMENTS.get() == KILL_AT.get() {
        end();
    }
    MOMENTS.set(MOMENTS.get() + 1);
    interrupt();
}

/// Lets others run, if the process may be interrupted.
fn interrupt() {
    if INSIDE.get() {
        return;
    }
    let Some(mut peers) = PEERS.take() else { return };
    INSIDE.set(true);
    // SAFETY: `interrupted` stored the pointer, and removes it before the function that it refers to is
    // dropped. It borrows that function exclusively, and here `PEERS` is `None` while it is called, so
    // it is not called by itself.
    unsafe { peers.as_mut()() };
    INSIDE.set(false);
    PEERS.set(Some(peers));
}

/// Runs a part of a process. At each of its moments and loads, `peers` is called, which may execute
/// actions of other participants.
pub fn interrupted<T>(peers: impl FnMut(), part: impl FnOnce() -> T) -> T {
    /// Removes the function when the part ends, also by unwinding.
    struct Scope(Option<NonNull<Peers>>, bool);
    impl Drop for Scope {
        fn drop(&mut self) {
            PEERS.set(self.0);
            INSIDE.set(self.1);
        }
    }
    let mut peers = peers;
    let pointer: NonNull<dyn FnMut() + '_> = NonNull::from(&mut peers);
    // SAFETY: this only extends the lifetime. `scope` removes the pointer before `peers` is dropped.
    let pointer =
        unsafe { std::mem::transmute::<NonNull<dyn FnMut() + '_>, NonNull<Peers>>(pointer) };
    let scope = Scope(PEERS.replace(Some(pointer)), INSIDE.get());
    let result = part();
    drop(scope);
    result
}

/// Kills the process, inside of [`run`].
pub fn end() -> ! {
    KILL_AT.set(usize::MAX);
    resume_unwind(Box::new(Killed))
}

/// Runs a part of a process and kills it at moment `kill_at`. Returns the result of the part, if it
/// was not killed, and the number of moments.
pub fn run<T>(kill_at: usize, part: impl FnOnce() -> T) -> (Option<T>, usize) {
    // Another process may be interrupted by this one.
    let outer = (MOMENTS.replace(0), KILL_AT.replace(kill_at));
    let outcome = catch_unwind(AssertUnwindSafe(part));
    let moments = MOMENTS.replace(outer.0);
    KILL_AT.set(outer.1);
    match outcome {
        Ok(value) => (Some(value), moments),
        Err(cause) if cause.is::<Killed>() => (None, moments),
        Err(cause) => resume_unwind(cause),
    }
}

/// Wrapper of shared memory or an interface of the platform: every use is a [`moment`].
#[derive(Clone, Debug)]
pub struct Mortal<T>(pub T);

// SAFETY: the promise of the inner memory holds, since every method is forwarded to it.
unsafe impl<M: SharedMemory> SharedMemory for Mortal<M> {
    fn base(&self) -> NonNull<u8> {
        self.0.base()
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn writable(&self) -> bool {
        self.0.writable()
    }

    fn before_load(&self) {
        interrupt();
    }

    fn before_store(&self) {
        moment();
    }
}

impl<P: Granter> Granter for Mortal<P> {
    type Pages = Mortal<P::Pages>;

    fn alloc_pages(&self, count: usize) -> Result<Self::Pages, GrantError> {
        moment();
        self.0.alloc_pages(count).map(Mortal)
    }

    fn grant(
        &self,
        peer: DomId,
        pages: &Self::Pages,
        page: usize,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        moment();
        self.0.grant(peer, &pages.0, page, access)
    }

    fn end_access(&self, gref: GrantRef) -> Result<(), Busy> {
        moment();
        self.0.end_access(gref)
    }
}

impl<P: GrantMapper> GrantMapper for Mortal<P> {
    type Mapping = Mortal<P::Mapping>;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus> {
        moment();
        self.0.map(domain, grefs, access).map(Mortal)
    }
}

impl<P: GrantCopier> GrantCopier for Mortal<P> {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        moment();
        self.0.copy(ops);
        moment();
    }
}

impl<P: EventChannels> EventChannels for Mortal<P> {
    type Channel = Mortal<P::Channel>;

    fn alloc_unbound(&self, remote: DomId) -> Result<Self::Channel, EventError> {
        moment();
        self.0.alloc_unbound(remote).map(Mortal)
    }

    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Self::Channel, EventError> {
        moment();
        self.0.bind_interdomain(remote, port).map(Mortal)
    }
}

impl<C: EventChannel> EventChannel for Mortal<C> {
    fn port(&self) -> Port {
        self.0.port()
    }

    fn notify(&self) -> Result<(), EventError> {
        if KILL_AT.get() == BEFORE_NOTIFY && !INSIDE.get() {
            end();
        }
        moment();
        self.0.notify()
    }

    fn take(&self) -> Result<bool, EventError> {
        moment();
        self.0.take()
    }
}

impl<X: Xenstore> Xenstore for Mortal<X> {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        moment();
        self.0.request(op, tx_id, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.0.poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.0.wait_event(timeout)
    }
}
