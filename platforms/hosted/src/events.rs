//! Event channels between processes.
//!
//! An end of a channel is a port: a pending bit in the page of the channel, and an eventfd on
//! which the receiver waits. The sender has both mapped or open, so a notification needs no request
//! to the hypervisor. Only the processes of the two ends have them. The page also has the mask bits
//! of the two-level ABI; no domain sets them.
//!
//! # No wake-up is lost
//!
//! Sender: **S1** write shared memory; **S2** set the pending bit and read its old value,
//! atomically; **S3** if it was clear, add to the eventfd. Receiver: **R1** clear the eventfd;
//! **R2** clear the pending bit and read its old value, atomically; **R3** if it was set, read shared
//! memory.
//!
//! All steps on the bits are sequentially consistent, so one of these holds for every S2:
//!
//! - S2 found the bit set. The thread that set it has added to the eventfd or will add to it, and R2
//!   has not cleared the bit yet. So an R2 follows, and the R3 after it sees S1.
//! - S2 found the bit clear. S3 adds to the eventfd *after* S2. If R1 clears the eventfd, R2 comes
//!   later than S2 and clears the bit: R3 sees S1. If an R2 has cleared the bit already, its R3 sees
//!   S1, and the addition causes a spurious wake-up.
//!
//! The other order, R2 before R1, loses events: S2 and S3 between them leave the bit set and the
//! eventfd clear, and every later S2 finds the bit set. A model of `pvio-event-channel` runs both
//! sides in every interleaving.
//!
//! # Ends that are bound again
//!
//! Page and eventfds belong to the channel and stay the same when an end is closed and bound again.
//! An event that was sent while no process had that end is pending for the next one. A process that
//! was killed between R1 and R2 or R3 has left the eventfd clear and the bit set, or taken the event.
//! So the hypervisor sets the bit and adds to the eventfd of an end that is bound, whatever they
//! are. Spurious events are possible; lost events are not.

use crate::connection::Connection;
use crate::domain::Domain;
use crate::layout::{ChannelPage, EndIndex};
use crate::protocol::{Request, Status};
use core::time::Duration;
use pvio_event_channel::{DomId, EventChannel, EventChannels, EventError, Port};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// One end of an event channel. Its descriptor ([`AsFd`]) is readable when an event is pending. It
/// must only be polled, not read.
#[derive(Debug)]
pub struct Channel {
    port: Port,
    remote: DomId,
    wake_us: OwnedFd,
    wake_them: OwnedFd,
    page: ChannelPage,
    end: EndIndex,
    connection: Arc<Connection>,
}

impl Channel {
    /// Returns the domain at the other end, or the one that may bind to it.
    #[must_use]
    pub fn remote(&self) -> DomId {
        self.remote
    }

    /// Whether the other end is bound.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.page.is_bound()
    }

    /// Waits for an event and takes it. Returns `false` if `timeout` expired first.
    ///
    /// # Errors
    /// As for [`take`](EventChannel::take).
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool, EventError> {
        let until = timeout.map(|timeout| std::time::Instant::now() + timeout);
        loop {
            if self.take()? {
                return Ok(true);
            }
            let left =
                until.map(|until| until.saturating_duration_since(std::time::Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.wake_us, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return Err(EventError::Hypervisor),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake_us.as_fd()
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<(), EventError> {
        self.page.send(self.end.peer(), || signal(&self.wake_them));
        Ok(())
    }

    fn take(&self) -> Result<bool, EventError> {
        self.page.receive(self.end, || {
            let mut count = [0; 8];
            match rustix::io::retry_on_intr(|| rustix::io::read(&self.wake_us, &mut count)) {
                Ok(_) | Err(Errno::AGAIN) => Ok(()),
                Err(_) => Err(EventError::Hypervisor),
            }
        })
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // If the hypervisor has ended, the port cannot be reused anyway.
        let _ = self.connection.call::<0>(&Request::Close(self.port));
    }
}

impl EventChannels for Domain {
    type Channel = Channel;

    fn alloc_unbound(&self, remote: DomId) -> Result<Channel, EventError> {
        if !remote.is_real() {
            return Err(EventError::NoDomain);
        }
        self.channel(remote, &Request::AllocUnbound(remote))
    }

    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Channel, EventError> {
        if !remote.is_real() {
            return Err(EventError::NoDomain);
        }
        if port.0 == 0 {
            return Err(EventError::BadPort);
        }
        self.channel(remote, &Request::Bind(remote, port))
    }
}

impl Domain {
    fn channel(&self, remote: DomId, request: &Request) -> Result<Channel, EventError> {
        let inner = self.inner();
        let asked = inner.connection.call::<3>(request);
        let (reply, fds) = asked.map_err(|_| EventError::Hypervisor)?;
        let [wake_us, wake_them, file] = match (reply.status, fds) {
            (Status::Done, Some(fds)) => fds,
            (Status::NoDomain, _) => return Err(EventError::NoDomain),
            (Status::NoPorts, _) => return Err(EventError::NoPorts),
            (Status::BadPort | Status::Denied, _) => return Err(EventError::BadPort),
            _ => return Err(EventError::Hypervisor),
        };
        let [port, end] = reply.results;
        let (port, end) = (Port(port), EndIndex::from_wire(end));
        let (Ok(page), Some(end)) = (ChannelPage::map(file), end) else {
            let _ = inner.connection.call::<0>(&Request::Close(port));
            return Err(EventError::Hypervisor);
        };
        let connection = Arc::clone(&inner.connection);
        Ok(Channel { port, remote, wake_us, wake_them, page, end, connection })
    }
}

/// Adds 1 to an eventfd.
pub(crate) fn signal(eventfd: &OwnedFd) {
    // The only possible error, a full counter, means that it is readable already.
    let _ = rustix::io::retry_on_intr(|| rustix::io::write(eventfd, &1_u64.to_ne_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DomainConfig, Hypervisor};

    #[test]
    fn bound_end_is_woken_even_if_event_is_pending() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let [front, back] = ["front", "back"].map(|name| {
            let config = DomainConfig::new(name).memory_pages(1);
            Domain::join(dir.path(), hypervisor.create_domain(config).unwrap()).unwrap()
        });
        let ours = front.alloc_unbound(back.id()).unwrap();
        // A process that was killed had cleared the eventfd and not the bit. Senders find the bit
        // set and add nothing.
        assert!(ours.page.raise(EndIndex::Second));
        ours.notify().unwrap();
        let theirs = back.bind_interdomain(front.id(), ours.port()).unwrap();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let readable = poll(&mut [PollFd::new(&theirs, PollFlags::IN)], Some(&now)).unwrap();
        assert!(readable == 1 && theirs.take().unwrap());
        ours.notify().unwrap();
        assert!(theirs.take().unwrap());
    }
}
