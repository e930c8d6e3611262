//! Event channels.
//!
//! # One descriptor for each channel
//!
//! `/dev/xen/evtchn` can serve many ports through one descriptor, whose reader distinguishes them.
//! Here each channel has its own descriptor, so that it can be waited for separately, together with
//! other descriptors, through an io_uring.
//!
//! # Taking an event
//!
//! When an event arrives, the kernel masks the port, stores it, and makes the descriptor readable.
//! Reading returns the port's number; *writing the number back* unmasks the port. That write tells
//! the kernel that the event has been handled (a "late EOI", XSA-332). Until then, no further event
//! can interrupt this domain. So a peer that sends events continuously causes one interrupt for
//! each time this process takes an event, and cannot keep the CPU in its interrupt handler.
//! [`take`](EventChannel::take) reads and then writes; an event that arrived in between is
//! delivered by the write.

use crate::descriptors::Evtchn;
use crate::domain::XenDomain;
use crate::sys::evtchn;
use core::time::Duration;
use pvio_event_channel::{DomId, EventChannel, EventChannels, EventError, Port};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// One end of an event channel. Its descriptor ([`AsFd`]) is readable when an event is pending. It
/// must only be polled, not read.
#[derive(Debug)]
pub struct Channel {
    device: Evtchn,
    port: Port,
    remote: DomId,
}

impl Channel {
    /// Returns the domain at the other end, or the one that may bind to it.
    #[must_use]
    pub fn remote(&self) -> DomId {
        self.remote
    }

    /// Waits for an event and takes it. Returns `false` if `timeout` expired first.
    ///
    /// # Errors
    /// As for [`take`](EventChannel::take).
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool, EventError> {
        // A timeout beyond the clock's range means no timeout.
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if self.take()? {
                return Ok(true);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(self.device.fd(), PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return Err(EventError::Hypervisor),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.fd().as_fd()
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<(), EventError> {
        evtchn::notify(self.device.fd(), self.port.0).map_err(|why| match why {
            Errno::NOTCONN | Errno::INVAL => EventError::Closed,
            _ => EventError::Hypervisor,
        })
    }

    fn take(&self) -> Result<bool, EventError> {
        let mut port = [0; 4];
        match rustix::io::retry_on_intr(|| rustix::io::read(self.device.fd(), &mut port)) {
            Ok(4) => {}
            Err(Errno::AGAIN) => return Ok(false),
            _ => return Err(EventError::Hypervisor),
        }
        match rustix::io::retry_on_intr(|| rustix::io::write(self.device.fd(), &port)) {
            Ok(_) => Ok(true),
            Err(_) => Err(EventError::Hypervisor),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Closing the device would unbind too, but only after the last descriptor is closed: a
        // thread that waits for the channel may still have one, and that of a device process is
        // used again.
        let done = evtchn::unbind(self.device.fd(), self.port.0);
        debug_assert!(done.is_ok(), "UNBIND: {done:?}");
    }
}

impl EventChannels for XenDomain {
    type Channel = Channel;

    /// The hypervisor does not check whether `remote` exists.
    fn alloc_unbound(&self, remote: DomId) -> Result<Channel, EventError> {
        self.channel(remote, |device| evtchn::alloc_unbound(device, remote.0.into()))
    }

    /// The hypervisor makes an event pending on the new end. The kernel may process it on another
    /// CPU while the bind returns, so this waits until the event is visible.
    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Channel, EventError> {
        let bind = |device: &OwnedFd| evtchn::bind_interdomain(device, remote.0.into(), port.0);
        let channel = self.channel(remote, bind)?;
        // If it takes longer, the event arrives later and wakes a waiting thread; it is not lost.
        let patience = Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&channel, PollFlags::IN)], Some(&patience));
        Ok(channel)
    }
}

impl XenDomain {
    fn channel(
        &self,
        remote: DomId,
        bind: impl FnOnce(&OwnedFd) -> Result<u32, Errno>,
    ) -> Result<Channel, EventError> {
        if !remote.is_real() {
            return Err(EventError::NoDomain);
        }
        let device = self.inner().descriptors.evtchn(remote).map_err(refusal)?;
        let port = Port(bind(device.fd()).map_err(refusal)?);
        Ok(Channel { device, port, remote })
    }
}

/// Maps the errors of `EVTCHNOP_*` and those of the device.
fn refusal(why: Errno) -> EventError {
    match why {
        Errno::SRCH => EventError::NoDomain,
        // No ports are left, or no memory or descriptors for one.
        Errno::NOSPC | Errno::NOMEM | Errno::MFILE | Errno::NFILE => EventError::NoPorts,
        // The port does not exist, is bound already, or is not for this domain; or a security
        // module denied it.
        Errno::INVAL | Errno::NOENT | Errno::PERM | Errno::ACCESS => EventError::BadPort,
        _ => EventError::Hypervisor,
    }
}
