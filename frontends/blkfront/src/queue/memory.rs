//! Memory that a queue shares with its backend: the ring, a buffer for each slot, and, for indirect
//! requests, segment tables. All of it is granted once.

use super::limits::at_least_direct;
use super::{PAGES_PER_SLOT, SECTOR};
use alloc::vec::Vec;
use pvio_grant_table::{Access, DomId, GrantError, GrantRef, Granter};
use pvio_ring::proto::blkif::{
    Indirect, MAX_INDIRECT_PAGES, MAX_SEGMENTS, SEGMENTS_PER_PAGE, Segment, Segments,
};
use pvio_ring::shm::{PAGE_SIZE, Region};

/// Pages and their grant references.
struct Shared<M> {
    pages: M,
    count: usize,
    /// Fewer than pages until all are granted; revoked references are removed.
    grefs: Vec<GrantRef>,
}

impl<M: Clone> Shared<M> {
    fn new(pages: M, count: usize) -> Self {
        Self { pages, count, grefs: Vec::with_capacity(count) }
    }

    fn grant<P: Granter<Pages = M>>(&mut self, to: &P, backend: DomId) -> Result<(), GrantError> {
        for page in self.grefs.len()..self.count {
            self.grefs.push(to.grant(backend, &self.pages, page, Access::ReadWrite)?);
        }
        Ok(())
    }

    /// Ends the grants that are not in use, and returns whether none is left.
    fn revoke<P: Granter<Pages = M>>(&mut self, from: &P) -> bool {
        self.grefs.retain(|gref| from.end_access(*gref).is_err());
        self.grefs.is_empty()
    }
}

pub(super) struct Memory<M> {
    ring: Shared<M>,
    data: Shared<M>,
    /// `None` if all requests are direct.
    tables: Option<Shared<M>>,
    pages_per_slot: usize,
    /// Pages in one request, for which the tables are sized.
    segments: usize,
}

impl<M: Region + Clone> Memory<M> {
    /// Allocates memory for `depth` slots, without granting it. Requests of more than `segments`
    /// pages are split into parts, each with its own tables.
    pub fn alloc<P: Granter<Pages = M>>(
        from: &P,
        ring: M,
        depth: usize,
        pages_per_slot: usize,
        segments: usize,
    ) -> Result<Self, GrantError> {
        let segments = at_least_direct(segments.min(pages_per_slot));
        let alloc = |pages| Ok(Shared::new(from.alloc_pages(pages)?, pages));
        let ring_pages = ring.len() / PAGE_SIZE;
        let tables = match segments {
            0..=MAX_SEGMENTS => None,
            pages => Some(alloc(depth * pages_per_slot.div_ceil(pages) * tables_of(pages))?),
        };
        let (ring, data) = (Shared::new(ring, ring_pages), alloc(depth * pages_per_slot)?);
        Ok(Self { ring, data, tables, pages_per_slot, segments })
    }

    /// Grants all of it, writable: a backend with persistent grants uses mapped pages in both
    /// directions.
    pub fn grant<P: Granter<Pages = M>>(
        &mut self,
        to: &P,
        backend: DomId,
    ) -> Result<(), GrantError> {
        self.all().try_for_each(|shared| shared.grant(to, backend))
    }

    /// Ends the grants that are not in use, and returns whether none is left.
    pub fn revoke<P: Granter<Pages = M>>(&mut self, from: &P) -> bool {
        // Every grant is tried, even after one that is still in use.
        self.all().filter_map(|shared| (!shared.revoke(from)).then_some(())).count() == 0
    }

    /// Ends the grants that are not in use; the others stay granted, and their memory is never
    /// freed.
    pub fn abandon<P: Granter<Pages = M>>(&mut self, from: &P) {
        for shared in self.all() {
            if !shared.revoke(from) {
                core::mem::forget(shared.pages.clone());
            }
        }
    }

    pub fn ring_grefs(&self) -> &[GrantRef] {
        &self.ring.grefs
    }

    pub fn fill(&self, slot: usize, offset: usize, data: &[u8]) -> Option<()> {
        self.data.pages.write_bytes(self.place(slot, offset, data.len())?, data)
    }

    pub fn fetch(&self, slot: usize, offset: usize, out: &mut [u8]) -> Option<()> {
        self.data.pages.read_bytes(self.place(slot, offset, out.len())?, out)
    }

    /// Copies a slot's buffer from a queue of the same shape.
    pub fn copy_slot(&self, from: &Self, slot: usize) {
        let mut page = [0; PAGE_SIZE];
        for offset in (0..self.slot_bytes()).step_by(PAGE_SIZE) {
            // Offset and length are within both buffers.
            let _ = from.fetch(slot, offset, &mut page);
            let _ = self.fill(slot, offset, &page);
        }
    }

    /// Wipes a slot's buffer.
    pub fn wipe(&self, slot: usize) {
        // Offset and length are within the buffer.
        let _ = self.data.pages.fill(slot * self.slot_bytes(), self.slot_bytes(), 0);
    }

    /// Returns the number of pages in one request to a backend that advertises `offered` segments:
    /// the size of the tables, or, if the backend supports less than that, the segments of a direct
    /// request.
    pub fn segments_of(&self, offered: usize) -> usize {
        if offered < self.segments { MAX_SEGMENTS } else { self.segments }
    }

    /// Returns the segments of a range of a slot's buffer that starts at a page, if they fit into a
    /// direct request.
    pub fn segments(&self, slot: usize, from: usize, bytes: usize) -> Option<Segments> {
        let mut all = [Segment::default(); PAGES_PER_SLOT];
        let (page, count) = (from / PAGE_SIZE, bytes.div_ceil(PAGE_SIZE));
        for (n, segment) in all.get_mut(..count)?.iter_mut().enumerate() {
            *segment = self.segment(slot, page + n, from + bytes)?;
        }
        Segments::from_slice(&all[..count])
    }

    /// Writes the segments of a part of a slot's buffer into that part's table.
    pub fn write_table(&self, slot: usize, from: usize, bytes: usize) -> Option<Indirect> {
        let tables = self.tables.as_ref()?;
        let (page, count) = (from / PAGE_SIZE, bytes.div_ceil(PAGE_SIZE));
        let parts = self.pages_per_slot.div_ceil(self.segments);
        // Each part but the last has `self.segments` pages, and its tables have room for as many.
        let first = (slot * parts + page / self.segments) * tables_of(self.segments);
        for n in 0..count {
            // Written again for each request: the backend can write to the table, too.
            let raw = self.segment(slot, page + n, from + bytes)?.write();
            tables.pages.write_words(first * PAGE_SIZE + n * raw.len(), &raw)?;
        }
        let used = count.div_ceil(SEGMENTS_PER_PAGE);
        debug_assert!(used <= MAX_INDIRECT_PAGES);
        Indirect::new(count, tables.grefs.get(first..first + used)?)
    }

    /// Returns the segment for page `n` of a slot's buffer, limited to the first `bytes` bytes.
    fn segment(&self, slot: usize, n: usize, bytes: usize) -> Option<Segment> {
        let here = bytes.checked_sub(n * PAGE_SIZE)?.min(PAGE_SIZE);
        let gref = *self.data.grefs.get(slot * self.pages_per_slot + n)?;
        Some(Segment { gref, first: 0, last: (here / SECTOR).checked_sub(1)? as u8 })
    }

    /// Returns the offset of a range of a slot's buffer in `data`.
    fn place(&self, slot: usize, offset: usize, len: usize) -> Option<usize> {
        let end = offset.checked_add(len)?;
        (end <= self.slot_bytes()).then_some(slot * self.slot_bytes() + offset)
    }

    fn slot_bytes(&self) -> usize {
        self.pages_per_slot * PAGE_SIZE
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Shared<M>> {
        [&mut self.ring, &mut self.data].into_iter().chain(
            self.tables
                .as_mut()
                .filter(|t| !pvio_ring::planted!(TablesLeaked) || t.grefs.is_empty()),
        )
    }
}

/// Returns the number of table pages for a request of `segments` pages.
const fn tables_of(segments: usize) -> usize {
    segments.div_ceil(SEGMENTS_PER_PAGE)
}
