//! The segments of indirect requests: read once, out of pages of the guest's into memory of ours.

use super::copies::{copy_op, recycle};
use super::kept::Kept;
use crate::stats::Stats;
use alloc::vec::Vec;
use core::ops::Range;
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_ring::proto::blkif::Indirect;
use pvio_ring::shm::{Region, SharedMemory};

/// A segment as the guest wrote it.
type Raw = [u8; 8];

/// The segments of all indirect requests of a poll.
#[derive(Debug, Default)]
pub(super) struct Tables {
    raw: Vec<Raw>,
    pages: Vec<Table>,
    /// What one call to the hypervisor is about; reused.
    grefs: Vec<GrantRef>,
}

/// A page of segments.
#[derive(Clone, Debug)]
struct Table {
    gref: GrantRef,
    /// Where its segments go in `raw`.
    at: Range<usize>,
    read: bool,
}

impl Tables {
    /// Asks for the segments of a request; where they will be.
    pub fn want(&mut self, indirect: &Indirect) -> Range<usize> {
        let first = self.raw.len();
        for (gref, count) in indirect.pages() {
            let start = self.raw.len();
            self.raw.resize(start + count, Raw::default());
            self.pages.push(Table { gref, at: start..start + count, read: false });
        }
        first..self.raw.len()
    }

    /// A request's segments, if all of them were read.
    pub fn read(&self, range: Range<usize>) -> Option<&[Raw]> {
        let first = self.pages.partition_point(|page| page.at.start < range.start);
        let mut pages = self.pages.iter().skip(first).take_while(|page| page.at.end <= range.end);
        pages.all(|page| page.read).then(|| self.raw.get(range))?
    }

    pub fn clear(&mut self) {
        self.raw.clear();
        self.pages.clear();
    }

    /// Maps all pages for as long as it takes to read them.
    pub fn map<P: GrantMapper>(&mut self, grants: &P, frontend: DomId, stats: &Stats) {
        let Self { raw, pages, grefs } = self;
        grefs.clear();
        grefs.extend(pages.iter().map(|page| page.gref));
        stats.mapped_pages.add(grefs.len() as u64);
        grants.map_each(frontend, grefs, Access::ReadOnly, &mut |i, mapped| {
            if let (Ok(memory), Some(page)) = (mapped, pages.get_mut(i)) {
                page.read_from(&memory, raw);
            }
        });
    }

    /// Reads all pages, and keeps them mapped.
    pub fn keep<P: GrantMapper>(
        &mut self,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
        kept: &mut Kept<P::Mapping>,
    ) {
        for page in &mut self.pages {
            if let Some(memory) = kept.get(page.gref) {
                stats.reused_pages.add(1);
                page.read_from(&*memory, &mut self.raw);
                continue;
            }
            stats.mapped_pages.add(1);
            let grefs = core::slice::from_ref(&page.gref);
            if let Ok(memory) = grants.map(frontend, grefs, Access::ReadWrite) {
                let memory = kept.insert(page.gref, memory);
                page.read_from(&memory, &mut self.raw);
            }
        }
    }

    /// Copies all pages, in one call.
    pub fn copy<P: GrantCopier>(
        &mut self,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
        ops: &mut Vec<CopyOp<'static>>,
    ) {
        let mut list = recycle(core::mem::take(ops));
        let mut rest = self.raw.as_mut_slice();
        // They lie in `raw` in the order of the pages, without a gap.
        for page in &self.pages {
            let (here, after) = rest.split_at_mut(page.at.len());
            rest = after;
            let into = CopyBuf::FromGrant(here.as_flattened_mut());
            list.push(copy_op(frontend, page.gref, 0, into));
        }
        grants.copy(&mut list);
        stats.copied_pages.add(list.len() as u64);
        for (page, op) in self.pages.iter_mut().zip(&list) {
            page.read = op.status == GrantStatus::Okay;
        }
        *ops = recycle(list);
    }
}

impl Table {
    fn read_from(&mut self, memory: &impl SharedMemory, raw: &mut [Raw]) {
        let into = raw.get_mut(self.at.clone()).unwrap_or_default();
        self.read = memory.read_bytes(0, into.as_flattened_mut()).is_some();
    }
}
