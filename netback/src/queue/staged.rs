//! Staging grants: pages that the guest has promised to use again and again
//! (`XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING`), mapped once and kept.

use alloc::collections::BTreeMap;
use pvio_grant_table::policy::GrantsStay;
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_ring::proto::netif::{CtrlStatus, GrefEntry};
use pvio_ring::shm::{Region, SharedMemory};

/// Pages that a queue keeps mapped for its guest: one for each of its slots, 256 each way.
pub const STAGED_MAX: usize = 512;

/// The pages of one queue. Unmapped when they are dropped.
///
/// None is ever in use while the guest takes it back: a batch's data are copied within one poll, and
/// what the guest asks for is done between two.
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

    /// Maps these pages, all or none. Each by itself, so that each can be unmapped by itself.
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

    /// Unmaps these pages; tells of each entry what became of it, and how many were there.
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

    /// Carries out copies: through the pages that are here, all others by `others`. Returns how many
    /// were here.
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

/// Carries out a copy; both ends were bounded by the page.
fn through<M: SharedMemory>(page: &M, op: &mut CopyOp<'_>) -> GrantStatus {
    let done = match &mut op.with {
        CopyBuf::FromGrant(to) => page.read_bytes(op.offset, to),
        CopyBuf::ToGrant(from) => page.write_bytes(op.offset, from),
    };
    if done.is_some() { GrantStatus::Okay } else { GrantStatus::BadCopyArgument }
}
