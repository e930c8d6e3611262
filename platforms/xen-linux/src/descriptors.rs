//! Descriptors of a domain: opened when needed, or opened by another process for one device.

use crate::devices::Devices;
use crate::error::OpenError;
use crate::sys::evtchn;
use crate::sys::gntdev::Gntdev;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use pvio_grant_table::DomId;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Source of descriptors of a domain.
#[derive(Debug)]
pub(crate) enum Descriptors {
    /// Opened when needed.
    System(Devices),
    /// Opened by another process, for one device.
    Device(OfDevice),
}

/// Descriptors that another process opened.
#[derive(Debug)]
pub(crate) struct OfDevice {
    frontend: DomId,
    gntdevs: Vec<Arc<Gntdev>>,
    next: AtomicUsize,
    evtchns: Arc<EvtchnPool>,
}

impl Descriptors {
    /// Returns a gntdev descriptor for one more clone of the domain.
    pub(crate) fn gntdev(&self) -> Result<Arc<Gntdev>, OpenError> {
        match self {
            Self::System(devices) => devices.gntdev().map(Arc::new),
            Self::Device(of) => {
                let next = of.next.fetch_add(1, Ordering::Relaxed);
                let gntdev = of.gntdevs.iter().cycle().nth(next % of.gntdevs.len().max(1));
                gntdev.cloned().ok_or(OpenError::NothingToOpen)
            }
        }
    }

    /// Returns an evtchn descriptor for one channel to `remote`.
    pub(crate) fn evtchn(&self, remote: DomId) -> Result<Evtchn, Errno> {
        match self {
            Self::System(devices) => devices.evtchn().map(Evtchn::Own).map_err(|_| Errno::NODEV),
            Self::Device(of) => of.evtchn(remote),
        }
    }
}

impl OfDevice {
    pub(crate) fn new(
        frontend: DomId,
        gntdevs: Vec<Arc<Gntdev>>,
        evtchns: impl Iterator<Item = OwnedFd>,
    ) -> Self {
        let evtchns = Arc::new(EvtchnPool::new(evtchns));
        Self { frontend, gntdevs, next: AtomicUsize::new(0), evtchns }
    }

    pub(crate) fn evtchn(&self, remote: DomId) -> Result<Evtchn, Errno> {
        if self.frontend != remote {
            // The error of a kernel that restricts the descriptors.
            return Err(Errno::ACCESS);
        }
        EvtchnPool::lend(&self.evtchns).ok_or(Errno::MFILE)
    }

    #[cfg(test)]
    pub(crate) fn gntdev_at(&self, index: usize) -> &Arc<Gntdev> {
        &self.gntdevs[index]
    }
}

/// Descriptor of one event channel.
#[derive(Debug)]
pub(crate) enum Evtchn {
    /// Closed with the channel.
    Own(OwnedFd),
    /// Used again for a later channel.
    Lent(Lent),
}

impl Evtchn {
    #[inline]
    pub(crate) fn fd(&self) -> &OwnedFd {
        match self {
            Self::Own(fd) => fd,
            Self::Lent(Lent { pool, index }) => &pool.0[*index].fd,
        }
    }
}

/// Evtchn descriptors of a device.
#[derive(Debug)]
pub(crate) struct EvtchnPool(Box<[Pooled]>);

#[derive(Debug)]
struct Pooled {
    fd: OwnedFd,
    lent: AtomicBool,
}

/// Descriptor of a pool, in use until dropped. The channel must be unbound before.
#[derive(Debug)]
pub(crate) struct Lent {
    pool: Arc<EvtchnPool>,
    index: usize,
}

impl EvtchnPool {
    fn new(fds: impl Iterator<Item = OwnedFd>) -> Self {
        Self(fds.map(|fd| Pooled { fd, lent: AtomicBool::new(false) }).collect())
    }

    fn lend(pool: &Arc<Self>) -> Option<Evtchn> {
        let index = pool.0.iter().position(|one| !one.lent.swap(true, Ordering::Acquire))?;
        Some(Evtchn::Lent(Lent { pool: Arc::clone(pool), index }))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let one = &self.pool.0[self.index];
        // An event of the closed port that remains stored would be a spurious one of the next port.
        let _ = evtchn::reset(&one.fd);
        one.lent.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(count: usize) -> impl Iterator<Item = OwnedFd> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        (0..count).map(move |_| rustix::fs::memfd_create("fake", flags).unwrap())
    }

    #[test]
    fn evtchn_pool_lends_each_descriptor_once_until_dropped() {
        let pool = Arc::new(EvtchnPool::new(files(2)));
        let lend = || EvtchnPool::lend(&pool);
        let (first, second) = (lend().unwrap(), lend().unwrap());
        assert!(!std::ptr::eq(first.fd(), second.fd()) && lend().is_none());
        let fd = std::ptr::from_ref(first.fd());
        drop(first);
        assert!(std::ptr::eq(lend().unwrap().fd(), fd));
        drop(second);
    }
}
