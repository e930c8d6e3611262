//! Grant copies between the guest's pages and bounce buffers.

use super::{Finished, Pages, StepError};
use crate::stats::Stats;
use alloc::vec::Vec;
use core::ops::Range;
use pvio_grant_table::{CopyBuf, CopyOp, DomId, GrantCopier, GrantRef, GrantStatus};
use pvio_ring::shm::{Either, SharedMemory};

impl<M: SharedMemory> Pages<M> {
    /// Takes a bounce buffer for each page that is not served from the cache, and copies in the
    /// data to be written to the disk, with one hypercall.
    pub(super) fn copy_in<P: GrantCopier>(
        &mut self,
        range: Range<usize>,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
    ) {
        self.pool.fill(self.most);
        let Self { wanted, found, places, pool, .. } = self;
        places.clear();
        let wanted = wanted.get(range.clone()).unwrap_or_default();
        let found = found.get_mut(range).unwrap_or_default();
        let mut ops = recycle(core::mem::take(&mut self.ops));
        let mut next = None;
        let pages = wanted.iter().zip(found.iter_mut()).enumerate();
        for (i, (want, buf)) in pages.filter(|(_, (want, _))| want.beyond) {
            let gref = want.segment.gref;
            // The pages of a request are contiguous if possible.
            if want.first {
                next = None;
            }
            let page = next.and_then(|next| pool.take(next, gref)).or_else(|| {
                let place = pool.place_for(usize::from(want.left))?;
                pool.take(place, gref)
            });
            let Some(page) = page else { continue };
            next = Some(page.number() + 1);
            let Either::B(Either::B(page)) = buf.insert(Either::B(Either::B(page))) else {
                continue;
            };
            if want.into_guest {
                continue;
            }
            let (offset, len) = (want.segment.offset(), want.segment.len());
            let Some(into) = page.bytes().get_mut(offset..offset + len) else { continue };
            ops.push(copy_op(frontend, want.segment.gref, offset, CopyBuf::FromGrant(into)));
            places.push(i as u32);
        }
        if ops.is_empty() {
            self.ops = recycle(ops);
            return;
        }
        grants.copy(&mut ops);
        stats.copied_pages.add(ops.len() as u64);
        // Only the failed pages are left.
        let mut outcomes = ops.iter().map(|op| op.status);
        places.retain(|_| outcomes.next() != Some(GrantStatus::Okay));
        self.ops = recycle(ops);
        for place in places.iter() {
            let failed = found.get_mut(*place as usize).and_then(Option::take);
            if let Some(Either::B(Either::B(page))) = failed {
                pool.give_back(page);
            }
        }
    }

    /// Copies data that was read from the disk to the guest, with one hypercall.
    pub(super) fn copy_out<P: GrantCopier>(
        &mut self,
        grants: &P,
        frontend: DomId,
        finished: &mut [Finished],
        stats: &Stats,
    ) {
        let mut ops = recycle(core::mem::take(&mut self.ops));
        let mut rest = self.returned.as_mut_slice();
        let mut at = 0;
        for done in finished.iter_mut().filter(|done| !done.copy.is_empty()) {
            // The pages of the operations are in the order in which they were returned.
            let (_, after) = rest.split_at_mut(done.copy.start - at);
            let (here, after) = after.split_at_mut(done.copy.len());
            (rest, at) = (after, done.copy.end);
            for seg in here {
                let Either::B(Either::B(page)) = &mut seg.buf else { continue };
                let gref = self.pool.gref(page);
                let from = page.bytes().get(seg.offset..seg.offset + seg.len).unwrap_or_default();
                ops.push(copy_op(frontend, gref, seg.offset, CopyBuf::ToGrant(from)));
                done.copies += 1;
            }
        }
        if !ops.is_empty() {
            grants.copy(&mut ops);
            stats.copied_pages.add(ops.len() as u64);
        }
        let mut outcomes = ops.iter().map(|op| op.status == GrantStatus::Okay);
        for done in finished {
            let copied = outcomes.by_ref().take(done.copies).filter(|okay| *okay).count();
            if copied < done.copies {
                done.result = Err(StepError::Grant);
            }
        }
        self.ops = recycle(ops);
    }
}

pub(super) fn copy_op(
    domain: DomId,
    gref: GrantRef,
    offset: usize,
    with: CopyBuf<'_>,
) -> CopyOp<'_> {
    // The default is failure: an operation that the copier skips was not done.
    CopyOp { domain, gref, offset, with, status: GrantStatus::GeneralError }
}

/// Returns an empty list with another lifetime in the same allocation.
pub(super) fn recycle<'b>(mut ops: Vec<CopyOp<'_>>) -> Vec<CopyOp<'b>> {
    ops.clear();
    // The standard library collects a list of the same layout in place.
    ops.into_iter().map(|_| -> CopyOp<'b> { unreachable!("the list is empty") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_list_keeps_its_room() {
        let mut page = [0; 8];
        let mut ops = Vec::with_capacity(100);
        ops.push(copy_op(DomId(1), GrantRef(8), 0, CopyBuf::FromGrant(&mut page)));
        let (room, at) = (ops.capacity(), ops.as_ptr().addr());
        let again = recycle(ops);
        assert_eq!((again.capacity(), again.as_ptr().addr(), again.len()), (room, at, 0));
    }
}
