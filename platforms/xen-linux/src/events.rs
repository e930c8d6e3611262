//! Event channels.
//!
//! # One descriptor for each channel
//!
//! `/dev/xen/evtchn` can serve many ports through one descriptor, whose reader then tells them
//! apart. Here each channel has its own, so that it can be waited for by itself, beside other
//! things, through an io_uring.
//!
//! # What taking an event does
//!
//! When an event comes, the kernel masks the port, remembers it, and makes the descriptor readable.
//! Reading takes the port's number; *writing the number back* unmasks the port. That write is when
//! the kernel learns that the event is dealt with (a "late EOI", XSA-332): until then no further one
//! can interrupt this domain, so a peer that sends events without end gets through once for each
//! time we look, and cannot keep the CPU in its interrupt handler. [`take`](EventChannel::take) does
//! both, in this order; an event that came in between is delivered by the write.
//!
//! # Masking
//!
//! The device cannot mask a port that has no event. So what [`Channel`] shows to be waited on is an
//! epoll instance that watches the device: masking makes it watch for nothing. Events then stay
//! where they are, and can be taken.

use crate::domain::XenDomain;
use crate::sys::evtchn;
use core::time::Duration;
use pvio_event_channel::{DomId, EventChannel, EventChannels, EventError, Port};
use rustix::event::epoll;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// One end of an event channel. Its descriptor ([`AsFd`]) is readable when an event is to be
/// taken; poll it, do not read it.
#[derive(Debug)]
pub struct Channel {
    device: OwnedFd,
    /// Watches `device`, unless masked.
    watch: OwnedFd,
    port: Port,
    remote: DomId,
}

impl Channel {
    /// The domain at the other end, or that may bind to it.
    #[must_use]
    pub fn remote(&self) -> DomId {
        self.remote
    }

    /// Waits until there is an event and takes it; `false` when `timeout` passed first.
    ///
    /// # Errors
    /// As for [`take`](EventChannel::take).
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool, EventError> {
        // A timeout too long for the clock is none.
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
            match poll(&mut [PollFd::new(&self.watch, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return Err(EventError::Hypervisor),
            }
        }
    }

    fn watch_for(&self, events: epoll::EventFlags) {
        let done = epoll::modify(&self.watch, &self.device, epoll::EventData::new_u64(0), events);
        debug_assert!(done.is_ok(), "epoll: {done:?}");
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<(), EventError> {
        evtchn::notify(&self.device, self.port.0).map_err(|why| match why {
            Errno::NOTCONN | Errno::INVAL => EventError::Closed,
            _ => EventError::Hypervisor,
        })
    }

    fn take(&self) -> Result<bool, EventError> {
        let mut port = [0; 4];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.device, &mut port)) {
            Ok(4) => {}
            Err(Errno::AGAIN) => return Ok(false),
            _ => return Err(EventError::Hypervisor),
        }
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.device, &port)) {
            Ok(_) => Ok(true),
            Err(_) => Err(EventError::Hypervisor),
        }
    }

    fn mask(&self) {
        self.watch_for(epoll::EventFlags::empty());
    }

    fn unmask(&self) {
        self.watch_for(epoll::EventFlags::IN);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Closing the device would do it too, but only when nobody has it open any more, and
        // whoever waits on the channel may still have.
        let done = evtchn::unbind(&self.device, self.port.0);
        debug_assert!(done.is_ok(), "UNBIND: {done:?}");
    }
}

impl EventChannels for XenDomain {
    type Channel = Channel;

    /// The hypervisor does not look whether `remote` exists.
    fn alloc_unbound(&self, remote: DomId) -> Result<Channel, EventError> {
        self.channel(remote, |device| evtchn::alloc_unbound(device, remote.0.into()))
    }

    /// The hypervisor makes an event pending on the new end. The kernel may be taking it in on
    /// another CPU while this one returns from binding; it is waited for, so that it is there.
    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Channel, EventError> {
        let bind = |device: &OwnedFd| evtchn::bind_interdomain(device, remote.0.into(), port.0);
        let channel = self.channel(remote, bind)?;
        // Should it take longer than that, it comes later and wakes whoever waits: nothing is lost.
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
        let device = self.inner().devices.evtchn().map_err(|_| EventError::Hypervisor)?;
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(refusal)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&watch, &device, data, epoll::EventFlags::IN).map_err(refusal)?;
        let port = Port(bind(&device).map_err(refusal)?);
        Ok(Channel { device, watch, port, remote })
    }
}

/// `EVTCHNOP_*` and what the device adds.
fn refusal(why: Errno) -> EventError {
    match why {
        Errno::SRCH => EventError::NoDomain,
        // Ports, or the memory and descriptors that one takes.
        Errno::NOSPC | Errno::NOMEM | Errno::MFILE | Errno::NFILE => EventError::NoPorts,
        // No such port, bound already, not for us; or a security module says no.
        Errno::INVAL | Errno::NOENT | Errno::PERM | Errno::ACCESS => EventError::BadPort,
        _ => EventError::Hypervisor,
    }
}
