//! What a worker needs of its port beyond packets: it is the one place where the worker waits.
#![forbid(unsafe_code)]

use super::NetPort;
use core::time::Duration;
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

    /// Whether there is something to [`pump`](Self::pump). Never waits, and costs next to nothing
    /// while there is not.
    ///
    /// # Errors
    /// What the system says.
    fn look(&mut self) -> io::Result<bool>;
}

/// A wrapper: who waits at it waits at the port within.
pub trait Around: NetPort {
    /// The port within, which may be a wrapper too.
    type Inner: Wait;

    /// The port within.
    fn inner(&mut self) -> &mut Self::Inner;
}

impl<T: Around> Wait for T {
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

    fn look(&mut self) -> io::Result<bool> {
        self.inner().look()
    }
}
