//! Engines as wait points: a worker waits **only** on its engine, whatever the storage is.
//!
//! [`UringEngine`](super::uring::UringEngine) waits with the io_uring that does its I/O. Every other
//! engine does its I/O elsewhere (threads, a socket, memory) and is wrapped in a [`Waiting`], whose
//! io_uring only waits: for the worker's watches, and for the engine's completions.

use super::clock::sooner;
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{WaitPoint, Watch, WatchRing};
use std::boxed::Box;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// An engine that is also the wait point of its worker. A wait also ends when an operation completes.
/// [`BlockEngine::reap`] finds out which watches have [fired](WaitPoint::fired).
pub trait WaitEngine<B>: BlockEngine<B> + WaitPoint {
    /// [Waits](WaitPoint::wait) at most until the engine's own [deadline](BlockEngine::deadline).
    ///
    /// # Errors
    /// The error of `io_uring_enter`.
    fn wait_due(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.wait(sooner(timeout, self.deadline()))
    }
}

impl<B, E: BlockEngine<B> + WaitPoint> WaitEngine<B> for E {}

/// An engine of one queue for any kind of storage. A worker waits with
/// [`wait_due`](WaitEngine::wait_due), which also ends at the engine's own deadline.
pub type DiskEngine<B> = Box<dyn WaitEngine<B>>;

/// Gives an io_uring to wait on to an engine without one. Must be used on the thread that created
/// it.
pub struct Waiting<E> {
    engine: E,
    ring: WatchRing,
    /// Watch of the descriptor that is readable while the engine has completions.
    completions: Option<Watch>,
}

impl<E> Waiting<E> {
    /// Wraps an engine. `completions` is readable while the engine has completions to reap;
    /// synchronous engines need none.
    ///
    /// # Errors
    /// The error of `io_uring_setup`.
    pub fn new(engine: E, completions: Option<OwnedFd>) -> io::Result<Self> {
        let mut ring = WatchRing::new()?;
        let completions = completions.map(|file| ring.watch(file)).transpose()?;
        Ok(Self { engine, ring, completions })
    }

    /// Returns the wrapped engine.
    pub fn engine(&self) -> &E {
        &self.engine
    }
}

impl<B, E: BlockEngine<B>> BlockEngine<B> for Waiting<E> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        self.engine.submit(tag, io, segments)
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.engine.register(memory)
    }

    fn kick(&mut self) {
        self.engine.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        self.engine.deadline()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.ring.reap();
        if let Some(completions) = self.completions {
            // Collected by every `reap`, which clears the descriptor.
            self.ring.fired(completions);
        }
        self.engine.reap(done);
    }
}

impl<E> WaitPoint for Waiting<E> {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.ring.watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.ring.wait(timeout)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.ring.fired(watch)
    }
}
