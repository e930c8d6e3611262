//! Wake-ups of a thread through an eventfd.
#![forbid(unsafe_code)]

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// An eventfd by which any thread wakes one that watches or polls it. Notifications that were not
/// cleared count as one.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Creates a non-blocking eventfd, which is clear.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Creates an eventfd whose [`clear`](Self::clear) waits for a notification.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn blocking() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC)?))
    }

    /// Makes the descriptor readable.
    pub fn notify(&self) {
        // The write fails only if the counter is at its limit, and then the descriptor is readable.
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &1_u64.to_ne_bytes()));
    }

    /// Makes the descriptor unreadable. It may be clear already, unless it is a
    /// [blocking](Self::blocking) one.
    pub fn clear(&self) {
        let _ = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut [0_u8; 8]));
    }

    /// Returns a second descriptor of the same eventfd, to [watch](crate::WaitPoint::watch).
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn to_fd(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Returns a second handle of the same eventfd.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.to_fd().map(Self)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
