//! Wake-ups of a thread through an eventfd.
#![forbid(unsafe_code)]

use crate::sync::atomic::{AtomicBool, Ordering};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// An eventfd by which any thread wakes one that watches or polls it. Notifications that were not
/// cleared count as one.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    /// Stands for the descriptor in a model.
    #[cfg(loom)]
    signal: Arc<(crate::sync::Signal, bool)>,
}

impl EventFd {
    /// Creates a non-blocking eventfd, which is clear.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn new() -> io::Result<Self> {
        Self::with(EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
    }

    /// Creates an eventfd whose [`clear`](Self::clear) waits for a notification.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn blocking() -> io::Result<Self> {
        Self::with(EventfdFlags::CLOEXEC)
    }

    fn with(flags: EventfdFlags) -> io::Result<Self> {
        Ok(Self {
            fd: eventfd(0, flags)?,
            #[cfg(loom)]
            signal: Arc::new((
                crate::sync::Signal::default(),
                !flags.contains(EventfdFlags::NONBLOCK),
            )),
        })
    }

    /// Makes the descriptor readable.
    pub fn notify(&self) {
        #[cfg(loom)]
        self.signal.0.notify();
        // The write fails only if the counter is at its limit, and then the descriptor is readable.
        #[cfg(not(loom))]
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, &1_u64.to_ne_bytes()));
    }

    /// Makes the descriptor unreadable. It may be clear already, unless it is a
    /// [blocking](Self::blocking) one.
    pub fn clear(&self) {
        #[cfg(loom)]
        {
            if self.signal.1 {
                self.signal.0.wait();
            }
            self.signal.0.clear();
        }
        #[cfg(not(loom))]
        let _ = rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut [0_u8; 8]));
    }

    /// Returns a second descriptor of the same eventfd, to [watch](crate::WaitPoint::watch).
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn to_fd(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Returns a second handle of the same eventfd.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.to_fd()?,
            #[cfg(loom)]
            signal: Arc::clone(&self.signal),
        })
    }

    /// Waits in a model until the descriptor is readable.
    #[cfg(loom)]
    pub fn wait(&self) {
        self.signal.0.wait();
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A wake-up that any thread sends to one that polls the descriptor. Sending it again before it was
/// taken costs no system call.
#[derive(Clone, Debug)]
pub struct Wakeup(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: EventFd,
    pending: AtomicBool,
}

impl Wakeup {
    /// Creates a wake-up that is not pending.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner { event: EventFd::new()?, pending: AtomicBool::new(false) })))
    }

    /// Wakes the polling thread, now or at its next wait.
    pub fn wake(&self) {
        if !self.0.pending.swap(true, Ordering::AcqRel) {
            self.0.event.notify();
        }
    }

    /// Returns whether it was sent and not taken.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.0.pending.load(Ordering::Acquire)
    }

    /// Resets the wake-up and returns whether it was sent. Everything done before
    /// [`wake`](Self::wake) is visible afterwards. To be called after every wait: `wake` sets the
    /// flag before it makes the descriptor readable, so the descriptor can be readable although the
    /// flag was already taken.
    pub fn take(&self) -> bool {
        // The descriptor is cleared first: a `wake` after the exchange makes it readable again.
        self.0.event.clear();
        self.0.pending.swap(false, Ordering::AcqRel)
    }

    /// Waits in a model until the descriptor is readable.
    #[cfg(loom)]
    pub fn wait(&self) {
        self.0.event.wait();
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    #[test]
    fn eventfd_is_readable_from_a_notification_until_it_is_cleared() {
        let event = EventFd::new().unwrap();
        let readable = || {
            let mut files = [PollFd::new(&event, PollFlags::IN)];
            poll(&mut files, Some(&Timespec::default())).unwrap() > 0
        };
        event.clear();
        assert!(!readable());
        event.notify();
        event.try_clone().unwrap().notify();
        assert!(readable());
        event.clear();
        assert!(!readable());
    }

    #[test]
    fn blocking_eventfd_waits_for_a_notification() {
        let event = EventFd::blocking().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| event.notify());
            event.clear();
        });
    }
}
