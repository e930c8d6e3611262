//! Stop requests: a signal sets a flag and wakes the main thread.

use crate::failure::Failure;
use crate::signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A wakeup that any thread may send to one in [`sleep`].
#[derive(Debug, Clone)]
pub struct Wakeup(pvio_runtime::Wakeup);

impl Wakeup {
    /// Creates one.
    ///
    /// # Errors
    /// The system is out of file descriptors.
    pub fn new() -> Result<Self, Failure> {
        let wakeup = pvio_runtime::Wakeup::new();
        let failed = |e| Failure::new(format!("an eventfd cannot be created: {e}"), "");
        wakeup.map(Self).map_err(failed)
    }

    /// Wakes the sleeping thread, now or at its next [`sleep`].
    pub fn wake(&self) {
        self.0.wake();
    }

    /// Returns whether it was signaled and not taken.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.0.is_pending()
    }

    /// Resets the wakeup and returns whether it was signaled. To be called after every sleep.
    pub fn take(&self) -> bool {
        self.0.take()
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The stop request of this process.
#[derive(Debug, Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Installs a handler for the [signals that end the process](crate::signals), which signals
    /// `wakeup`.
    ///
    /// # Errors
    /// The handler cannot be installed.
    pub fn on_signal(wakeup: Wakeup) -> Result<Self, Failure> {
        let stop = Self(Arc::new(AtomicBool::new(false)));
        let requested = stop.clone();
        signals::listen(move || {
            requested.0.store(true, Ordering::Release);
            wakeup.wake();
        })?;
        Ok(stop)
    }

    /// Returns whether a stop was requested.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Sleeps until one of `fds` is readable or the timeout expires. Returns whether one is readable; a
/// signal handler may have interrupted the sleep.
///
/// # Errors
/// The error of `poll`, except EINTR.
pub fn sleep(fds: &[BorrowedFd<'_>], time: Option<Duration>) -> Result<bool, Failure> {
    let timeout = time.map(|t| Timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    let mut fds: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    match poll(&mut fds, timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(Failure::new(format!("waiting for events failed: {e}"), "")),
    }
}
