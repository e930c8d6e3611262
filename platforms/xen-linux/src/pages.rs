//! Granting pages of this domain.
//!
//! The kernel cannot grant an existing page of a process: `/dev/xen/gntalloc` allocates a page and
//! grants it in one step, to one domain. Devices, however, allocate first and know the peer only
//! later. So pages start as ordinary memory. A grant replaces a page by a granted one of the kernel
//! with the same contents. The end of the grant replaces it by an ordinary page.
//!
//! The peer may use the old page for as long as it has it mapped. That does not affect later uses
//! of the memory (XSA-396): it is another page, and the kernel frees the old one only after the
//! peer has unmapped it, which the kernel checks periodically for a few pages at a time.

use crate::sys::gntalloc::GrantedPage;
use crate::sys::memory::{Held, Source};
use core::sync::atomic::AtomicBool;
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};
use rustix::io::Errno;
use std::sync::Arc;

/// Pages of this domain, contiguous in this process. They are freed when the last clone is dropped
/// and no grant to them is left.
pub type Pages = Held<Lease>;

/// Grant state of the pages of some [`Pages`].
#[derive(Debug)]
pub struct Lease {
    pub(crate) granted: Box<[AtomicBool]>,
}

/// Grant, with the pages that it keeps allocated.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) pages: Pages,
    pub(crate) page: usize,
    pub(crate) kernels: GrantedPage,
}

impl Clone for Pages {
    fn clone(&self) -> Self {
        Self::whole(Arc::clone(self.run()))
    }
}

impl Pages {
    /// Replaces page number `page` by another page with the same contents.
    pub(crate) fn exchange(
        &self,
        page: usize,
        new: Source<'_>,
        old: Source<'_>,
    ) -> Result<(), Errno> {
        let at = page * PAGE_SIZE;
        let mut contents = [0; PAGE_SIZE];
        self.read_bytes(at, &mut contents).ok_or(Errno::INVAL)?;
        let done = self.run().area().replace(at, PAGE_SIZE, new, old);
        // Even after a failed replacement, the page may be a new one without the contents.
        self.write_bytes(at, &contents).ok_or(Errno::INVAL)?;
        done
    }

    /// Returns the number of pages.
    #[must_use]
    pub fn count(&self) -> usize {
        self.len() / PAGE_SIZE
    }
}
