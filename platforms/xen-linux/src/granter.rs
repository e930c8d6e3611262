//! Granting pages of this domain: see [`crate::pages`] for how a granted page replaces an ordinary
//! one.

use crate::domain::XenDomain;
use crate::pages::{Granted, Lease, Pages};
use crate::sys::memory::{Area, Held, Run, Source};
use core::sync::atomic::{AtomicBool, Ordering};
use pvio_grant_table::{Access, Busy, DomId, GrantError, GrantRef, GrantStatus, Granter};
use pvio_ring::shm::PAGE_SIZE;
use rustix::io::Errno;
use std::sync::Arc;

impl Granter for XenDomain {
    type Pages = Pages;

    /// Allocates ordinary memory. Returns [`GrantError::NotOurs`] for 0 pages, and
    /// [`GrantError::Refused`] with [`GrantStatus::PermissionDenied`] if no page can be granted
    /// here: [`XenDomain::can_grant`] returns the reason.
    fn alloc_pages(&self, count: usize) -> Result<Pages, GrantError> {
        if count == 0 {
            return Err(GrantError::NotOurs);
        }
        if self.inner().gntalloc().is_none() {
            return Err(GrantError::Refused(GrantStatus::PermissionDenied));
        }
        let len = count.checked_mul(PAGE_SIZE).ok_or(GrantError::OutOfPages)?;
        let area = Area::map(len, Source::Zeroes, true).map_err(|_| GrantError::OutOfPages)?;
        let granted = core::iter::repeat_with(AtomicBool::default).take(count).collect();
        Ok(Held::whole(Arc::new(Run::new(area, Lease { granted }))))
    }

    /// Grants a page, which replaces page number `page` and gets its contents.
    ///
    /// - Nothing else may write to the page during the call: data written between reading the
    ///   contents and writing them back is lost. Grant before sharing `pages` with another thread
    ///   or passing the page to the kernel.
    /// - A page can have one grant at a time: [`GrantStatus::BadPage`] if it is granted already.
    /// - The module parameter `limit` of xen-gntalloc bounds the granted pages of all processes of
    ///   the system (default 1024): [`GrantError::OutOfEntries`] beyond it.
    /// - It is not checked whether `peer` exists.
    fn grant(
        &self,
        peer: DomId,
        pages: &Pages,
        page: usize,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        let inner = self.inner();
        let lease = pages.run().extra.granted.get(page).ok_or(GrantError::NotOurs)?;
        let gntalloc = inner.gntalloc().ok_or(GrantError::NotOurs)?;
        if lease.swap(true, Ordering::AcqRel) {
            return Err(GrantError::Refused(GrantStatus::BadPage));
        }
        let made = gntalloc.alloc(peer, access).map_err(|why| match why {
            Errno::NOSPC => GrantError::OutOfEntries,
            Errno::NOMEM => GrantError::OutOfPages,
            _ => GrantError::Refused(GrantStatus::GeneralError),
        });
        let moved = made.and_then(|kernels| {
            match pages.exchange(page, gntalloc.source(kernels), Source::Zeroes) {
                Ok(()) => Ok(kernels),
                Err(_) => {
                    gntalloc.dealloc(kernels);
                    Err(GrantError::OutOfPages)
                }
            }
        });
        match moved {
            Ok(kernels) => {
                let granted = Granted { pages: pages.clone(), page, kernels };
                inner.granted().insert(kernels.gref, granted);
                Ok(kernels.gref)
            }
            Err(error) => {
                lease.store(false, Ordering::Release);
                Err(error)
            }
        }
    }

    /// Ends a grant. Mappings of the peer, and mappings that it can still create because of them,
    /// no longer refer to these pages. An ordinary page with the same contents replaces the granted
    /// one. As for [`grant`](Self::grant), this process must not write to the page during the call.
    ///
    /// The kernel does not report whether the peer still uses the old page. So [`Busy`] never means
    /// that; it means that the system has no memory for the new page.
    fn end_access(&self, gref: GrantRef) -> Result<(), Busy> {
        let inner = self.inner();
        let mut table = inner.granted();
        let (Some(Granted { pages, page, kernels }), Some(gntalloc)) =
            (table.get(&gref), inner.gntalloc())
        else {
            return Ok(());
        };
        pages.exchange(*page, Source::Zeroes, gntalloc.source(*kernels)).map_err(|_| Busy(gref))?;
        gntalloc.dealloc(*kernels);
        pages.run().extra.granted[*page].store(false, Ordering::Release);
        let ended = table.remove(&gref);
        drop(table);
        // It may hold the last reference to the pages, which must not be unmapped under the lock.
        drop(ended);
        Ok(())
    }
}
