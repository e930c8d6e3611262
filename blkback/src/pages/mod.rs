//! Guest pages: mapped for one request, mapped and cached, or replaced by bounce buffers.
//!
//! The requests of a poll form a `Batch`. They first declare which pages they need. The segments of
//! indirect requests are read with one call for all of them, and their pages declared. Data to be
//! written to the disk is then copied with one call for all requests, and each request takes its pages
//! or is rejected on its own. The types of the batch's states enforce this order.
//!
//! Completed operations form `Completions` and are settled together: data that was read from the
//! disk into bounce buffers is copied to the guest with one call, and all pages are released. Their
//! results, and so their responses, are available only then.
//!
//! Mappings are not batched over requests. A platform may be able to unmap only together what was
//! mapped together ([`GrantMapper::map_each`]), and a page must be unmapped before its request is
//! completed. A request's pages are therefore mapped with one call, and each cached page with a
//! separate call.
//!
//! When the cache is full, by the limit of the queue or by the [budget](MappingBudget) of its guest
//! and its process, cached mappings stay. Further pages are mapped for their request or copied,
//! depending on the [path](DataPath). Idle mappings are evicted gradually to make room. Data of a
//! page that the host cannot map for want of resources is copied on every path.
//!
//! # Memory
//! The memory that a guest can make a queue hold at a time is bounded, independent of the size of
//! its ring:
//! - guest pages in use by requests: [`PAGES_MOST`] (8 MiB of the guest's own memory). A request
//!   that would need more waits for others to finish;
//! - bounce buffers: the same number. They are allocated when data is first copied;
//! - cached mappings of guest pages: [`cached_max`], at most 4224 (16.5 MiB of the guest's own
//!   memory), with at most 150 bytes of backend memory each;
//! - lists: about 1000 bytes for each page in use (including the engine's), 2 KiB for each slot.
//!
//! Backend memory is bounce buffers + lists, at most 13.7 MiB for each queue; the test
//! `queue_memory_on_every_data_path_is_bounded` computes it.

mod batch;
mod cached;
mod completions;
mod copies;
mod maps;
mod pool;
mod request;
mod tables;

pub(crate) use batch::{Batch, Declaring, Gathered, PageRange, TableRange, TablesRead};
pub(crate) use completions::Completions;

use crate::engine::{EngineError, Segments};
use crate::path::DataPath;
use crate::stats::Stats;
use alloc::sync::Arc;
use alloc::vec::Vec;
use batch::BatchLists;
use cached::CachedPages;
use core::time::Duration;
use pool::PagePool;
use pvio_grant_table::policy::MappingBudget;
use pvio_grant_table::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
use pvio_ring::shm::{Either, PrivatePage, SharedMemory};

/// Maximum number of guest pages that all requests of a queue use at a time. The pool of bounce
/// buffers has the same size, so that every accepted request can be copied.
pub const PAGES_MOST: usize = 2048;
/// Maximum number of bounce buffers registered with the kernel, and so pinned: the first ones,
/// which are used before the others. 2 MiB, 32 requests of 64 KiB.
pub const REGISTERED_MOST: usize = 512;
/// Cached mappings of a queue of 32 slots, as in Linux's backend (`max_persistent_grants`): 33 for
/// each slot.
pub const CACHED_MIN: usize = 1056;

/// Returns the maximum number of cached mappings of a queue: 33 for each slot of its ring, at most
/// 4224.
#[must_use]
pub const fn cached_max(slots: usize) -> usize {
    let most = slots.saturating_mul(33);
    if most > 4 * CACHED_MIN {
        4 * CACHED_MIN
    } else if most < CACHED_MIN {
        CACHED_MIN
    } else {
        most
    }
}

/// The memory of an operation: a page mapped for it alone, a cached mapping, or a bounce buffer.
pub type Buf<M> = Either<M, Either<Arc<M>, PrivatePage>>;

/// Access to a guest's pages.
#[derive(Debug)]
pub(crate) struct Context<'a, P> {
    pub grants: &'a P,
    /// The guest.
    pub frontend: DomId,
    pub stats: &'a Stats,
}

impl<P> Clone for Context<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Context<'_, P> {}

impl<P: GrantMapper> Context<'_, P> {
    /// Maps one page.
    fn map(&self, gref: GrantRef, access: Access) -> Result<P::Mapping, GrantStatus> {
        self.grants.map(self.frontend, core::slice::from_ref(&gref), access)
    }

    /// Maps pages with one call, and counts them.
    fn map_each(
        &self,
        grefs: &[GrantRef],
        access: Access,
        each: &mut dyn FnMut(usize, Result<P::Mapping, GrantStatus>),
    ) {
        self.stats.mapped_pages.add(grefs.len() as u64);
        self.grants.map_each(self.frontend, grefs, access, each);
    }
}

impl<P: GrantCopier> Context<'_, P> {
    /// Copies with one call, unless the list is empty, and counts the pages.
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        if !ops.is_empty() {
            self.grants.copy(ops);
            self.stats.copied_pages.add(ops.len() as u64);
        }
    }
}

/// The reason why a step of a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StepError {
    Engine(EngineError),
    /// The guest's page could not be mapped or copied.
    Grant,
}

/// The guest pages that one queue uses.
#[derive(Debug)]
pub(crate) struct Pages<M> {
    path: DataPath,
    /// Maximum number of pages that requests may use; below it, the number still available.
    most: usize,
    free: usize,
    pool: PagePool,
    cached: CachedPages<M>,
    /// The lists of the next batch.
    lists: BatchLists<M>,
    /// The list of the next completions.
    completions: Completions<M>,
    /// Arguments of one hypercall and their indices in a batch; reused.
    grefs: Vec<GrantRef>,
    places: Vec<u32>,
    ops: Vec<CopyOp<'static>>,
}

impl<M: SharedMemory> Pages<M> {
    /// Creates the pages of a queue of `slots` requests of at most `segments` pages each. Cached
    /// mappings are also limited by the rest of the budget.
    pub fn new(path: DataPath, slots: usize, segments: usize, budget: &Arc<MappingBudget>) -> Self {
        let all = slots.saturating_mul(segments);
        let most = all.min(PAGES_MOST).max(segments.min(PAGES_MOST));
        let cached = if path.caches() { cached_max(slots) } else { 0 };
        Self {
            path,
            most,
            free: most,
            pool: PagePool::new(if path.copies() { most } else { 0 }),
            cached: CachedPages::new(cached, Arc::clone(budget)),
            lists: BatchLists::default(),
            completions: Completions::with_capacity(slots),
            grefs: Vec::new(),
            places: Vec::new(),
            ops: Vec::new(),
        }
    }

    /// Returns whether a request of `count` pages can be served now. Any request can once no page
    /// is in use.
    pub fn has_room_for(&self, count: usize) -> bool {
        count <= self.free
    }

    /// Begins the batch of a poll.
    pub fn batch(&mut self) -> Batch<M, Declaring> {
        Batch::begin(core::mem::take(&mut self.lists))
    }

    /// Returns an empty list of completed operations.
    pub fn completions(&mut self) -> Completions<M> {
        core::mem::take(&mut self.completions)
    }

    /// Releases pages of an operation that is not carried out or has completed.
    pub fn release(&mut self, segments: &mut Segments<Buf<M>>) {
        self.unreserve(segments.len());
        for seg in segments.drain(..) {
            if let Either::B(Either::B(page)) = seg.buf {
                self.pool.release(page);
            }
        }
    }

    /// Sets the current time and unmaps cached mappings that were idle for long.
    pub fn tick(&mut self, now: Duration) {
        self.cached.tick(now);
    }

    /// Returns the number of pages that requests use now.
    pub fn used(&self) -> usize {
        self.most.saturating_sub(self.free)
    }

    /// Returns the limits of pages in use by requests, of cached mappings, and of registered pages.
    pub fn limits(&self) -> [usize; 3] {
        let copied = if self.path.copies() { self.most.min(REGISTERED_MOST) } else { 0 };
        [self.most, self.cached.most(), copied]
    }

    /// Returns the number of cached mappings.
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// Counts pages as used by a request, for which there is room.
    fn reserve(&mut self, count: usize) {
        self.free = self.free.saturating_sub(count);
    }

    fn unreserve(&mut self, count: usize) {
        self.free += count;
        debug_assert!(self.free <= self.most, "more pages were released than reserved");
    }
}

#[cfg(test)]
mod tests {
    use super::request::PageRequest;
    use super::*;
    use pvio_ring::IoSeg;

    /// As large as the mapping type of any platform.
    type Mapping = [u64; 8];

    #[test]
    fn queue_memory_on_every_data_path_is_bounded() {
        let segment = size_of::<IoSeg<Buf<Mapping>>>();
        // The queue's lists, each grown to twice its need: page requests, raw segments, buffers,
        // grefs, places, copies, completed, one operation's during submission, and a barrier's.
        let each = size_of::<PageRequest>() + 8 + size_of::<Option<Buf<Mapping>>>() + 4 + 4;
        let ours = 2 * (each + size_of::<CopyOp<'_>>() + 3 * segment);
        // The io_uring engine's lists: a segment and its address, in lists of up to four times the
        // need, and spare ones, 8192 segments in all.
        let engines = 4 * (segment + 16);
        let spare = 8192 * (segment + 16);
        // For each slot: lists of 16 segments, the request, its tags. For each cached mapping: an
        // entry, up to two index slots, and the mapping with its reference counts.
        let slot = 16 * (segment + 16) + 256;
        let cached = 40 + 2 * 4 + size_of::<Mapping>() + 16;
        // For each bounce buffer: the page, its handle, a bit, and the grant reference it stands
        // for.
        let own = 4096 + size_of::<Option<PrivatePage>>() + 1 + 4;
        for path in DataPath::ALL {
            // The pool also exists on paths that map, for pages that the host cannot map.
            let pool = PAGES_MOST * own;
            let cached = if path.caches() { cached_max(1024) * cached } else { 0 };
            let lists = PAGES_MOST * (ours + engines) + spare + 1032 * slot;
            let all = pool + lists + cached;
            std::println!("{path}: {} KiB", all >> 10);
            assert!(all < 14 << 20);
        }
    }

    #[test]
    fn cached_mappings_of_a_queue_are_bounded() {
        assert_eq!((cached_max(2), cached_max(32), cached_max(64)), (1056, 1056, 2112));
        assert_eq!((cached_max(1024), cached_max(usize::MAX)), (4224, 4224));
    }
}
