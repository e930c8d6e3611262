//! Guest pages: mapped for one request, mapped and cached, or replaced by bounce buffers.
//!
//! The requests of a poll first declare which pages they need. The segments of indirect requests
//! are read before that, with one call for all of them. Data to be written to the disk is then
//! copied with one call for all requests, and each request takes its pages or is rejected on its
//! own. Completed operations return their pages and are settled together: data that was read from
//! the disk into bounce buffers is copied to the guest with one call, and all pages are released
//! before any response is written.
//!
//! Mappings are not batched over requests. A platform may be able to unmap only together what was
//! mapped together ([`GrantMapper::map_each`]), and a page must be unmapped before its request is
//! completed. A request's pages are therefore mapped with one call, and each cached page with a
//! call of its own.
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
//! - cached mappings of guest pages: [`kept_most`], at most 4224 (16.5 MiB of the guest's own
//!   memory), with at most 150 bytes of backend memory each;
//! - lists: about 1000 bytes for each page in use (including the engine's), 2 KiB for each slot.
//!
//! Backend memory is bounce buffers + lists, at most 13.7 MiB for each queue; the test
//! `lists_of_a_queue_are_bounded` computes it.

mod cached;
mod copies;
mod maps;
mod pool;
mod tables;

use crate::engine::{EngineError, Segments};
use crate::path::DataPath;
use crate::stats::Stats;
use alloc::sync::Arc;
use alloc::vec::Vec;
use cached::CachedPages;
use core::ops::Range;
use core::time::Duration;
use pool::PagePool;
use pvio_grant_table::policy::MappingBudget;
use pvio_grant_table::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef};
use pvio_ring::IoSeg;
use pvio_ring::proto::blkif::{Indirect, RefusalReason, Segment};
use pvio_ring::shm::{Either, PoolMemory, PrivatePage, SharedMemory};
use tables::Tables;

/// Maximum number of guest pages that all requests of a queue use at a time. The pool of bounce
/// buffers has the same size, so that every accepted request can be copied.
pub const PAGES_MOST: usize = 2048;
/// Maximum number of bounce buffers registered with the kernel, and so pinned: the first ones,
/// which are used before the others. 2 MiB, 32 requests of 64 KiB.
pub const REGISTERED_MOST: usize = 512;
/// Cached mappings of a queue of 32 slots, as in Linux's backend (`max_persistent_grants`): 33 for
/// each slot.
pub const KEPT_LEAST: usize = 1056;

/// Returns the maximum number of cached mappings of a queue: 33 for each slot of its ring, at most
/// 4224.
#[must_use]
pub const fn kept_most(slots: usize) -> usize {
    let most = slots.saturating_mul(33);
    if most > 4 * KEPT_LEAST {
        4 * KEPT_LEAST
    } else if most < KEPT_LEAST {
        KEPT_LEAST
    } else {
        most
    }
}

/// The memory of an operation: a page mapped for it alone, a cached mapping, or a bounce buffer.
pub type Buf<M> = Either<M, Either<Arc<M>, PrivatePage>>;

/// A guest page that a request needs.
#[derive(Clone, Copy, Debug)]
struct Want {
    segment: Segment,
    /// Whether the backend writes the guest page: the request reads from the disk.
    into_guest: bool,
    /// Whether it is the first page of the request.
    first: bool,
    /// Number of pages of the request from this one on.
    left: u16,
    /// Whether it is mapped or copied for this request alone instead of cached.
    beyond: bool,
}

impl Want {
    /// Returns writable access if the guest reads from the disk: the backend then writes guest
    /// memory.
    const fn access(&self) -> Access {
        if self.into_guest { Access::ReadWrite } else { Access::ReadOnly }
    }

    fn over<B>(&self, buf: B) -> IoSeg<B> {
        IoSeg { buf, offset: self.segment.offset(), len: self.segment.len() }
    }
}

/// The reason why a step of a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StepError {
    Engine(EngineError),
    /// The guest's page could not be mapped or copied.
    Grant,
}

/// An operation that the engine has completed.
#[derive(Debug)]
pub(crate) struct Finished {
    pub tag: u32,
    pub result: Result<(), StepError>,
    /// Its pages in `returned`, if bounce buffers among them must be copied to the guest.
    copy: Range<usize>,
    /// Number of bounce buffers among them.
    copies: usize,
}

/// The guest pages that one queue uses.
#[derive(Debug)]
pub(crate) struct Pages<M> {
    path: DataPath,
    /// Maximum number of pages that requests may use; below it, the number still available.
    most: usize,
    free: usize,
    pool: PagePool,
    kept: CachedPages<M>,
    wanted: Vec<Want>,
    /// Pages that hold segments of indirect requests.
    tables: Tables,
    /// Gathered pages, one for each entry of `wanted`; `None` where gathering failed.
    found: Vec<Option<Buf<M>>>,
    /// Arguments of one hypercall and their indices in `wanted`; reused.
    grefs: Vec<GrantRef>,
    places: Vec<u32>,
    ops: Vec<CopyOp<'static>>,
    /// Pages of completed operations.
    returned: Segments<Buf<M>>,
    finished: Vec<Finished>,
}

impl<M: SharedMemory> Pages<M> {
    /// Creates the pages of a queue of `slots` requests of at most `segments` pages each. Cached
    /// mappings are also limited by what is left of the budget.
    pub fn new(path: DataPath, slots: usize, segments: usize, budget: &Arc<MappingBudget>) -> Self {
        let all = slots.saturating_mul(segments);
        let most = all.min(PAGES_MOST).max(segments.min(PAGES_MOST));
        let kept = if path.keeps() { kept_most(slots) } else { 0 };
        Self {
            path,
            most,
            free: most,
            pool: PagePool::new(if path.copies() { most } else { 0 }),
            kept: CachedPages::new(kept, Arc::clone(budget)),
            wanted: Vec::new(),
            tables: Tables::default(),
            found: Vec::new(),
            grefs: Vec::new(),
            places: Vec::new(),
            ops: Vec::new(),
            returned: Vec::new(),
            finished: Vec::with_capacity(slots),
        }
    }

    /// Returns whether a request of `count` pages can be served now. Any request can once no page
    /// is in use.
    pub fn has_room_for(&self, count: usize) -> bool {
        count <= self.free
    }

    /// Declares the pages of a request, for which there is room. Returns their range in `wanted`.
    pub fn want(
        &mut self,
        segments: impl Iterator<Item = Segment>,
        into_guest: bool,
    ) -> Range<usize> {
        let start = self.wanted.len();
        let each = |segment| Want { segment, into_guest, first: false, left: 0, beyond: true };
        self.wanted.extend(segments.map(each));
        let range = start..self.wanted.len();
        self.number(range.clone());
        self.free = self.free.saturating_sub(range.len());
        range
    }

    /// Declares the segment pages of an indirect request, for which there is room.
    pub fn want_tables(&mut self, indirect: &Indirect) -> Range<usize> {
        self.free = self.free.saturating_sub(indirect.segments());
        self.tables.want(indirect)
    }

    /// Reads everything that [`want_tables`](Self::want_tables) declared into private memory,
    /// exactly once.
    pub fn read_tables<P>(&mut self, grants: &P, frontend: DomId, stats: &Stats)
    where
        P: GrantMapper<Mapping = M> + GrantCopier,
    {
        let Self { tables, kept, ops, path, .. } = self;
        if path.keeps() {
            tables.keep(grants, frontend, stats, kept);
        }
        if !path.copies() {
            tables.map(grants, frontend, stats);
        }
        tables.copy(grants, frontend, stats, ops);
    }

    /// Declares the pages of an indirect request whose segments were read, after passing the
    /// segments to `check`.
    ///
    /// # Errors
    /// The error of `check`; [`RefusalReason::Grant`] if the segments could not be read;
    /// [`RefusalReason::SegmentBounds`].
    pub fn want_indirect<F>(
        &mut self,
        table: Range<usize>,
        into_guest: bool,
        check: F,
    ) -> Result<Range<usize>, RefusalReason>
    where
        F: FnOnce(&mut dyn ExactSizeIterator<Item = Segment>) -> Result<(), RefusalReason>,
    {
        let (first, count) = (self.wanted.len(), table.len());
        let wanted = &mut self.wanted;
        let read = match self.tables.read(table) {
            None => Err(RefusalReason::Grant),
            Some(raw) => raw
                .iter()
                .try_for_each(|raw| {
                    let segment = Segment::read(*raw).ok_or(RefusalReason::SegmentBounds)?;
                    let (first, left) = (false, 0);
                    wanted.push(Want { segment, into_guest, first, left, beyond: true });
                    Ok(())
                })
                .and_then(|()| check(&mut wanted.iter().skip(first).map(|want| want.segment))),
        };
        if read.is_err() {
            self.wanted.truncate(first);
            self.free += count;
        }
        let range = first..self.wanted.len();
        self.number(range.clone());
        read.map(|()| range)
    }

    /// Maps or copies all declared pages that are handled in batches.
    pub fn gather<P>(&mut self, grants: &P, frontend: DomId, stats: &Stats)
    where
        P: GrantMapper<Mapping = M> + GrantCopier,
    {
        if self.path == DataPath::Map {
            // On this path each request maps its own pages.
            return;
        }
        self.found.clear();
        self.found.resize_with(self.wanted.len(), || None);
        if self.path.keeps() {
            self.find_or_keep(grants, frontend, stats);
        }
        // On the remaining path each request maps the pages that are not cached.
        if self.path.copies() {
            self.copy_in(0..self.wanted.len(), grants, frontend, stats);
        }
    }

    /// Returns the memory of the bounce buffers that are used before others; once, after the first
    /// use.
    pub fn first_used(&mut self) -> Option<PoolMemory> {
        self.pool.first_used()
    }

    /// Moves a request's pages into `out`: all of them, or none if one is missing.
    pub fn take<P>(
        &mut self,
        range: Range<usize>,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
        out: &mut Segments<Buf<M>>,
    ) -> bool
    where
        P: GrantMapper<Mapping = M> + GrantCopier,
    {
        let before = out.len();
        let mapped = match self.path {
            DataPath::Map => self.map_all(range.clone(), grants, frontend, stats, out),
            DataPath::PersistentOrMap => self.map_rest(range.clone(), grants, frontend, stats),
            DataPath::Copy | DataPath::PersistentOrCopy => true,
        };
        if !mapped {
            let count = range.clone().filter(|n| self.wanted.get(*n).is_some_and(|w| w.beyond));
            stats.unmappable_pages.add(count.count() as u64);
            self.found.resize_with(self.wanted.len(), || None);
            self.copy_in(range.clone(), grants, frontend, stats);
        }
        if self.path != DataPath::Map || !mapped {
            let wanted = self.wanted.get(range.clone()).unwrap_or_default();
            let found = self.found.get_mut(range.clone()).unwrap_or_default();
            let had = wanted.iter().zip(found);
            out.extend(had.filter_map(|(want, buf)| Some(want.over(buf.take()?))));
        }
        let missing = range.len().saturating_sub(out.len() - before);
        self.free += missing;
        if missing > 0 {
            self.give_back(out);
        }
        missing == 0
    }

    /// Clears the lists of the poll after all requests have taken their pages.
    pub fn taken(&mut self) {
        self.wanted.clear();
        self.tables.clear();
        self.found.clear();
    }

    /// Releases pages.
    pub fn give_back(&mut self, segments: &mut Segments<Buf<M>>) {
        self.free += segments.len();
        for seg in segments.drain(..) {
            if let Either::B(Either::B(page)) = seg.buf {
                self.pool.give_back(page);
            }
        }
    }

    /// Records a completed operation and its pages; `into_guest` if it read from the disk.
    pub fn returned(
        &mut self,
        tag: u32,
        result: Result<(), EngineError>,
        into_guest: bool,
        segments: &mut Segments<Buf<M>>,
    ) {
        let first = self.returned.len();
        self.returned.append(segments);
        let to_copy = into_guest && result.is_ok() && !self.pool.is_empty();
        let copy = first..if to_copy { self.returned.len() } else { first };
        let result = result.map_err(StepError::Engine);
        self.finished.push(Finished { tag, result, copy, copies: 0 });
    }

    /// Copies data that was read to the guest, releases all returned pages, and returns the list of
    /// completed operations. The caller passes the list to [`settled`](Self::settled) afterwards.
    pub fn settle<P>(&mut self, grants: &P, frontend: DomId, stats: &Stats) -> Vec<Finished>
    where
        P: GrantCopier,
    {
        let mut finished = core::mem::take(&mut self.finished);
        if finished.is_empty() {
            return finished;
        }
        if !self.pool.is_empty() {
            self.copy_out(grants, frontend, &mut finished, stats);
        }
        let mut returned = core::mem::take(&mut self.returned);
        self.give_back(&mut returned);
        self.returned = returned;
        finished
    }

    /// Takes the list of completed operations back for reuse.
    pub fn settled(&mut self, mut finished: Vec<Finished>) {
        finished.clear();
        self.finished = finished;
    }

    /// Sets the current time and unmaps cached mappings that were idle for long.
    pub fn tick(&mut self, now: Duration) {
        self.kept.tick(now);
    }

    /// Returns the number of pages that requests use now.
    pub fn used(&self) -> usize {
        self.most.saturating_sub(self.free)
    }

    /// Returns the limits of pages in use by requests, of cached mappings, and of registered pages.
    pub fn limits(&self) -> [usize; 3] {
        let copied = if self.path.copies() { self.most.min(REGISTERED_MOST) } else { 0 };
        [self.most, self.kept.most(), copied]
    }

    /// Returns the number of cached mappings.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Sets the position of each page of a request: `first` and `left`.
    fn number(&mut self, range: Range<usize>) {
        let wanted = self.wanted.get_mut(range).unwrap_or_default();
        for (want, left) in wanted.iter_mut().rev().zip(1..) {
            want.left = left;
        }
        if let Some(want) = wanted.first_mut() {
            want.first = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As large as the mapping type of any platform.
    type Mapping = [u64; 8];

    #[test]
    fn lists_of_a_queue_are_bounded() {
        let segment = size_of::<IoSeg<Buf<Mapping>>>();
        // The queue's lists, each grown to twice its need: wanted, raw segments, found, grefs,
        // places, copies, returned, one operation's during submission, and a barrier's.
        let each = size_of::<Want>() + 8 + size_of::<Option<Buf<Mapping>>>() + 4 + 4;
        let ours = 2 * (each + size_of::<CopyOp<'_>>() + 3 * segment);
        // The io_uring engine's lists: a segment and its address, in lists of up to four times the
        // need, and spare ones, 8192 segments in all.
        let engines = 4 * (segment + 16);
        let spare = 8192 * (segment + 16);
        // For each slot: lists of 16 segments, the request, its tags. For each cached mapping: an
        // entry, up to two index slots, and the mapping with its reference counts.
        let slot = 16 * (segment + 16) + 256;
        let kept = 40 + 2 * 4 + size_of::<Mapping>() + 16;
        // For each bounce buffer: the page, its handle, a bit, and the grant reference it stands
        // for.
        let own = 4096 + size_of::<Option<PrivatePage>>() + 1 + 4;
        for path in DataPath::ALL {
            // The pool also exists on paths that map, for pages that the host cannot map.
            let pool = PAGES_MOST * own;
            let kept = if path.keeps() { kept_most(1024) * kept } else { 0 };
            let lists = PAGES_MOST * (ours + engines) + spare + 1032 * slot;
            let all = pool + lists + kept;
            std::println!("{path}: {} KiB", all >> 10);
            assert!(all < 14 << 20);
        }
    }

    #[test]
    fn what_a_queue_keeps_is_bounded() {
        assert_eq!((kept_most(2), kept_most(32), kept_most(64)), (1056, 1056, 2112));
        assert_eq!((kept_most(1024), kept_most(usize::MAX)), (4224, 4224));
    }
}
