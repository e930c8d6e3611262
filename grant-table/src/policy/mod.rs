//! Policies for copying from and to a peer's pages. Each is a [`GrantCopier`](crate::GrantCopier),
//! so that a device is independent of the policy, and policies can be compared by measurement.
//!
//! | policy | operation per batch | cost | requirement |
//! |---|---|---|---|
//! | the platform itself | the hypervisor copies | a look-up and a copy by the hypervisor per page | none |
//! | [`Mapped`] | maps, copies, unmaps | page table changes, TLB flushes on all processors | none |
//! | [`CachedMappings`] | maps at first use, caches | the copy | **the peer's promise**: [`GrantsStay`] |
//!
//! [`MappingBudget`] limits the number of cached mappings, per guest and per process. [`GrantCache`] is
//! the cache, used here and by devices that do I/O to mapped pages.

#[cfg(feature = "alloc")]
mod budget;
#[cfg(feature = "alloc")]
mod cache;
#[cfg(feature = "alloc")]
mod cached;
mod mapped;

#[cfg(feature = "alloc")]
pub use budget::{MappingBudget, MappingPermit};
#[cfg(feature = "alloc")]
pub use cache::GrantCache;
#[cfg(feature = "alloc")]
pub use cached::{CachedMappings, GrantsStay};
pub use mapped::Mapped;

use crate::{Access, CopyBuf, CopyOp, GrantStatus};
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};

/// Returns the access that the mapping for a copy needs.
const fn access(op: &CopyOp<'_>) -> Access {
    match op.with {
        CopyBuf::FromGrant(_) => Access::ReadOnly,
        CopyBuf::ToGrant(_) => Access::ReadWrite,
    }
}

/// Returns whether the copy stays within its page.
fn in_page(op: &CopyOp<'_>) -> bool {
    let len = match &op.with {
        CopyBuf::FromGrant(to) => to.len(),
        CopyBuf::ToGrant(from) => from.len(),
    };
    op.offset.checked_add(len).is_some_and(|end| end <= PAGE_SIZE)
}

/// Executes a copy through a mapping of its page.
fn through<M: SharedMemory>(page: &M, op: &mut CopyOp<'_>) {
    let done = match &mut op.with {
        CopyBuf::FromGrant(to) => page.read_bytes(op.offset, to),
        CopyBuf::ToGrant(from) => page.write_bytes(op.offset, from),
    };
    op.status = if done.is_some() { GrantStatus::Okay } else { GrantStatus::GeneralError };
}
