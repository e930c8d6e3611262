//! This domain.

use crate::devices::Devices;
use crate::error::OpenError;
use crate::pages::Granted;
use crate::sys::gntalloc::Gntalloc;
use crate::sys::gntdev::Gntdev;
use pvio_grant_table::{DomId, GrantRef};
use pvio_xenbus::client::Client;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The Linux domain this process runs in: its grants, its mappings, its event channels. Made to be
/// cloned, one clone for each queue: all are the same domain, and each maps through a descriptor
/// of its own, opened when it first maps.
///
/// The kernel keeps what is mapped through a descriptor in one list under one mutex, and walks it
/// in every call that maps or unmaps. With a descriptor for each queue no queue waits for another
/// there, nor pays for what another keeps mapped. (What is left to wait for is the lock of the
/// process's address space, which every `mmap` and `munmap` takes.)
#[derive(Debug)]
pub struct XenDomain {
    inner: Arc<Inner>,
    gntdev: OnceLock<Arc<Gntdev>>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    id: DomId,
    /// Whether it can map what it granted itself.
    maps_own: bool,
    pub(crate) devices: Devices,
    /// For clones that cannot open one of their own any more.
    gntdev: Arc<Gntdev>,
    gntalloc: Result<Gntalloc, OpenError>,
    pub(crate) granted: Mutex<HashMap<GrantRef, Granted>>,
}

impl XenDomain {
    /// Opens the kernel's devices, and asks xenstore which domain this is.
    ///
    /// `/dev/xen/gntdev` and `/dev/xen/evtchn` have to be there, and xenstore, as its socket or as
    /// `/dev/xen/xenbus`. `/dev/xen/gntalloc` does not: a backend grants nothing. Whoever does asks
    /// [`can_grant`](Self::can_grant). `privcmd` is never used.
    ///
    /// # Errors
    /// [`OpenError`], which says what to do.
    pub fn open() -> Result<Self, OpenError> {
        let devices = Devices::of_the_system();
        let gntdev = Arc::new(devices.gntdev()?);
        devices.evtchn()?;
        let gntalloc = devices.gntalloc();
        let inner = Inner {
            id: devices.domid()?,
            maps_own: devices.is_pv(),
            devices,
            gntdev: Arc::clone(&gntdev),
            gntalloc,
            granted: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner), gntdev: OnceLock::from(gntdev) })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.inner.id
    }

    /// A new connection to xenstore with this domain's rights; relative paths are below
    /// `/local/domain/<number>`. There may be several at a time, one for each thread, say.
    ///
    /// # Errors
    /// [`OpenError::Xenstore`].
    pub fn xenstore(&self) -> Result<Client, OpenError> {
        self.inner.devices.xenstore()
    }

    /// Whether pages can be granted here; if not, every
    /// [`alloc_pages`](pvio_grant_table::Granter::alloc_pages) is refused.
    ///
    /// # Errors
    /// Why `/dev/xen/gntalloc` could not be opened, and what to do.
    pub fn can_grant(&self) -> Result<(), &OpenError> {
        self.inner.gntalloc.as_ref().map(drop)
    }

    /// Whether pages of `domain` may be mapped here; see [`map`](pvio_grant_table::GrantMapper::map).
    pub(crate) fn maps(&self, domain: DomId) -> bool {
        self.inner.maps_own || (domain != self.inner.id && domain != DomId::SELF)
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// What this clone maps through.
    #[inline]
    pub(crate) fn gntdev(&self) -> &Arc<Gntdev> {
        self.gntdev.get_or_init(|| match self.inner.devices.gntdev() {
            Ok(own) => Arc::new(own),
            // Out of descriptors: slower, and no worse.
            Err(_) => Arc::clone(&self.inner.gntdev),
        })
    }
}

impl Clone for XenDomain {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), gntdev: OnceLock::new() }
    }
}

impl Inner {
    pub(crate) fn gntalloc(&self) -> Option<&Gntalloc> {
        self.gntalloc.as_ref().ok()
    }

    /// Nothing that is done under this lock can panic half-way.
    pub(crate) fn granted(&self) -> MutexGuard<'_, HashMap<GrantRef, Granted>> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
