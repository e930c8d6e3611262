//! Engines as wait points: a worker waits **only** on its engine, whatever the storage is.
//!
//! [`UringEngine`] waits with the io_uring that does its I/O. Every other engine does its I/O
//! elsewhere (threads, a socket, memory) and is wrapped in a [`Waiting`], whose io_uring only
//! waits: for the worker's watches, and for the engine's completions.

use super::clock::sooner;
use super::uring::{UringEngine, Watch};
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::vec::Vec;
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{FileId, IoBuf, PrivateBuf, Uring};
use std::boxed::Box;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Maximum number of descriptors of one wait point.
const WATCHES: u32 = 10;

/// An engine that is also the wait point of its worker.
pub trait WaitEngine<B>: BlockEngine<B> {
    /// Makes every [`wait`](Self::wait) end when `file` is readable. At most eight descriptors.
    fn watch(&mut self, file: OwnedFd) -> Watch;

    /// Submits queued operations and waits until an operation completes, a watched descriptor is
    /// readable, the engine's own [deadline](BlockEngine::deadline) is reached, or the timeout
    /// expires.
    ///
    /// # Errors
    /// The error of `io_uring_enter`.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Returns whether a watched descriptor became readable since the last call. Completions must
    /// have been [reaped](BlockEngine::reap) before.
    fn fired(&mut self, watch: Watch) -> bool;
}

/// An engine of one queue for any kind of storage.
pub type DiskEngine<B> = Box<dyn WaitEngine<B>>;

impl<B: IoBuf> WaitEngine<B> for UringEngine<B> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        Self::watch(self, file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        Self::wait(self, timeout)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        Self::fired(self, watch)
    }
}

impl<B, E: WaitEngine<B> + ?Sized> WaitEngine<B> for Box<E> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        (**self).watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        (**self).wait(timeout)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        (**self).fired(watch)
    }
}

/// Gives an io_uring to wait on to an engine without one. Must be used on the thread that created
/// it.
pub struct Waiting<E> {
    engine: E,
    uring: Uring<PrivateBuf>,
    watches: Vec<Watched>,
}

struct Watched {
    file: FileId,
    armed: bool,
    fired: bool,
}

impl<E> Waiting<E> {
    /// Wraps an engine. `completions` is readable while the engine has completions to reap;
    /// synchronous engines need none.
    ///
    /// # Errors
    /// The error of `io_uring_setup`.
    pub fn new(engine: E, completions: Option<OwnedFd>) -> io::Result<Self> {
        let mut this = Self { engine, uring: Uring::new(WATCHES)?, watches: Vec::new() };
        completions.map(|file| this.add(file));
        Ok(this)
    }

    /// Returns the wrapped engine.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    fn add(&mut self, file: OwnedFd) -> Watch {
        let file = self.uring.add_file(file);
        self.watches.push(Watched { file, armed: false, fired: false });
        Watch(self.watches.len() - 1)
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
        let Self { uring, watches, .. } = self;
        uring.reap(|d| {
            if let Some(watch) = usize::try_from(d.token).ok().and_then(|i| watches.get_mut(i)) {
                (watch.armed, watch.fired) = (false, true);
            }
        });
        self.engine.reap(done);
    }
}

impl<B, E: BlockEngine<B>> WaitEngine<B> for Waiting<E> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        self.add(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        for (i, watch) in self.watches.iter_mut().enumerate().filter(|(_, w)| !w.armed) {
            watch.armed = self.uring.poll_readable(watch.file, i as u64).is_ok();
        }
        if self.uring.has_done() {
            return Ok(());
        }
        self.uring.wait(sooner(timeout, self.engine.deadline()))
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.watches.get_mut(watch.0).is_some_and(|w| core::mem::take(&mut w.fired))
    }
}
