//! Stop requests: a signal sets a flag and wakes the main thread.

use crate::failure::Failure;
use crate::signals;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A wakeup that any thread may send to one in [`sleep`] (an eventfd). Waking it again before it was
/// taken costs no system call.
#[derive(Debug, Clone)]
pub struct Wakeup(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: OwnedFd,
    pending: AtomicBool,
}

impl Wakeup {
    /// Creates one.
    ///
    /// # Errors
    /// The system is out of file descriptors.
    pub fn new() -> Result<Self, Failure> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = eventfd(0, flags)
            .map_err(|e| Failure::new(format!("an eventfd cannot be created: {e}"), ""))?;
        Ok(Self(Arc::new(Inner { event, pending: AtomicBool::new(false) })))
    }

    /// Wakes the sleeping thread, now or at its next [`sleep`].
    pub fn wake(&self) {
        if !self.0.pending.swap(true, Ordering::AcqRel) {
            // Fails only if the counter is full, in which case the descriptor is readable as well.
            let _ = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
        }
    }

    /// Returns whether it was signaled and not taken.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.0.pending.load(Ordering::Acquire)
    }

    /// Resets the wakeup and returns whether it was signaled. Everything done before `wake` is visible
    /// afterwards. To be called after every sleep: `wake` sets the flag before it writes to the
    /// descriptor, so the descriptor can be readable although the flag was already taken.
    pub fn take(&self) -> bool {
        // The descriptor is read first: a `wake` after this writes to it again.
        let _ = rustix::io::read(&self.0.event, &mut [0; 8]);
        self.0.pending.swap(false, Ordering::AcqRel)
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
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
