//! The pages of a domain: handing them out, and granting them.

use crate::domain::Domain;
use crate::layout::Memory;
use crate::mem::{Held, Keeper, Mapped, hold};
use pvio_grant_table::{Access, Busy, DomId, GrantError, GrantRef, Granter};
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Pages of this domain, contiguous. They are free again when the last clone is dropped and no
/// grant to them is left.
pub type Pages = Held<Lease>;

/// Keeps [`Pages`] from being handed out again.
#[derive(Clone, Debug)]
pub struct Lease(Arc<Run>);

#[derive(Debug)]
struct Run {
    own: Arc<OwnMemory>,
    first: u32,
    count: u32,
}

impl Drop for Run {
    fn drop(&mut self) {
        lock(&self.own.free).give_back(self.first, self.count);
    }
}

// SAFETY: the mapping is a field of an `Arc` that nothing replaces.
#[allow(unsafe_code)]
unsafe impl Keeper for Lease {
    fn memory(&self) -> &Mapped {
        &self.0.own.memory.mapped
    }
}

/// A domain's own memory, and which of its pages are free.
#[derive(Debug)]
pub(crate) struct OwnMemory {
    pub(crate) memory: Memory,
    free: Mutex<FreeRuns>,
}

impl OwnMemory {
    pub(crate) fn new(memory: Memory) -> Self {
        let frames = memory.frames;
        let mut free = FreeRuns::default();
        free.give_back(frames.first(), frames.total() - frames.first());
        Self { memory, free: Mutex::new(free) }
    }
}

/// Free frames, as runs: first frame → how many. Neighbouring runs are always joined.
#[derive(Debug, Default)]
struct FreeRuns(BTreeMap<u32, u32>);

impl FreeRuns {
    /// The first run long enough.
    fn take(&mut self, count: u32) -> Option<u32> {
        let (&first, &len) = self.0.iter().find(|(_, len)| **len >= count)?;
        self.0.remove(&first);
        if len > count {
            self.0.insert(first + count, len - count);
        }
        Some(first)
    }

    fn give_back(&mut self, mut first: u32, mut count: u32) {
        if let Some((&before, &len)) = self.0.range(..first).next_back() {
            debug_assert!(before + len <= first, "freed twice");
            if before + len == first {
                self.0.remove(&before);
                (first, count) = (before, count + len);
            }
        }
        if let Some(len) = self.0.remove(&(first + count)) {
            count += len;
        }
        self.0.insert(first, count);
    }
}

/// The references of a domain: which are free, and what each one in use holds on to.
#[derive(Debug)]
pub(crate) struct Grants {
    free: Vec<GrantRef>,
    held: Vec<Option<Lease>>,
}

impl Grants {
    pub(crate) fn new(entries: u32) -> Self {
        let held = std::iter::repeat_with(|| None).take(entries as usize).collect();
        Self { free: (GrantRef::FIRST_FREE.0..entries).rev().map(GrantRef).collect(), held }
    }
}

impl Granter for Domain {
    type Pages = Pages;

    fn alloc_pages(&self, count: usize) -> Result<Pages, GrantError> {
        let own = &self.inner().own;
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
        let (inner, lease) = (self.inner(), pages.keeper());
        let ours = Arc::ptr_eq(&lease.0.own, &inner.own) && page < pages.len() / PAGE_SIZE;
        let Ok(page) = u32::try_from(page) else { return Err(GrantError::NotOurs) };
        if !ours {
            return Err(GrantError::NotOurs);
        }
        let mut grants = lock(&inner.grants);
        let gref = grants.free.pop().ok_or(GrantError::OutOfEntries)?;
        // A free entry that is not free was written by somebody else: it is left alone for good.
        inner.own.memory.table().grant(gref, peer, lease.0.first + page, access)?;
        grants.held[gref.0 as usize] = Some(lease.clone());
        Ok(gref)
    }

    fn end_access(&self, gref: GrantRef) -> Result<(), Busy> {
        let inner = self.inner();
        let mut grants = lock(&inner.grants);
        let Some(held) = grants.held.get_mut(gref.0 as usize) else { return Ok(()) };
        if held.is_none() {
            return Ok(());
        }
        inner.own.memory.table().end_access(gref)?;
        let lease = held.take();
        grants.free.push(gref);
        drop(grants);
        // Only now may the page become free, and not under the lock.
        drop(lease);
        Ok(())
    }
}

/// Nothing that is done under these locks can panic half-way.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_again_in_whatever_order_they_return() {
        let mut free = FreeRuns::default();
        free.give_back(9, 8);
        let taken: Vec<u32> = (0..4).map(|_| free.take(2).unwrap()).collect();
        assert_eq!(taken, [9, 11, 13, 15]);
        assert_eq!(free.take(1), None);
        for first in [11, 15, 9, 13] {
            free.give_back(first, 2);
        }
        assert_eq!(free.0, BTreeMap::from([(9, 8)]));
        assert_eq!(free.take(9), None);
        assert_eq!(free.take(8), Some(9));
    }
}
