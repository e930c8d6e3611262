//! Simulated processes that can be killed between any two of their stores and calls.
//!
//! A process accesses its platform through [`Mortal`] wrappers. Each store to shared memory, each
//! call of grants and event channels, and each request to xenstore is a [`moment`] at which the
//! process may be killed. [`run`] kills it at the selected moment by unwinding. Shared state stays
//! unchanged from that moment on.
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
#![allow(unsafe_code, reason = "memory that passes on its inner memory's promise")]

use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
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
}

struct Killed;

/// Counts a moment and kills the process if it is the selected one.
pub fn moment() {
    if MOMENTS.get() == KILL_AT.get() {
        end();
    }
    MOMENTS.set(MOMENTS.get() + 1);
}

/// Kills the process, inside of [`run`].
pub fn end() -> ! {
    KILL_AT.set(usize::MAX);
    resume_unwind(Box::new(Killed))
}

/// Runs a part of a process and kills it at moment `kill_at`. Returns the result of the part, if it
/// was not killed, and the number of moments.
pub fn run<T>(kill_at: usize, part: impl FnOnce() -> T) -> (Option<T>, usize) {
    MOMENTS.set(0);
    KILL_AT.set(kill_at);
    let outcome = catch_unwind(AssertUnwindSafe(part));
    KILL_AT.set(usize::MAX);
    match outcome {
        Ok(value) => (Some(value), MOMENTS.get()),
        Err(cause) if cause.is::<Killed>() => (None, MOMENTS.get()),
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

    fn before_store(&self) {
        moment();
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
