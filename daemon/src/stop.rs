//! Being told to end: a signal sets a flag and wakes whoever sleeps.

use crate::failure::Failure;
use crate::signals;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A bell any thread may ring for one that sleeps in [`sleep`]. Ringing one that rings already
/// costs no system call.
#[derive(Debug, Clone)]
pub struct Bell(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: OwnedFd,
    rings: AtomicBool,
}

impl Bell {
    /// A new one.
    ///
    /// # Errors
    /// When the system has no descriptor to give.
    pub fn new() -> Result<Self, Failure> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = eventfd(0, flags).map_err(|e| Failure::new(format!("no eventfd: {e}"), ""))?;
        Ok(Self(Arc::new(Inner { event, rings: AtomicBool::new(false) })))
    }

    /// Wakes the sleeper, now or when it next wants to sleep.
    pub fn ring(&self) {
        if !self.0.rings.swap(true, Ordering::AcqRel) {
            // Fails only when it is full, and then it wakes as well.
            let _ = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
        }
    }

    /// Whether it rings.
    #[must_use]
    pub fn is_ringing(&self) -> bool {
        self.0.rings.load(Ordering::Acquire)
    }

    /// Stops ringing, and tells whether it did. What was done before it was rung is seen after.
    /// To be called after every sleep: whoever rings sets the mark first and the descriptor second,
    /// so that the descriptor may be set with the mark taken long ago.
    pub fn take(&self) -> bool {
        // The descriptor first: whoever rings from now on, sets it again.
        let _ = rustix::io::read(&self.0.event, &mut [0; 8]);
        self.0.rings.swap(false, Ordering::AcqRel)
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

/// Whether this process was told to end.
#[derive(Debug, Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Listens for the [signals that end the process](crate::signals); `bell` is rung when one comes.
    ///
    /// # Errors
    /// When the signals cannot be listened for.
    pub fn on_signal(bell: Bell) -> Result<Self, Failure> {
        let stop = Self(Arc::new(AtomicBool::new(false)));
        let told = stop.clone();
        signals::listen(move || {
            told.0.store(true, Ordering::Release);
            bell.ring();
        })?;
        Ok(stop)
    }

    /// Whether it was.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Sleeps until one of `fds` can be read or the time is over.
///
/// # Errors
/// What the system says, other than that a signal came.
pub fn sleep(fds: &[BorrowedFd<'_>], time: Option<Duration>) -> Result<(), Failure> {
    let timeout = time.map(|t| Timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    let mut fds: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(Failure::new(format!("waiting failed: {e}"), "")),
    }
}
