//! Granting pages of this domain.
//!
//! The kernel grants no page a process already has: `/dev/xen/gntalloc` makes a page and grants it
//! in one step, to one domain. Devices however allocate first, and know to whom to grant only
//! later. So pages start as ordinary memory, and when one is granted, a page of the kernel's is
//! granted instead and put into its place, contents and all; when the grant ends, an ordinary one
//! comes back.
//!
//! That the peer may go on using the old page for as long as it keeps it mapped is therefore no
//! danger to what the memory is used for next (XSA-396): it is another page, and the kernel frees
//! the old one only when the peer has let go of it, for which it looks from time to time, at a few
//! of them at once.

use crate::sys::gntalloc::GrantedPage;
use crate::sys::memory::{Held, Source};
use core::sync::atomic::AtomicBool;
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};
use rustix::io::Errno;
use std::sync::Arc;

/// Pages of this domain, contiguous in this process. They are free again when the last clone is
/// dropped and no grant to them is left.
pub type Pages = Held<Lease>;

/// Which of some [`Pages`] are granted.
#[derive(Debug)]
pub struct Lease {
    pub(crate) granted: Box<[AtomicBool]>,
}

/// A grant, and what it holds on to.
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
    /// Puts another page into the place of page number `page` and carries the contents over.
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
        // Whichever page is there now, it is a new one or came back without them.
        self.write_bytes(at, &contents).ok_or(Errno::INVAL)?;
        done
    }

    /// How many pages they are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.len() / PAGE_SIZE
    }
}
