//! Event channels between processes.
//!
//! An end of a channel is a port: a pending bit in the receiver's events file, and an eventfd on
//! which the receiver waits. The sender has both mapped or open, so a notification needs no request
//! to the hypervisor. The file also has the mask bits of the two-level ABI; no domain sets them.
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
//! eventfd clear, and every later S2 finds the bit set.
//!
//! # Ports that are reused
//!
//! The peer's port is stored in this domain's events file. The hypervisor writes it when ends bind
//! and close; 0 discards the event. A sender that read the port just before a change may set the
//! bit of a port that now belongs to another channel, without a wake-up of its owner. Therefore the
//! sender reads the port again afterwards. If it has changed, the sender requests the hypervisor to
//! wake the port's owner. Spurious events are possible; lost events are not.

use crate::connection::Connection;
use crate::domain::Domain;
use crate::layout::{EVENT_BITS_LEN, event_bits, link};
use crate::mem::Mapped;
use crate::protocol::{Request, Status};
use core::time::Duration;
use pvio_event_channel::{DomId, EventChannel, EventChannels, EventError, Port};
use pvio_ring::shm::full_fence;
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
    our_events: Arc<Mapped>,
    their_bits: Mapped,
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
        link(&self.our_events, self.port) != 0
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
        // If no peer is bound, a peer that binds later sees the memory written before: it gets an
        // event from the hypervisor, which is ordered after the link.
        full_fence();
        let theirs = link(&self.our_events, self.port);
        if theirs == 0 {
            return Ok(());
        }
        if event_bits(&self.their_bits).raise(Port(theirs)) {
            signal(&self.wake_them);
        }
        if link(&self.our_events, self.port) != theirs {
            // A rejection means that the other domain no longer exists.
            let kick = Request::Kick(self.remote, Port(theirs));
            self.connection.call::<0>(kick).map_err(|_| EventError::Hypervisor)?;
        }
        Ok(())
    }

    fn take(&self) -> Result<bool, EventError> {
        let mut count = [0; 8];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.wake_us, &mut count)) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(_) => return Err(EventError::Hypervisor),
        }
        Ok(event_bits(&self.our_events).take(self.port))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // If the hypervisor has ended, the port cannot be reused anyway.
        let _ = self.connection.call::<0>(Request::Close(self.port));
    }
}

impl EventChannels for Domain {
    type Channel = Channel;

    fn alloc_unbound(&self, remote: DomId) -> Result<Channel, EventError> {
        if !remote.is_real() {
            return Err(EventError::NoDomain);
        }
        self.channel(remote, Request::AllocUnbound(remote))
    }

    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Channel, EventError> {
        if !remote.is_real() {
            return Err(EventError::NoDomain);
        }
        if port.0 == 0 {
            return Err(EventError::BadPort);
        }
        self.channel(remote, Request::Bind(remote, port))
    }
}

impl Domain {
    fn channel(&self, remote: DomId, request: Request) -> Result<Channel, EventError> {
        let inner = self.inner();
        let asked = inner.connection.call::<3>(request);
        let (reply, fds) = asked.map_err(|_| EventError::Hypervisor)?;
        let [wake_us, wake_them, their_events] = match (reply.status, fds) {
            (Status::Done, Some(fds)) => fds,
            (Status::NoDomain, _) => return Err(EventError::NoDomain),
            (Status::NoPorts, _) => return Err(EventError::NoPorts),
            (Status::BadPort, _) => return Err(EventError::BadPort),
            _ => return Err(EventError::Hypervisor),
        };
        let port = Port(reply.results[0]);
        let their_bits = Mapped::front(their_events, EVENT_BITS_LEN).map_err(|_| {
            let _ = inner.connection.call::<0>(Request::Close(port));
            EventError::Hypervisor
        })?;
        Ok(Channel {
            port,
            remote,
            wake_us,
            wake_them,
            our_events: Arc::clone(&inner.events),
            their_bits,
            connection: Arc::clone(&inner.connection),
        })
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
    fn kick_of_peer_wakes_owner_of_port_left_pending() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let [front, back, third] = ["front", "back", "third"].map(|name| {
            let config = DomainConfig::new(name).memory_pages(1);
            Domain::join(dir.path(), hypervisor.create_domain(config).unwrap()).unwrap()
        });
        let ours = front.alloc_unbound(back.id()).unwrap();
        let theirs = back.bind_interdomain(front.id(), ours.port()).unwrap();
        assert!(theirs.take().unwrap());
        // A sender that read the link just before it changed set the bit of this port and added to
        // another eventfd. Later senders find the bit set and do not wake its owner.
        assert!(event_bits(&back.inner().events).raise(theirs.port()));
        ours.notify().unwrap();
        let readable = || {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&theirs, PollFlags::IN)], Some(&now)).unwrap() == 1
        };
        assert!(!readable());
        let kick = |who: &Domain| {
            let kick = Request::Kick(back.id(), theirs.port());
            who.inner().connection.call::<0>(kick).unwrap().0.status
        };
        assert_eq!(
            kick(&third),
            Status::BadPort,
            "kick by a domain that is not the peer is rejected"
        );
        assert!(!readable());
        assert_eq!(kick(&front), Status::Done);
        assert!(readable() && theirs.take().unwrap());
    }
}
