//! Grant references: access for one domain to pages of another.
//!
//! | module | contents |
//! |---|---|
//! | [`v1`] | the version 1 entry and its rules: grant, use, end access (`grant_table.h`) |
//! | [`policy`] | how to copy to and from pages: temporary mappings, cached mappings |
//! | this module | the traits that a device uses, see below |
//!
//! [`Granter`] grants pages, [`GrantMapper`] maps them, [`GrantCopier`] copies from and to them. A
//! platform implements these traits. A device has no other access to memory of other domains.
//! Everything that a peer names is hostile: every operation has its own status, and the caller must
//! check every status (XSA-361, XSA-362, XSA-365, XSA-396).
//! ```
//! use pvio_grant_table::{Access, DomId, GrantRef, v1::GrantTable};
//! use pvio_ring::shm::HeapMemory;
//!
//! // The grant table of domain 2, one page: 512 entries.
//! let table = GrantTable::new(HeapMemory::pages(1));
//! table.grant(GrantRef(8), DomId(1), 0x42, Access::ReadWrite)?;
//! // Domain 1 uses it …
//! assert_eq!(table.pin(GrantRef(8), DomId(1), Access::ReadWrite)?, 0x42);
//! // … so the grant cannot be ended now.
//! assert!(table.end_access(GrantRef(8)).is_err());
//! table.unpin(GrantRef(8), Access::ReadWrite);
//! table.end_access(GrantRef(8))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

#[cfg(feature = "alloc")]
extern crate alloc;

pub mod policy;
mod status;
pub mod v1;

pub use pvio_ring::{DomId, GrantRef};
pub use status::GrantStatus;

use pvio_ring::shm::SharedMemory;

/// Access of the other domain to a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Access {
    /// Read only (`GTF_readonly`).
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// The reason why memory could not be granted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrantError {
    /// The domain has no free page that could be granted.
    #[error("the domain has no free page to share")]
    OutOfPages,
    /// Every grant table entry is in use.
    #[error("the grant table is full")]
    OutOfEntries,
    /// The page does not belong to this domain.
    #[error("the page does not belong to this domain")]
    NotOurs,
    /// The hypervisor rejected the grant.
    #[error("the hypervisor rejected the grant")]
    Refused(#[source] GrantStatus),
}

impl GrantError {
    /// Returns what the operator can do next, if anything.
    #[must_use]
    pub const fn remedy(self) -> Option<&'static str> {
        match self {
            Self::OutOfPages => Some("give the domain more memory"),
            Self::OutOfEntries => Some("raise the domain's max_grant_frames"),
            Self::NotOurs | Self::Refused(_) => None,
        }
    }
}

/// The other domain still uses the page. The page must not be reused until a later call succeeds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("grant {0} is still in use by the other domain")]
pub struct Busy(pub GrantRef);

/// Grants other domains access to pages of this domain.
pub trait Granter {
    /// Pages of this domain that can be granted. Freed when the last clone is dropped.
    type Pages: SharedMemory + Clone + Send + 'static;

    /// Allocates `count` zeroed pages, contiguous in this domain's address space. They are
    /// zeroed so that a page that is only partly used exposes no other data (XSA-403).
    ///
    /// # Errors
    /// [`GrantError::OutOfPages`].
    fn alloc_pages(&self, count: usize) -> Result<Self::Pages, GrantError>;

    /// Grants `peer` access to page number `page` of `pages`.
    ///
    /// # Errors
    /// Any [`GrantError`].
    fn grant(
        &self,
        peer: DomId,
        pages: &Self::Pages,
        page: usize,
        access: Access,
    ) -> Result<GrantRef, GrantError>;

    /// Ends a grant. The page may be reused only after this call has succeeded (XSA-396).
    ///
    /// # Errors
    /// [`Busy`] while the peer has it mapped or is copying.
    fn end_access(&self, gref: GrantRef) -> Result<(), Busy>;
}

/// Maps pages that other domains have granted.
pub trait GrantMapper {
    /// Mapped pages. Dropping the value unmaps them. Several requests may use a cached mapping at
    /// the same time.
    type Mapping: SharedMemory + Send + Sync + 'static;

    /// Maps pages of `domain` at consecutive addresses, for example a ring. Maps all or none.
    ///
    /// # Errors
    /// The status of the first page that could not be mapped.
    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus>;

    /// Maps pages of `domain` separately, with as few hypervisor calls as possible. Passes each
    /// result to `each` in order, with its index. Every index is reported exactly once.
    ///
    /// A platform may keep all pages of one call mapped until the last of them is dropped, because
    /// they may be a single mapping of the kernel. Pages that are released together should therefore
    /// be mapped together. A frontend that gets a response while its page is still in use treats
    /// the backend as broken (Linux's blkfront, since XSA-396).
    fn map_each(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
        each: &mut dyn FnMut(usize, Result<Self::Mapping, GrantStatus>),
    ) {
        for (i, gref) in grefs.iter().enumerate() {
            each(i, self.map(domain, core::slice::from_ref(gref), access));
        }
    }
}

impl<T: GrantMapper + ?Sized> GrantMapper for &T {
    type Mapping = T::Mapping;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus> {
        T::map(self, domain, grefs, access)
    }

    fn map_each(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
        each: &mut dyn FnMut(usize, Result<Self::Mapping, GrantStatus>),
    ) {
        T::map_each(self, domain, grefs, access, each);
    }
}

/// One copy between a granted page and private memory (`struct gnttab_copy`).
#[derive(Debug)]
pub struct CopyOp<'a> {
    /// The domain that granted the page.
    pub domain: DomId,
    /// The page.
    pub gref: GrantRef,
    /// Offset in the page, in bytes. Offset plus length must stay within the page.
    pub offset: usize,
    /// The private memory, and the direction.
    pub with: CopyBuf<'a>,
    /// Result of the copy.
    pub status: GrantStatus,
}

/// The private memory of a copy; the variant is the direction.
#[derive(Debug)]
pub enum CopyBuf<'a> {
    /// From the granted page.
    FromGrant(&'a mut [u8]),
    /// To the granted page.
    ToGrant(&'a [u8]),
}

/// Copies from and to pages that other domains have granted, without mapping them.
pub trait GrantCopier {
    /// Executes every copy, in any order, and sets the status of each.
    fn copy(&self, ops: &mut [CopyOp<'_>]);
}
