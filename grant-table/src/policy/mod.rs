//! Ways to reach a peer's pages, for a device that copies: each is a
//! [`GrantCopier`](crate::GrantCopier), so that the
//! device does not know which it has, and one can be measured against the other.
//!
//! | policy | what it does for a batch | costs | needs |
//! |---|---|---|---|
//! | the platform itself | the hypervisor copies | per page a look-up and a copy by the hypervisor | nothing |
//! | [`Mapped`] | maps every page, copies, unmaps them | page table changes, and flushing them from every processor | nothing |
//! | [`CachedMappings`] | maps a page when it is first used, and keeps it | the copy | **the peer's promise**: [`GrantsStay`] |
//!
//! [`MappingBudget`] bounds what is kept, by a guest and by a process. [`Keep`] is what is kept, for it and for devices that do I/O to mapped pages.

#[cfg(feature = "alloc")]
mod budget;
#[cfg(feature = "alloc")]
mod cached;
#[cfg(feature = "alloc")]
mod keep;
mod mapped;

#[cfg(feature = "alloc")]
pub use budget::{MappingBudget, MappingPermit};
#[cfg(feature = "alloc")]
pub use cached::{CachedMappings, GrantsStay};
#[cfg(feature = "alloc")]
pub use keep::Keep;
pub use mapped::Mapped;

use crate::{Access, CopyBuf, CopyOp, GrantStatus};
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};

/// What the mapping that a copy needs must allow.
const fn access(op: &CopyOp<'_>) -> Access {
    match op.with {
        CopyBuf::FromGrant(_) => Access::ReadOnly,
        CopyBuf::ToGrant(_) => Access::ReadWrite,
    }
}

/// Whether the copy stays within its page.
fn in_page(op: &CopyOp<'_>) -> bool {
    let len = match &op.with {
        CopyBuf::FromGrant(to) => to.len(),
        CopyBuf::ToGrant(from) => from.len(),
    };
    op.offset.checked_add(len).is_some_and(|end| end <= PAGE_SIZE)
}

/// Carries out a copy through its mapped page.
fn through<M: SharedMemory>(page: &M, op: &mut CopyOp<'_>) {
    let done = match &mut op.with {
        CopyBuf::FromGrant(to) => page.read_bytes(op.offset, to),
        CopyBuf::ToGrant(from) => page.write_bytes(op.offset, from),
    };
    op.status = if done.is_some() { GrantStatus::Okay } else { GrantStatus::GeneralError };
}
