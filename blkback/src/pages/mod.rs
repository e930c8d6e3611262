//! The guest's pages: mapped for a request, kept mapped, or stood for by pages of our own.
//!
//! A poll's requests say what they want; of indirect ones the segments are read before, by one call
//! for all of them. What is to be written to the disk is then copied by one call for all requests,
//! and each request takes its pages, or is refused by itself. Completed operations return their
//! pages and are settled together: what was read from the disk into pages of our own is copied to
//! the guest by one call, and all pages are let go of, before any answer.
//!
//! Mapping is not done for many requests at once. A platform may unmap only together what was
//! mapped together ([`GrantMapper::map_each`]), and a page must be unmapped when its request is
//! answered: so a request's pages are one call, and a page that is kept is one by itself.
//!
//! When as many pages are kept as may be, by the queue or by the [budget](MappingBudget) of its guest and its
//! process, what is kept stays, and pages beyond are mapped for their request or copied, as the
//! [path](DataPath) says. By and by those make room that nobody uses. Data of a page that the host cannot map,
//! for want of room, is copied on every path.
//!
//! # Memory
//! What a guest can make a queue hold at a time is bounded, whatever the length of its ring:
//! - guest pages in use by requests: [`PAGES_MOST`] (8 MiB of the guest's own memory). A request that would
//!   need more waits for others to finish;
//! - pages of ours that their data is copied through: as many. They are made when data is first copied;
//! - guest pages kept mapped: [`kept_most`], 4224 (16.5 MiB of the guest's own memory) at most, with
//!   at most 150 bytes of ours for each;
//! - lists: some 1000 bytes for each page in use (the engine's among them), 2 KiB for each slot.
//!
//! Ours is pool + lists, at most 13.7 MiB a queue; `lists_of_a_queue_are_bounded` adds it up.

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

/// Most guest pages that all requests of a queue use at a time, and most pages of our own it has, so that
/// any request it takes can be copied.
pub const PAGES_MOST: usize = 2048;
/// Pages of those that are made known to the kernel, and so in memory for good: the first, which
/// are used before others. 2 MiB, 32 requests of 64 KiB.
pub const REGISTERED_MOST: usize = 512;
/// Grants that a queue of 32 slots keeps mapped, as Linux's backend has it
/// (`max_persistent_grants`): 33 a slot.
pub const KEPT_LEAST: usize = 1056;

/// Grants that a queue keeps mapped at most: 33 for each slot of its ring, but no more than 4224.
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

/// What an operation moves data to and from: a page mapped for it alone, a mapped page that is
/// kept, or a page of our own.
pub type Buf<M> = Either<M, Either<Arc<M>, PrivatePage>>;

/// One page a request wants.
#[derive(Clone, Copy, Debug)]
struct Want {
    segment: Segment,
    /// Whether the guest's page is to be written: it reads from the disk.
    into_guest: bool,
    /// Whether it is the request's first.
    first: bool,
    /// Pages of the request from this one on.
    left: u16,
    /// Whether it is mapped or copied for this request alone.
    beyond: bool,
}

impl Want {
    /// The backend writes guest memory when the guest reads the disk.
    const fn access(&self) -> Access {
        if self.into_guest { Access::ReadWrite } else { Access::ReadOnly }
    }

    fn over<B>(&self, buf: B) -> IoSeg<B> {
        IoSeg { buf, offset: self.segment.offset(), len: self.segment.len() }
    }
}

/// Why a step of a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StepError {
    Engine(EngineError),
    /// The guest's page could not be reached.
    Grant,
}

/// An operation the engine has finished.
#[derive(Debug)]
pub(crate) struct Finished {
    pub tag: u32,
    pub result: Result<(), StepError>,
    /// Its pages in `returned`, if those of ours are to be copied to the guest.
    copy: Range<usize>,
    /// How many of them are ours.
    copies: usize,
}

/// The guest's pages as one queue uses them.
#[derive(Debug)]
pub(crate) struct Pages<M> {
    path: DataPath,
    /// Pages that requests may use, and those they may use besides those they use now.
    most: usize,
    free: usize,
    pool: PagePool,
    kept: CachedPages<M>,
    wanted: Vec<Want>,
    /// Pages of segments, of indirect requests.
    tables: Tables,
    /// What was gathered, one for each that is wanted; `None` where that failed.
    found: Vec<Option<Buf<M>>>,
    /// What one call to the hypervisor is about, and which of `wanted`; reused.
    grefs: Vec<GrantRef>,
    places: Vec<u32>,
    ops: Vec<CopyOp<'static>>,
    /// Pages of operations that are done.
    returned: Segments<Buf<M>>,
    finished: Vec<Finished>,
}

impl<M: SharedMemory> Pages<M> {
    /// For a queue of `slots` requests of at most `segments` pages each. No more pages are kept mapped than
    /// the budget has left.
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

    /// Whether a request of as many pages can be served now. Once nothing is in use, any is.
    pub fn has_room_for(&self, count: usize) -> bool {
        count <= self.free
    }

    /// Asks for the pages of a request, for which there is room; where they are to be found.
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

    /// Asks for the segments of an indirect request, for which there is room.
    pub fn want_tables(&mut self, indirect: &Indirect) -> Range<usize> {
        self.free = self.free.saturating_sub(indirect.segments());
        self.tables.want(indirect)
    }

    /// Reads everything that [`want_tables`](Self::want_tables) asked for into private memory, once.
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

    /// Asks for the pages of an indirect request, whose segments were read; if `check` lets them
    /// pass, as it is given them.
    ///
    /// # Errors
    /// The check's; [`RefusalReason::Grant`] if the segments could not be read;
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

    /// Gets hold of everything wanted.
    pub fn gather<P>(&mut self, grants: &P, frontend: DomId, stats: &Stats)
    where
        P: GrantMapper<Mapping = M> + GrantCopier,
    {
        if self.path == DataPath::Map {
            // Each request maps its own.
            return;
        }
        self.found.clear();
        self.found.resize_with(self.wanted.len(), || None);
        if self.path.keeps() {
            self.find_or_keep(grants, frontend, stats);
        }
        // Otherwise each request maps what is not kept.
        if self.path.copies() {
            self.copy_in(0..self.wanted.len(), grants, frontend, stats);
        }
    }

    /// Where those pages of ours are that are used before others; once, when the first was used.
    pub fn first_used(&mut self) -> Option<PoolMemory> {
        self.pool.first_used()
    }

    /// Moves a request's pages into `out`: all of them, or none if one could not be had.
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

    /// All requests have taken their pages.
    pub fn taken(&mut self) {
        self.wanted.clear();
        self.tables.clear();
        self.found.clear();
    }

    /// Lets go of pages.
    pub fn give_back(&mut self, segments: &mut Segments<Buf<M>>) {
        self.free += segments.len();
        for seg in segments.drain(..) {
            if let Either::B(Either::B(page)) = seg.buf {
                self.pool.give_back(page);
            }
        }
    }

    /// An operation is done; `into_guest` if it has read from the disk.
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

    /// Copies to the guest what was read, lets go of all that was returned, and hands out the list
    /// of what is done; to be given to [`settled`](Self::settled) afterwards.
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

    /// Takes the list back.
    pub fn settled(&mut self, mut finished: Vec<Finished>) {
        finished.clear();
        self.finished = finished;
    }

    /// Tells the time, and unmaps what was not used for long.
    pub fn tick(&mut self, now: Duration) {
        self.kept.tick(now);
    }

    /// Pages that requests use now.
    pub fn used(&self) -> usize {
        self.most.saturating_sub(self.free)
    }

    /// Limits of pages in use by requests, of cached mappings, and of registered pages.
    pub fn limits(&self) -> [usize; 3] {
        let copied = if self.path.copies() { self.most.min(REGISTERED_MOST) } else { 0 };
        [self.most, self.kept.most(), copied]
    }

    /// Guest pages kept mapped now.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Says of each page of a request where among its pages it is.
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

    /// As large as any platform's.
    type Mapping = [u64; 8];

    #[test]
    fn lists_of_a_queue_are_bounded() {
        let segment = size_of::<IoSeg<Buf<Mapping>>>();
        // Ours, each grown to twice its need: wanted, raw segments, found, grefs, places, copies,
        // returned, and one operation's on its way to the engine and a barrier's.
        let each = size_of::<Want>() + 8 + size_of::<Option<Buf<Mapping>>>() + 4 + 4;
        let ours = 2 * (each + size_of::<CopyOp<'_>>() + 3 * segment);
        // The io_uring's: a segment and its address, in lists of up to four times the need; and
        // spare ones, 8192 segments in all.
        let engines = 4 * (segment + 16);
        let spare = 8192 * (segment + 16);
        // For each slot: lists of 16 segments, the request, its tags; for each page kept: an entry,
        // up to two places it is found by, and the mapping with its counts.
        let slot = 16 * (segment + 16) + 256;
        let kept = 40 + 2 * 4 + size_of::<Mapping>() + 16;
        // For each page of ours: itself, its value, a bit, and what it stands for.
        let own = 4096 + size_of::<Option<PrivatePage>>() + 1 + 4;
        for path in DataPath::ALL {
            // Also of what is mapped, where the host can map no more.
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
