//! The pages of all requests of a poll, in the order in which they must be handled.

use super::request::{PageRequest, number};
use super::tables::Tables;
use super::{Buf, Context, Pages};
use crate::engine::Segments;
use crate::path::DataPath;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::proto::blkif::{Indirect, RefusalReason, Segment};
use pvio_ring::shm::{PoolMemory, SharedMemory};

/// State of a batch: requests declare their pages, indirect requests their tables of segments.
#[derive(Debug)]
pub(crate) enum Declaring {}
/// State of a batch: the tables were read, and indirect requests declare their pages.
#[derive(Debug)]
pub(crate) enum TablesRead {}
/// State of a batch: the pages were gathered, and each request takes its own.
#[derive(Debug)]
pub(crate) enum Gathered {}

/// The pages of all requests of a poll. A change of state consumes the batch, so that no page is
/// declared after the pages were gathered, and none is used before.
#[must_use = "the lists of a batch are reused after it is finished"]
pub(crate) struct Batch<M, S> {
    lists: BatchLists<M>,
    state: PhantomData<S>,
}

/// The lists of a batch. Their memory is reused.
pub(super) struct BatchLists<M> {
    requests: Vec<PageRequest>,
    /// Pages that hold segments of indirect requests.
    tables: Tables,
    /// Gathered pages, one for each of `requests`; `None` where gathering failed.
    buffers: Vec<Option<Buf<M>>>,
}

/// The pages of one request of a batch.
#[derive(Debug)]
#[must_use = "a request takes the pages that it declared"]
pub(crate) struct PageRange(Range<usize>);

impl PageRange {
    /// Returns the range of a request without data.
    pub const fn empty() -> Self {
        Self(0..0)
    }
}

/// The segments of one indirect request of a batch.
#[derive(Debug)]
#[must_use = "the segments of the request are read, and its pages declared"]
pub(crate) struct TableRange(Range<usize>);

impl<M> Default for BatchLists<M> {
    fn default() -> Self {
        Self { requests: Vec::new(), tables: Tables::default(), buffers: Vec::new() }
    }
}

impl<M, S> Batch<M, S> {
    const fn new(lists: BatchLists<M>) -> Self {
        Self { lists, state: PhantomData }
    }
}

impl<M: SharedMemory> Batch<M, Declaring> {
    pub(super) const fn begin(lists: BatchLists<M>) -> Self {
        Self::new(lists)
    }

    /// Declares the pages of a request, for which there is room.
    pub fn declare(
        &mut self,
        pages: &mut Pages<M>,
        segments: impl Iterator<Item = Segment>,
        into_guest: bool,
    ) -> PageRange {
        let requests = &mut self.lists.requests;
        let start = requests.len();
        requests.extend(segments.map(|segment| PageRequest::new(segment, into_guest)));
        number(requests.get_mut(start..).unwrap_or_default());
        let range = start..requests.len();
        pages.reserve(range.len());
        PageRange(range)
    }

    /// Declares the tables of an indirect request, for whose pages there is room.
    pub fn declare_tables(&mut self, pages: &mut Pages<M>, indirect: &Indirect) -> TableRange {
        pages.reserve(indirect.segments());
        TableRange(self.lists.tables.declare(indirect))
    }

    /// Reads all declared tables into private memory, exactly once.
    pub fn read_tables<P>(
        mut self,
        pages: &mut Pages<M>,
        context: Context<'_, P>,
    ) -> Batch<M, TablesRead>
    where
        P: GrantMapper<Mapping = M> + GrantCopier,
    {
        let (tables, path) = (&mut self.lists.tables, pages.path);
        if !tables.is_empty() {
            if path.caches() {
                tables.read_cached(context, &mut pages.cached);
            }
            if !path.copies() {
                tables.map(context);
            }
            tables.copy(context, &mut pages.ops);
        }
        Batch::new(self.lists)
    }
}

impl<M: SharedMemory> Batch<M, TablesRead> {
    /// Declares the pages of an indirect request, after passing its segments to `check`.
    ///
    /// # Errors
    /// The error of `check`; [`RefusalReason::Grant`] if the segments could not be read;
    /// [`RefusalReason::SegmentBounds`].
    pub fn declare<F>(
        &mut self,
        pages: &mut Pages<M>,
        TableRange(table): TableRange,
        into_guest: bool,
        check: F,
    ) -> Result<PageRange, RefusalReason>
    where
        F: FnOnce(&mut dyn ExactSizeIterator<Item = Segment>) -> Result<(), RefusalReason>,
    {
        let BatchLists { requests, tables, .. } = &mut self.lists;
        let (start, count) = (requests.len(), table.len());
        let read = match tables.read(table) {
            None => Err(RefusalReason::Grant),
            Some(raw) => raw
                .iter()
                .try_for_each(|raw| {
                    let segment = Segment::read(*raw).ok_or(RefusalReason::SegmentBounds)?;
                    requests.push(PageRequest::new(segment, into_guest));
                    Ok(())
                })
                .and_then(|()| check(&mut requests.iter().skip(start).map(|page| page.segment))),
        };
        if let Err(reason) = read {
            requests.truncate(start);
            pages.unreserve(count);
            return Err(reason);
        }
        number(requests.get_mut(start..).unwrap_or_default());
        Ok(PageRange(start..requests.len()))
    }

    /// Maps or copies all declared pages that are handled together. On [`DataPath::Map`], each
    /// request maps its own pages when it takes them.
    pub fn gather<P>(mut self, pages: &mut Pages<M>, context: Context<'_, P>) -> Batch<M, Gathered>
    where
        P: GrantMapper<Mapping = M> + GrantCopier,
    {
        if pages.path != DataPath::Map && !self.lists.requests.is_empty() {
            let BatchLists { requests, buffers, .. } = &mut self.lists;
            buffers.resize_with(requests.len(), || None);
            if pages.path.caches() {
                pages.find_or_cache(context, requests, buffers);
            }
            if pages.path.copies() {
                pages.copy_in(context, requests, buffers);
            }
        }
        Batch::new(self.lists)
    }
}

impl<M: SharedMemory> Batch<M, Gathered> {
    /// Returns the memory of the bounce buffers that are used before others; once, after the first
    /// use.
    pub fn unregistered(&self, pages: &mut Pages<M>) -> Option<PoolMemory> {
        pages.pool.first_used()
    }

    /// Moves a request's pages into `out`: all of them, or none if one is missing.
    pub fn take<P>(
        &mut self,
        pages: &mut Pages<M>,
        context: Context<'_, P>,
        PageRange(range): PageRange,
        out: &mut Segments<Buf<M>>,
    ) -> bool
    where
        P: GrantMapper<Mapping = M> + GrantCopier,
    {
        let BatchLists { requests, buffers, .. } = &mut self.lists;
        let total = requests.len();
        let requests = requests.get(range.clone()).unwrap_or_default();
        let before = out.len();
        let mapped = match pages.path {
            DataPath::Map => pages.map_request(context, requests, out),
            DataPath::PersistentOrMap => {
                let buffers = buffers.get_mut(range.clone()).unwrap_or_default();
                pages.map_uncached(context, requests, buffers)
            }
            DataPath::Copy | DataPath::PersistentOrCopy => true,
        };
        if !mapped {
            let uncached = requests.iter().filter(|page| page.uncached).count();
            context.stats.unmappable_pages.add(uncached as u64);
            buffers.resize_with(total, || None);
            let buffers = buffers.get_mut(range.clone()).unwrap_or_default();
            pages.copy_in(context, requests, buffers);
        }
        if pages.path != DataPath::Map || !mapped {
            let buffers = buffers.get_mut(range.clone()).unwrap_or_default();
            let gathered = requests.iter().zip(buffers);
            out.extend(gathered.filter_map(|(page, buf)| Some(page.io_seg(buf.take()?))));
        }
        let missing = range.len().saturating_sub(out.len() - before);
        pages.unreserve(missing);
        if missing > 0 {
            if pvio_ring::planted!(MappingLeaked) {
                core::mem::forget(core::mem::take(out));
            }
            pages.release(out);
        }
        missing == 0
    }

    /// Ends the batch after all requests have taken their pages.
    pub fn finish(self, pages: &mut Pages<M>) {
        let mut lists = self.lists;
        lists.requests.clear();
        lists.tables.clear();
        lists.buffers.clear();
        pages.lists = lists;
    }
}

impl<M> fmt::Debug for BatchLists<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchLists").field("requests", &self.requests.len()).finish_non_exhaustive()
    }
}
