//! Granting pages of this domain: see [`crate::pages`] for how a granted page takes another one's place.

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

    /// Allocates ordinary memory. [`GrantError::NotOurs`] for no pages,
    /// [`GrantError::Refused`] with [`GrantStatus::PermissionDenied`] when nothing can be granted
    /// here at all: [`XenDomain::can_grant`] says why.
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

    /// Grants a page and puts it into the place of page number `page`, with the same contents.
    ///
    /// - Nothing else may write to the page meanwhile: what is written between taking the contents
    ///   and putting them back is lost. Grant before sharing `pages` with another thread or handing
    ///   the page to the kernel.
    /// - A page can be granted once at a time: [`GrantStatus::BadPage`] when it is already.
    /// - All of a system's processes together can have as many pages granted as the module parameter
    ///   `limit` of xen-gntalloc says (1024 unless set): [`GrantError::OutOfEntries`] beyond.
    /// - That `peer` does not exist is not noticed.
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

    /// Ends a grant: whatever the peer still has mapped, or can still map because it does, is no
    /// longer these pages. An ordinary page with the same contents takes the place of the granted
    /// one; as for [`grant`](Self::grant), nothing of ours may write meanwhile.
    ///
    /// The kernel does not tell whether the peer still uses the old page, so it is never for that
    /// that this says [`Busy`], but only when the system has no memory for the new one.
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
        // It may hold the last share of the pages, which are not to be unmapped under the lock.
        drop(ended);
        Ok(())
    }
}
