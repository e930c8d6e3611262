//! Pages of this domain and their allocation and grants.

use crate::layout::Memory;
use crate::mem::{Held, Keeper, Mapped};
use pvio_grant_table::GrantRef;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Pages of this domain, contiguous. They are freed when the last clone is dropped and no grant to
/// them is left.
pub type Pages = Held<Lease>;

/// Keeps [`Pages`] allocated.
#[derive(Clone, Debug)]
pub struct Lease(pub(crate) Arc<Run>);

#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) own: Arc<OwnMemory>,
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl Drop for Run {
    fn drop(&mut self) {
        lock(&self.own.free).give_back(self.first, self.count);
    }
}

// SAFETY: the mapping is a field of an `Arc` that is never replaced.
#[allow(unsafe_code)]
unsafe impl Keeper for Lease {
    fn memory(&self) -> &Mapped {
        &self.0.own.memory.mapped
    }
}

/// Memory of this domain, and its free pages.
#[derive(Debug)]
pub(crate) struct OwnMemory {
    pub(crate) memory: Memory,
    pub(crate) free: Mutex<FreeRuns>,
}

impl OwnMemory {
    /// Returns the memory of which all pages are free, except those of grants that are still in
    /// use.
    pub(crate) fn new(memory: Memory, busy: &[(GrantRef, u32)]) -> Self {
        let frames = memory.frames;
        let mut free = FreeRuns::default();
        let busy = busy.iter().map(|(_, frame)| *frame).filter(|frame| frames.sharable(*frame));
        let mut first = frames.first();
        // A page may have several grants.
        for frame in busy.collect::<BTreeSet<u32>>() {
            if frame > first {
                free.give_back(first, frame - first);
            }
            first = frame + 1;
        }
        if first < frames.total() {
            free.give_back(first, frames.total() - first);
        }
        Self { memory, free: Mutex::new(free) }
    }
}

/// Free frames as runs: first frame → number of frames. Adjacent runs are always merged.
#[derive(Debug, Default)]
pub(crate) struct FreeRuns(BTreeMap<u32, u32>);

impl FreeRuns {
    /// Allocates `count` frames from the first run that is long enough.
    pub(crate) fn take(&mut self, count: u32) -> Option<u32> {
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

/// Grant references of a domain: the free ones, and the pages that each used one keeps allocated.
#[derive(Debug)]
pub(crate) struct Grants {
    pub(crate) free: Vec<GrantRef>,
    pub(crate) held: Vec<Option<Lease>>,
}

impl Grants {
    /// Returns the grants of which all are free, except those that are still in use.
    pub(crate) fn new(entries: u32, busy: &[(GrantRef, u32)]) -> Self {
        let held = std::iter::repeat_with(|| None).take(entries as usize).collect();
        let busy: BTreeSet<_> = busy.iter().map(|(gref, _)| *gref).collect();
        let all = (GrantRef::FIRST_FREE.0..entries).rev().map(GrantRef);
        Self { free: all.filter(|gref| !busy.contains(gref)).collect(), held }
    }
}

/// No code under these locks can panic and leave an inconsistent state.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_runs_returned_in_any_order_are_merged() {
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
