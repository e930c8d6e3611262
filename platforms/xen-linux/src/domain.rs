//! The domain that this process runs in.

use crate::descriptors::Descriptors;
use crate::devices::Devices;
use crate::error::OpenError;
use crate::pages::Granted;
use crate::sys::gntalloc::Gntalloc;
use crate::sys::gntdev::Gntdev;
use pvio_grant_table::{DomId, GrantRef};
use pvio_xenbus::client::Client;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Linux domain that this process runs in: its grants, mappings and event channels. It is to be
/// cloned once for each queue. All clones are the same domain, and each maps through its own
/// descriptor, which is opened at its first mapping.
///
/// The kernel stores the mappings of a descriptor in one list under one mutex, and searches it in
/// every call that maps or unmaps. With a descriptor per queue, no queue waits for another one
/// there, or pays for the mappings of another one. (What remains is the lock of the process's
/// address space, which every `mmap` and `munmap` takes.)
#[derive(Debug)]
pub struct XenDomain {
    inner: Arc<Inner>,
    gntdev: OnceLock<Arc<Gntdev>>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) id: DomId,
    /// Whether it can map its own grants.
    pub(crate) maps_own: bool,
    pub(crate) descriptors: Descriptors,
    /// Descriptor for clones that cannot open their own.
    gntdev: Arc<Gntdev>,
    gntalloc: Result<Gntalloc, OpenError>,
    pub(crate) granted: Mutex<HashMap<GrantRef, Granted>>,
}

impl XenDomain {
    /// Opens the kernel's devices and reads this domain's id from xenstore.
    ///
    /// `/dev/xen/gntdev`, `/dev/xen/evtchn` and xenstore (its socket or `/dev/xen/xenbus`) are
    /// required. `/dev/xen/gntalloc` is not, since a backend does not grant pages; frontends check
    /// [`can_grant`](Self::can_grant). `privcmd` is never used.
    ///
    /// # Errors
    /// [`OpenError`], which contains the remedy.
    pub fn open() -> Result<Self, OpenError> {
        let devices = Devices::of_the_system();
        devices.evtchn()?;
        let gntalloc = devices.gntalloc();
        let (id, maps_own) = (devices.domid()?, devices.is_pv());
        Self::from_parts(id, maps_own, Descriptors::System(devices), gntalloc)
    }

    /// Makes a domain whose first gntdev descriptor is opened or taken now.
    pub(crate) fn from_parts(
        id: DomId,
        maps_own: bool,
        descriptors: Descriptors,
        gntalloc: Result<Gntalloc, OpenError>,
    ) -> Result<Self, OpenError> {
        let gntdev = descriptors.gntdev()?;
        let shared = Arc::clone(&gntdev);
        let granted = Mutex::default();
        let inner = Inner { id, maps_own, descriptors, gntdev: shared, gntalloc, granted };
        Ok(Self { inner: Arc::new(inner), gntdev: OnceLock::from(gntdev) })
    }

    /// Returns its domain id.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.inner.id
    }

    /// Opens a connection to xenstore with this domain's permissions. Relative paths are below
    /// `/local/domain/<number>`. Several connections may be open, for example one for each thread.
    ///
    /// # Errors
    /// [`OpenError::Xenstore`]; [`OpenError::NothingToOpen`] in a device process.
    pub fn xenstore(&self) -> Result<Client, OpenError> {
        match &self.inner.descriptors {
            Descriptors::System(devices) => devices.xenstore(),
            Descriptors::Device(_) => Err(OpenError::NothingToOpen),
        }
    }

    /// Checks whether pages can be granted; if not, every
    /// [`alloc_pages`](pvio_grant_table::Granter::alloc_pages) fails.
    ///
    /// # Errors
    /// The reason why `/dev/xen/gntalloc` could not be opened, with a remedy.
    pub fn can_grant(&self) -> Result<(), &OpenError> {
        self.inner.gntalloc.as_ref().map(drop)
    }

    /// Whether pages of `domain` may be mapped here; see
    /// [`map`](pvio_grant_table::GrantMapper::map).
    pub(crate) fn maps(&self, domain: DomId) -> bool {
        self.inner.maps_own || (domain != self.inner.id && domain != DomId::SELF)
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Returns the descriptor through which this clone maps.
    #[inline]
    pub(crate) fn gntdev(&self) -> &Arc<Gntdev> {
        self.gntdev.get_or_init(|| match self.inner.descriptors.gntdev() {
            Ok(own) => own,
            // No descriptor is left: the shared one is slower, but works.
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

    /// No code under this lock can panic and leave an inconsistent state.
    pub(crate) fn granted(&self) -> MutexGuard<'_, HashMap<GrantRef, Granted>> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
