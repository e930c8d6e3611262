//! Event channels between processes.
//!
//! One end is a port: a pending and a mask bit in the receiver's events file, and an eventfd the
//! receiver waits on. The sender has both mapped or open too, so that to notify asks nobody.
//!
//! # No wake-up is lost
//!
//! Sender: **S1** write shared memory; **S2** set the pending bit, in one step with looking at
//! what it was; **S3** if it was clear and the port is not masked, add to the eventfd.
//! Receiver: **R1** drain the eventfd; **R2** clear the pending bit, in one step with looking at
//! what it was; **R3** if it was set, look at shared memory.
//!
//! All steps on the bits are sequentially consistent, so for any S2 one of these holds:
//!
//! - S2 found the bit set. Whoever set it has added to the eventfd, or will, or found the port
//!   masked; and R2 has not cleared it yet. So an R2 follows, and the R3 behind it sees S1.
//! - S2 found the bit clear and the port not masked. S3 adds to the eventfd *after* S2. If R1 drains
//!   it, R2 comes later than S2 and clears the bit: R3 sees S1. If an R2 cleared the bit already, its
//!   R3 sees S1, and the addition wakes the receiver once for nothing.
//! - S2 found the port masked. Unmasking clears the mask first and looks for the bit second, S2 sets
//!   the bit first and looks at the mask second: one of the two sees the other, and wakes.
//!
//! The other order, R2 before R1, loses: S2 and S3 between them leave the bit set and the eventfd
//! empty, and every later S2 finds the bit set.
//!
//! # Ports that change hands
//!
//! The port at the other end stands in our events file, written by the hypervisor as ends bind and
//! close; 0 swallows the event. A sender that read it just before it changed may set the bit of a
//! port that by now is somebody else's, without waking them; it looks again afterwards, and if the
//! port changed asks the hypervisor to wake whoever has it. Events may come for nothing; none may
//! be missing.

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

/// One end of an event channel. Its descriptor ([`AsFd`]) is readable when an event is to be
/// taken; poll it, do not read it.
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
    /// The domain at the other end, or that may bind to it.
    #[must_use]
    pub fn remote(&self) -> DomId {
        self.remote
    }

    /// Whether somebody is bound to the other end just now.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        link(&self.our_events, self.port) != 0
    }

    /// Waits until there is an event and takes it; `false` when `timeout` passed first.
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
        // What was written before is seen by whoever binds after we saw nobody bound: it gets an
        // event from the hypervisor, which is ordered behind the link.
        full_fence();
        let theirs = link(&self.our_events, self.port);
        if theirs == 0 {
            return Ok(());
        }
        if event_bits(&self.their_bits).raise(Port(theirs)) {
            signal(&self.wake_them);
        }
        if link(&self.our_events, self.port) != theirs {
            // A refusal means that the other domain is gone, and with it whom to wake.
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

    fn mask(&self) {
        event_bits(&self.our_events).mask(self.port);
    }

    fn unmask(&self) {
        if event_bits(&self.our_events).unmask(self.port) {
            signal(&self.wake_us);
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Without a hypervisor there is nobody who would hand the port out again.
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
    // The one error there is, a full counter, means that it is readable already.
    let _ = rustix::io::retry_on_intr(|| rustix::io::write(eventfd, &1_u64.to_ne_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DomainConfig, Hypervisor};

    #[test]
    fn a_kick_wakes_whoever_has_a_port_that_somebody_else_left_pending() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let [front, back, third] = ["front", "back", "third"].map(|name| {
            let config = DomainConfig::new(name).memory_pages(1);
            Domain::join(dir.path(), hypervisor.create_domain(config).unwrap()).unwrap()
        });
        let ours = front.alloc_unbound(back.id()).unwrap();
        let theirs = back.bind_interdomain(front.id(), ours.port()).unwrap();
        assert!(theirs.take().unwrap());
        // A sender that read the link just before it changed set the bit of this port and added
        // to another eventfd: from now on nobody who finds the bit set would wake it.
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
        assert_eq!(kick(&third), Status::BadPort, "a stranger wakes nobody");
        assert!(!readable());
        assert_eq!(kick(&front), Status::Done);
        assert!(readable() && theirs.take().unwrap());
    }
}
