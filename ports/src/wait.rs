//! Requirements of a worker on its port beyond packets: the port is the worker's only wait point.
#![forbid(unsafe_code)]

use super::NetPort;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_runtime::{FileId, PrivateBuf, Uring};
use std::io;
use std::os::fd::OwnedFd;

/// Identifies a watched descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch(pub(super) usize);

/// Port at which a thread can wait for packets and for watched descriptors.
pub trait Wait: NetPort {
    /// Adds a descriptor that ends the wait when it becomes readable. Returns `None` if too many
    /// are watched.
    fn watch(&mut self, file: OwnedFd) -> Option<Watch>;

    /// Whether a watched descriptor has become readable since the last call. The watch is armed
    /// again then: clear the descriptor before the next [`wait`](Self::wait).
    fn fired(&mut self, watch: Watch) -> bool;

    /// Processes received packets and completed operations.
    ///
    /// # Errors
    /// The port cannot continue.
    fn pump(&mut self) -> io::Result<()>;

    /// Waits until [`pump`](Self::pump) has work, a watched descriptor becomes readable, or
    /// `timeout` expires.
    ///
    /// # Errors
    /// A system error.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Waits for `time` even if packets arrive, so that packets accumulate. The default
    /// implementation returns immediately.
    ///
    /// # Errors
    /// A system error.
    fn gather(&mut self, time: Duration) -> io::Result<()> {
        let _ = time;
        Ok(())
    }

    /// Whether [`pump`](Self::pump) has work. Never waits, and is cheap if there is none.
    ///
    /// # Errors
    /// A system error.
    fn look(&mut self) -> io::Result<bool>;
}

/// Largest number of descriptors that a port can watch.
pub(super) const WATCHES: usize = 8;

/// Descriptors watched with an io_uring.
#[derive(Debug)]
pub(super) struct Watches {
    /// Token of the first descriptor; the others have the following numbers.
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

    /// Processes the completion of the poll with this token: its descriptor is readable.
    pub fn done(&mut self, token: u64) {
        let index = usize::try_from(token.saturating_sub(self.first)).unwrap_or(usize::MAX);
        if let Some(watch) = self.all.get_mut(index) {
            (watch.armed, watch.fired) = (false, true);
        }
    }

    /// Arms the polls that are not armed. There must be a slot for each.
    pub fn arm(&mut self, uring: &mut Uring<PrivateBuf>) {
        for (token, watch) in (self.first..).zip(&mut self.all) {
            if !watch.armed && !watch.fired {
                watch.armed = uring.poll_readable(watch.file, token).is_ok();
            }
        }
    }
}

/// Wrapper of a port whose waits are those of the inner port.
pub trait Wrapper: NetPort {
    /// Type of the inner port, which may be a wrapper too.
    type Inner: Wait;

    /// Returns the inner port.
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
