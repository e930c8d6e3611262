//! Grant copies between the guest's pages and bounce buffers.

use super::request::PageRequest;
use super::{Buf, Context, Pages};
use alloc::vec::Vec;
use pvio_grant_table::{CopyBuf, CopyOp, DomId, GrantCopier, GrantRef, GrantStatus};
use pvio_ring::shm::{Either, SharedMemory};

impl<M: SharedMemory> Pages<M> {
    /// Takes a bounce buffer for each page that is not served from the cache, and copies in the
    /// data to be written to the disk, with one hypercall.
    pub(super) fn copy_in<P: GrantCopier>(
        &mut self,
        context: Context<'_, P>,
        requests: &[PageRequest],
        buffers: &mut [Option<Buf<M>>],
    ) {
        self.pool.fill(self.most);
        let Self { places, pool, .. } = self;
        places.clear();
        let mut ops = recycle(core::mem::take(&mut self.ops));
        let mut next = None;
        let pages = requests.iter().zip(buffers.iter_mut()).enumerate();
        for (i, (request, buf)) in pages.filter(|(_, (request, _))| request.uncached) {
            let gref = request.segment.gref;
            // The pages of a request are contiguous if possible.
            if request.first {
                next = None;
            }
            let page = next.and_then(|next| pool.take(next, gref)).or_else(|| {
                let place = pool.place_for(usize::from(request.left))?;
                pool.take(place, gref)
            });
            let Some(page) = page else { continue };
            next = Some(page.number() + 1);
            let Either::B(Either::B(page)) = buf.insert(Either::B(Either::B(page))) else {
                continue;
            };
            if request.into_guest {
                continue;
            }
            let (offset, len) = (request.segment.offset(), request.segment.len());
            let Some(into) = page.bytes().get_mut(offset..offset + len) else { continue };
            ops.push(copy_op(context.frontend, gref, offset, CopyBuf::FromGrant(into)));
            places.push(i as u32);
        }
        if ops.is_empty() {
            self.ops = recycle(ops);
            return;
        }
        context.copy(&mut ops);
        // Only the failed pages are left.
        let mut outcomes = ops.iter().map(|op| op.status);
        places.retain(|_| outcomes.next() != Some(GrantStatus::Okay));
        self.ops = recycle(ops);
        for place in places.iter() {
            let failed = buffers.get_mut(*place as usize).and_then(Option::take);
            if let Some(Either::B(Either::B(page))) = failed {
                pool.release(page);
            }
        }
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
    fn recycled_copy_list_keeps_capacity() {
        let mut page = [0; 8];
        let mut ops = Vec::with_capacity(100);
        ops.push(copy_op(DomId(1), GrantRef(8), 0, CopyBuf::FromGrant(&mut page)));
        let (room, at) = (ops.capacity(), ops.as_ptr().addr());
        let again = recycle(ops);
        assert_eq!((again.capacity(), again.as_ptr().addr(), again.len()), (room, at, 0));
    }
}
