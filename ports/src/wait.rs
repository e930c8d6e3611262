//! What a worker needs of its port beyond packets: it is the one place where the worker waits.
#![forbid(unsafe_code)]

use super::NetPort;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_uring::{FileId, PrivateBuf, Uring};
use std::io;
use std::os::fd::OwnedFd;

/// Names a descriptor that is watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch(pub(super) usize);

/// A port that a thread can wait at, for packets and for whatever else it watches.
pub trait Wait: NetPort {
    /// Also wakes when this descriptor becomes readable. `None` when too many are watched.
    fn watch(&mut self, file: OwnedFd) -> Option<Watch>;

    /// Whether a watched descriptor became readable since last asked. It is watched again from
    /// then on: empty it before the next [`wait`](Self::wait).
    fn fired(&mut self, watch: Watch) -> bool;

    /// Takes what has come and finished.
    ///
    /// # Errors
    /// The port cannot go on.
    fn pump(&mut self) -> io::Result<()>;

    /// Waits until there is something to [`pump`](Self::pump), a watched descriptor becomes
    /// readable, or `timeout` is over.
    ///
    /// # Errors
    /// What the system says.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Waits for as long, so that packets gather, though one comes; a port that cannot does nothing.
    ///
    /// # Errors
    /// What the system says.
    fn gather(&mut self, time: Duration) -> io::Result<()> {
        let _ = time;
        Ok(())
    }

    /// Whether there is something to [`pump`](Self::pump). Never waits, and costs next to nothing
    /// while there is not.
    ///
    /// # Errors
    /// What the system says.
    fn look(&mut self) -> io::Result<bool>;
}

/// Descriptors that a port can watch.
pub(super) const WATCHES: usize = 8;

/// Descriptors watched through an io_uring.
#[derive(Debug)]
pub(super) struct Watches {
    /// What the first of them is called; the others by the numbers that follow.
    first: u64,
    all: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    file: FileId,
    armed: bool,
    fired: bool,
}

impl Watches {
    pub fn new(first: u64) -> Self {
        Self { first, all: Vec::with_capacity(WATCHES) }
    }

    pub fn add(&mut self, uring: &mut Uring<PrivateBuf>, file: OwnedFd) -> Option<Watch> {
        if self.all.len() >= WATCHES {
            return None;
        }
        let file = uring.add_file(file);
        self.all.push(Watched { file, armed: false, fired: false });
        Some(Watch(self.all.len().saturating_sub(1)))
    }

    pub fn fired(&mut self, watch: Watch) -> bool {
        self.all.get_mut(watch.0).is_some_and(|w| core::mem::take(&mut w.fired))
    }

    /// One of them became readable, the io_uring says.
    pub fn done(&mut self, token: u64) {
        let index = usize::try_from(token.saturating_sub(self.first)).unwrap_or(usize::MAX);
        if let Some(watch) = self.all.get_mut(index) {
            (watch.armed, watch.fired) = (false, true);
        }
    }

    /// Lets those stand ready that do not. There has to be a slot for each.
    pub fn arm(&mut self, uring: &mut Uring<PrivateBuf>) {
        for (token, watch) in (self.first..).zip(&mut self.all) {
            if !watch.armed && !watch.fired {
                watch.armed = uring.poll_readable(watch.file, token).is_ok();
            }
        }
    }
}

/// A wrapper: who waits at it waits at the port within.
pub trait Wrapper: NetPort {
    /// The port within, which may be a wrapper too.
    type Inner: Wait;

    /// The port within.
    fn inner(&mut self) -> &mut Self::Inner;
}

impl<T: Wrapper> Wait for T {
    fn watch(&mut self, file: OwnedFd) -> Option<Watch> {
        self.inner().watch(file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.inner().fired(watch)
    }

    fn pump(&mut self) -> io::Result<()> {
        self.inner().pump()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner().wait(timeout)
    }

    fn gather(&mut self, time: Duration) -> io::Result<()> {
        self.inner().gather(time)
    }

    fn look(&mut self) -> io::Result<bool> {
        self.inner().look()
    }
}
