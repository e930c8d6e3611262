//! Engines a worker waits on: its **only wait point**, whatever keeps the data.
//!
//! [`UringEngine`] waits with the io_uring that does its I/O. Every other engine does its I/O
//! elsewhere (threads, a socket, memory) and is put into a [`Waiting`], whose io_uring does nothing
//! but wait: for what the worker watches, and for the engine's completions.

use super::clock::sooner;
use super::uring::{UringEngine, Watch};
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::vec::Vec;
use pvio_ring::shm::PoolMemory;
use pvio_uring::{FileId, IoBuf, PrivateBuf, Uring};
use std::boxed::Box;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Most files one wait ends for.
const WATCHES: u32 = 10;

/// An engine that is also what its worker waits on.
pub trait WaitEngine<B>: BlockEngine<B> {
    /// Makes every [`wait`](Self::wait) end when `file` is readable. At most eight.
    fn watch(&mut self, file: OwnedFd) -> Watch;

    /// Hands over what was begun and waits until an operation is done, a watched file is readable,
    /// the engine itself has [something to do](BlockEngine::deadline), or the time is over.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Whether a watched file became readable since this was last asked. Completions must have
    /// been [reaped](BlockEngine::reap).
    fn fired(&mut self, watch: Watch) -> bool;
}

/// Whatever a disk is kept in, for one queue.
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

/// Gives an engine that cannot wait an io_uring to wait on. To be used by the thread that made it.
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
    /// `completions` is readable while the engine has something to reap; engines that do all at
    /// once need none.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn new(engine: E, completions: Option<OwnedFd>) -> io::Result<Self> {
        let mut this = Self { engine, uring: Uring::new(WATCHES)?, watches: Vec::new() };
        completions.map(|file| this.add(file));
        Ok(this)
    }

    /// The engine inside.
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
