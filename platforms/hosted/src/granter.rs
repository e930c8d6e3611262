//! Allocating and granting a domain's pages.

use crate::domain::Domain;
use crate::mem::hold;
use crate::pages::{Lease, Pages, Run, lock};
use pvio_grant_table::{Access, Busy, DomId, GrantError, GrantRef, GrantStatus, Granter};
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};
use std::sync::Arc;

impl Granter for Domain {
    type Pages = Pages;

    /// Returns [`GrantError::Refused`] with [`GrantStatus::PermissionDenied`] in a device process.
    fn alloc_pages(&self, count: usize) -> Result<Pages, GrantError> {
        let own = self.own().ok_or(GrantError::Refused(GrantStatus::PermissionDenied))?;
        let own = &own.memory;
        let count = u32::try_from(count).map_err(|_| GrantError::OutOfPages)?;
        if count == 0 {
            return Err(GrantError::NotOurs);
        }
        let first = lock(&own.free).take(count).ok_or(GrantError::OutOfPages)?;
        let lease = Lease(Arc::new(Run { own: Arc::clone(own), first, count }));
        let (offset, len) = (first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
        let pages = hold(lease, offset, len, true).ok_or(GrantError::NotOurs)?;
        for page in 0..count as usize {
            pages.write_bytes(page * PAGE_SIZE, &[0; PAGE_SIZE]).ok_or(GrantError::NotOurs)?;
        }
        Ok(pages)
    }

    fn grant(
        &self,
        peer: DomId,
        pages: &Pages,
        page: usize,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        let (own, lease) = (self.own().ok_or(GrantError::NotOurs)?, pages.keeper());
        let ours = Arc::ptr_eq(&lease.0.own, &own.memory) && page < pages.len() / PAGE_SIZE;
        let Ok(page) = u32::try_from(page) else { return Err(GrantError::NotOurs) };
        if !ours {
            return Err(GrantError::NotOurs);
        }
        let mut grants = lock(&own.grants);
        let gref = grants.free.pop().ok_or(GrantError::OutOfEntries)?;
        // A free entry that is in use in the table was written by another process. It is not used
        // any more.
        own.memory.memory.table().grant(gref, peer, lease.0.first + page, access)?;
        grants.held[gref.0 as usize] = Some(lease.clone());
        Ok(gref)
    }

    fn end_access(&self, gref: GrantRef) -> Result<(), Busy> {
        let Some(own) = self.own() else { return Ok(()) };
        let mut grants = lock(&own.grants);
        let Some(held) = grants.held.get_mut(gref.0 as usize) else { return Ok(()) };
        if held.is_none() {
            return Ok(());
        }
        own.memory.memory.table().end_access(gref)?;
        let lease = held.take();
        grants.free.push(gref);
        drop(grants);
        // The page may become free only now, and not under the lock.
        drop(lease);
        Ok(())
    }
}
