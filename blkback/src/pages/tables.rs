//! Segments of indirect requests: read exactly once, from guest pages into private memory.

use super::cached::CachedPages;
use super::copies::{copy_op, recycle};
use crate::stats::Stats;
use alloc::vec::Vec;
use core::ops::Range;
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_ring::proto::blkif::Indirect;
use pvio_ring::shm::{Region, SharedMemory};

/// A segment in the guest's layout.
type Raw = [u8; 8];

/// The segments of all indirect requests of a poll.
#[derive(Debug, Default)]
pub(super) struct Tables {
    raw: Vec<Raw>,
    pages: Vec<Table>,
    /// Arguments of one hypercall; reused.
    grefs: Vec<GrantRef>,
}

/// A page of segments.
#[derive(Clone, Debug)]
struct Table {
    gref: GrantRef,
    /// Where its segments go in `raw`.
    at: Range<usize>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Wanted,
    Read,
    Failed,
}

impl Tables {
    /// Declares the segments of a request. Returns their range in `raw`.
    pub fn want(&mut self, indirect: &Indirect) -> Range<usize> {
        let first = self.raw.len();
        for (gref, count) in indirect.pages() {
            let start = self.raw.len();
            self.raw.resize(start + count, Raw::default());
            self.pages.push(Table { gref, at: start..start + count, state: State::Wanted });
        }
        first..self.raw.len()
    }

    /// Returns a request's segments, if all of them were read.
    pub fn read(&self, range: Range<usize>) -> Option<&[Raw]> {
        let first = self.pages.partition_point(|page| page.at.start < range.start);
        let mut pages = self.pages.iter().skip(first).take_while(|page| page.at.end <= range.end);
        pages.all(|page| page.state == State::Read).then(|| self.raw.get(range))?
    }

    pub fn clear(&mut self) {
        self.raw.clear();
        self.pages.clear();
    }

    /// Reads the pages that have cached mappings, and maps and caches others while there is room.
    /// Other pages stay wanted.
    pub fn keep<P: GrantMapper>(
        &mut self,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
        kept: &mut CachedPages<P::Mapping>,
    ) {
        for page in &mut self.pages {
            if let Some(memory) = kept.get(frontend, page.gref) {
                stats.reused_pages.add(1);
                page.read_from(&*memory, &mut self.raw);
            } else if let Some(room) = kept.room() {
                stats.mapped_pages.add(1);
                let grefs = core::slice::from_ref(&page.gref);
                match grants.map(frontend, grefs, Access::ReadWrite) {
                    Ok(memory) => {
                        let memory = kept.insert(frontend, page.gref, memory, room);
                        page.read_from(&memory, &mut self.raw);
                    }
                    // It is mapped temporarily or copied instead.
                    Err(status) if status.is_exhaustion() => {}
                    Err(_) => page.state = State::Failed,
                }
            }
        }
    }

    /// Maps the pages still wanted while they are read. Pages that cannot be mapped for want of
    /// resources stay wanted.
    pub fn map<P: GrantMapper>(&mut self, grants: &P, frontend: DomId, stats: &Stats) {
        let Self { raw, pages, grefs } = self;
        grefs.clear();
        grefs.extend(wanted(pages).map(|page| page.gref));
        if grefs.is_empty() {
            return;
        }
        stats.mapped_pages.add(grefs.len() as u64);
        // The callback receives them in order.
        let mut pages = wanted(pages);
        grants.map_each(frontend, grefs, Access::ReadOnly, &mut |_, mapped| {
            let Some(page) = pages.next() else { return };
            match mapped {
                Ok(memory) => page.read_from(&memory, raw),
                Err(status) if status.is_exhaustion() => {}
                Err(_) => page.state = State::Failed,
            }
        });
    }

    /// Copies the pages still wanted, with one call.
    pub fn copy<P: GrantCopier>(
        &mut self,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
        ops: &mut Vec<CopyOp<'static>>,
    ) {
        let mut list = recycle(core::mem::take(ops));
        let mut rest = self.raw.as_mut_slice();
        // Their segments are in `raw` in the order of the pages, without gaps.
        for page in &self.pages {
            let (here, after) = rest.split_at_mut(page.at.len());
            rest = after;
            if page.state == State::Wanted {
                let into = CopyBuf::FromGrant(here.as_flattened_mut());
                list.push(copy_op(frontend, page.gref, 0, into));
            }
        }
        if !list.is_empty() {
            grants.copy(&mut list);
            stats.copied_pages.add(list.len() as u64);
        }
        for (page, op) in wanted(&mut self.pages).zip(&list) {
            let okay = op.status == GrantStatus::Okay;
            page.state = if okay { State::Read } else { State::Failed };
        }
        *ops = recycle(list);
    }
}

/// Returns the pages that are neither read nor failed.
fn wanted(pages: &mut [Table]) -> impl Iterator<Item = &mut Table> {
    pages.iter_mut().filter(|page| page.state == State::Wanted)
}

impl Table {
    fn read_from(&mut self, memory: &impl SharedMemory, raw: &mut [Raw]) {
        let into = raw.get_mut(self.at.clone()).unwrap_or_default();
        let read = memory.read_bytes(0, into.as_flattened_mut()).is_some();
        self.state = if read { State::Read } else { State::Failed };
    }
}
