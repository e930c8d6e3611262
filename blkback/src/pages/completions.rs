//! Completed operations: their pages are released before a response is written.

use super::copies::{copy_op, recycle};
use super::{Buf, Context, Pages, StepError};
use crate::engine::{EngineError, Segments};
use alloc::vec::Vec;
use core::ops::Range;
use pvio_grant_table::{CopyBuf, GrantCopier, GrantStatus};
use pvio_ring::shm::{Either, SharedMemory};

/// Operations that the engine has completed. Their results are available after
/// [`settle`](Self::settle).
#[derive(Debug)]
#[must_use = "the pages of completed operations are released by `settle`"]
pub(crate) struct Completions<M> {
    list: Vec<Completion>,
    /// The pages of all of them, in the same order.
    segments: Segments<Buf<M>>,
}

/// A completed operation.
#[derive(Debug)]
struct Completion {
    tag: u32,
    result: Result<(), StepError>,
    /// Its pages, if bounce buffers among them must be copied to the guest.
    copy: Range<usize>,
    /// Number of bounce buffers among them.
    copies: usize,
}

/// Completed operations whose data is in the guest's pages and whose pages are released.
#[derive(Debug)]
#[must_use = "the list is reused after `finish`"]
pub(crate) struct Settled<M>(Completions<M>);

impl<M> Default for Completions<M> {
    fn default() -> Self {
        Self { list: Vec::new(), segments: Vec::new() }
    }
}

impl<M: SharedMemory> Completions<M> {
    /// Creates a list with room for the operations of `slots` requests.
    pub(super) fn with_capacity(slots: usize) -> Self {
        Self { list: Vec::with_capacity(slots), segments: Vec::new() }
    }

    /// Adds a completed operation and its pages; `into_guest` if it read from the disk.
    pub fn push(
        &mut self,
        tag: u32,
        result: Result<(), EngineError>,
        into_guest: bool,
        segments: &mut Segments<Buf<M>>,
    ) {
        let first = self.segments.len();
        self.segments.append(segments);
        let copy = first..if into_guest && result.is_ok() { self.segments.len() } else { first };
        let result = result.map_err(StepError::Engine);
        self.list.push(Completion { tag, result, copy, copies: 0 });
    }

    /// Copies data that was read from the disk into bounce buffers to the guest, with one
    /// hypercall, and releases all pages.
    pub fn settle<P: GrantCopier>(
        mut self,
        pages: &mut Pages<M>,
        context: Context<'_, P>,
    ) -> Settled<M> {
        if !self.list.is_empty() && !pages.pool.is_empty() {
            self.copy_out(pages, context);
        }
        pages.release(&mut self.segments);
        Settled(self)
    }

    fn copy_out<P: GrantCopier>(&mut self, pages: &mut Pages<M>, context: Context<'_, P>) {
        let mut ops = recycle(core::mem::take(&mut pages.ops));
        let mut rest = self.segments.as_mut_slice();
        let mut at = 0;
        for done in self.list.iter_mut().filter(|done| !done.copy.is_empty()) {
            let (_, after) = rest.split_at_mut(done.copy.start - at);
            let (here, after) = after.split_at_mut(done.copy.len());
            (rest, at) = (after, done.copy.end);
            for seg in here {
                let Either::B(Either::B(page)) = &mut seg.buf else { continue };
                let gref = pages.pool.gref(page);
                let from = page.bytes().get(seg.offset..seg.offset + seg.len).unwrap_or_default();
                ops.push(copy_op(context.frontend, gref, seg.offset, CopyBuf::ToGrant(from)));
                done.copies += 1;
            }
        }
        context.copy(&mut ops);
        let mut outcomes = ops.iter().map(|op| op.status == GrantStatus::Okay);
        for done in &mut self.list {
            let copied = outcomes.by_ref().take(done.copies).filter(|okay| *okay).count();
            if copied < done.copies {
                done.result = Err(StepError::Grant);
            }
        }
        pages.ops = recycle(ops);
    }
}

impl<M> Settled<M> {
    /// Returns the tag and the result of each operation.
    pub fn results(&self) -> impl Iterator<Item = (u32, Result<(), StepError>)> {
        self.0.list.iter().map(|done| (done.tag, done.result))
    }

    /// Returns the list for reuse.
    pub fn finish(mut self, pages: &mut Pages<M>) {
        self.0.list.clear();
        pages.completions = self.0;
    }
}
