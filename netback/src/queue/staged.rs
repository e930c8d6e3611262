//! Staging grants: guest pages that stay mapped because the guest has promised to use them
//! repeatedly (`XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING`).

use alloc::collections::BTreeMap;
use pvio_grant_table::policy::GrantsStay;
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_ring::proto::netif::{CtrlStatus, GrefEntry};
use pvio_ring::shm::{Region, SharedMemory};

/// Limit of staged pages per queue: one for each slot, 256 in each direction.
pub const STAGED_MAX: usize = 512;

/// Staged pages of one queue. Dropping it unmaps them.
///
/// No page is in use when the guest removes it: a batch is copied within one poll, and control
/// requests are executed between polls.
pub(super) struct Staged<M> {
    pages: BTreeMap<GrantRef, Page<M>>,
}

struct Page<M> {
    mapping: M,
    writable: bool,
}

impl<M: SharedMemory> Staged<M> {
    pub const fn new(_promise: GrantsStay) -> Self {
        Self { pages: BTreeMap::new() }
    }

    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Maps these pages, either all or none. Each has its own mapping, so that each can be unmapped
    /// separately.
    pub fn add(
        &mut self,
        mapper: &impl GrantMapper<Mapping = M>,
        peer: DomId,
        list: &[GrefEntry],
    ) -> CtrlStatus {
        if self.pages.len().saturating_add(list.len()) > STAGED_MAX {
            return CtrlStatus::InvalidParameter;
        }
        for (done, entry) in list.iter().enumerate() {
            let access = if entry.read_only { Access::ReadOnly } else { Access::ReadWrite };
            let mapped = match self.pages.contains_key(&entry.gref) {
                true => None,
                false => mapper.map(peer, &[entry.gref], access).ok(),
            };
            let Some(mapping) = mapped else {
                let added = list.iter().take(done);
                added.for_each(|entry| drop(self.pages.remove(&entry.gref)));
                return CtrlStatus::InvalidParameter;
            };
            self.pages.insert(entry.gref, Page { mapping, writable: !entry.read_only });
        }
        CtrlStatus::Success
    }

    /// Unmaps these pages. Sets the status of each entry and returns the number of pages that were
    /// mapped.
    pub fn remove(&mut self, list: &mut [GrefEntry]) -> u32 {
        let mut count = 0_u32;
        for entry in list {
            let there = self.pages.remove(&entry.gref).is_some();
            count = count.saturating_add(u32::from(there));
            let status = if there { CtrlStatus::Success } else { CtrlStatus::InvalidParameter };
            entry.status = status as u16;
        }
        count
    }

    /// Executes copies: those of staged pages through the mappings, all others with `others`.
    /// Returns the number of copies through mappings.
    pub fn copy(&self, ops: &mut [CopyOp<'_>], others: &impl GrantCopier) -> usize {
        let mut count = 0_usize;
        let here = |op: &CopyOp<'_>| {
            let page = self.pages.get(&op.gref)?;
            let writes = matches!(op.with, CopyBuf::ToGrant(_));
            (page.writable || !writes).then_some(&page.mapping)
        };
        let mut rest = ops;
        loop {
            let strange = rest.iter().take_while(|op| here(op).is_none()).count();
            let (run, tail) = core::mem::take(&mut rest).split_at_mut(strange);
            if !run.is_empty() {
                others.copy(run);
            }
            let Some((op, tail)) = tail.split_first_mut() else { break };
            if let Some(page) = here(op) {
                op.status = through(page, op);
                count = count.saturating_add(1);
            }
            rest = tail;
        }
        count
    }
}

/// Executes one copy. Its range is checked against the bounds of the page.
fn through<M: SharedMemory>(page: &M, op: &mut CopyOp<'_>) -> GrantStatus {
    let done = match &mut op.with {
        CopyBuf::FromGrant(to) => page.read_bytes(op.offset, to),
        CopyBuf::ToGrant(from) => page.write_bytes(op.offset, from),
    };
    if done.is_some() { GrantStatus::Okay } else { GrantStatus::BadCopyArgument }
}
