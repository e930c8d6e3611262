//! Segments of indirect requests: read exactly once, from guest pages into private memory.

use super::Context;
use super::cached::CachedPages;
use super::copies::{copy_op, recycle};
use alloc::vec::Vec;
use core::ops::Range;
use pvio_grant_table::{Access, CopyBuf, CopyOp, GrantCopier, GrantMapper, GrantRef, GrantStatus};
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
    Unread,
    Read,
    Failed,
}

impl Tables {
    /// Declares the segments of a request. Returns their range in `raw`.
    pub fn declare(&mut self, indirect: &Indirect) -> Range<usize> {
        let first = self.raw.len();
        for (gref, count) in indirect.pages() {
            let start = self.raw.len();
            self.raw.resize(start + count, Raw::default());
            self.pages.push(Table { gref, at: start..start + count, state: State::Unread });
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

    /// Returns whether no tables are declared.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Reads the pages that have cached mappings, and maps and caches others while there is room.
    /// Other pages stay unread.
    pub fn read_cached<P: GrantMapper>(
        &mut self,
        context: Context<'_, P>,
        cached: &mut CachedPages<P::Mapping>,
    ) {
        let Context { frontend, stats, .. } = context;
        for page in &mut self.pages {
            if let Some(memory) = cached.get(frontend, page.gref) {
                stats.reused_pages.add(1);
                page.read_from(&*memory, &mut self.raw);
            } else if let Some(room) = cached.room() {
                stats.mapped_pages.add(1);
                match context.map(page.gref, Access::ReadWrite) {
                    Ok(memory) => {
                        let memory = cached.insert(frontend, page.gref, memory, room);
                        page.read_from(&memory, &mut self.raw);
                    }
                    // It is mapped temporarily or copied instead.
                    Err(status) if status.is_exhaustion() => {}
                    Err(_) => page.state = State::Failed,
                }
            }
        }
    }

    /// Maps the unread pages while they are read. Pages that cannot be mapped for want of resources
    /// stay unread.
    pub fn map<P: GrantMapper>(&mut self, context: Context<'_, P>) {
        let Self { raw, pages, grefs } = self;
        grefs.clear();
        grefs.extend(unread(pages).map(|page| page.gref));
        if grefs.is_empty() {
            return;
        }
        // The callback receives them in order.
        let mut pages = unread(pages);
        context.map_each(grefs, Access::ReadOnly, &mut |_, mapped| {
            let Some(page) = pages.next() else { return };
            match mapped {
                Ok(memory) => page.read_from(&memory, raw),
                Err(status) if status.is_exhaustion() => {}
                Err(_) => page.state = State::Failed,
            }
        });
    }

    /// Copies the unread pages, with one call.
    pub fn copy<P: GrantCopier>(
        &mut self,
        context: Context<'_, P>,
        ops: &mut Vec<CopyOp<'static>>,
    ) {
        let mut list = recycle(core::mem::take(ops));
        let mut rest = self.raw.as_mut_slice();
        // Their segments are in `raw` in the order of the pages, without gaps.
        for page in &self.pages {
            let (here, after) = rest.split_at_mut(page.at.len());
            rest = after;
            if page.state == State::Unread {
                let into = CopyBuf::FromGrant(here.as_flattened_mut());
                list.push(copy_op(context.frontend, page.gref, 0, into));
            }
        }
        context.copy(&mut list);
        for (page, op) in unread(&mut self.pages).zip(&list) {
            let okay = op.status == GrantStatus::Okay;
            page.state = if okay { State::Read } else { State::Failed };
        }
        *ops = recycle(list);
    }
}

/// Returns the pages that are neither read nor failed.
fn unread(pages: &mut [Table]) -> impl Iterator<Item = &mut Table> {
    pages.iter_mut().filter(|page| page.state == State::Unread)
}

impl Table {
    fn read_from(&mut self, memory: &impl SharedMemory, raw: &mut [Raw]) {
        let into = raw.get_mut(self.at.clone()).unwrap_or_default();
        let read = memory.read_bytes(0, into.as_flattened_mut()).is_some();
        self.state = if read { State::Read } else { State::Failed };
    }
}
