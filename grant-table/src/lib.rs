//! Grant references: how one domain lets another reach some of its pages.
//!
//! | module | holds |
//! |---|---|
//! | [`v1`] | the version 1 entry and its rules: grant, use, end access (`grant_table.h`) |
//! | [`policy`] | ways to copy to and from pages: mapping them for it, keeping them mapped |
//! | this | the traits a device is written against: [`Granter`] gives, [`GrantMapper`] maps, [`GrantCopier`] copies |
//!
//! A platform implements the traits; a device knows nothing else about memory of other domains.
//! Whatever a peer names is hostile: every operation has a status of its own, and every status is
//! to be looked at (XSA-361, XSA-362, XSA-365, XSA-396).
//!
//! ```
//! use pvio_grant_table::{Access, DomId, GrantRef, v1::GrantTable};
//! use pvio_ring::shm::HeapMemory;
//!
//! // The grant table of domain 2, one page: 512 entries.
//! let table = GrantTable::new(HeapMemory::pages(1));
//! table.grant(GrantRef(8), DomId(1), 0x42, Access::ReadWrite)?;
//! // Domain 1 uses it …
//! assert_eq!(table.pin(GrantRef(8), DomId(1), Access::ReadWrite)?, 0x42);
//! // … and for so long it cannot be taken back.
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

/// What the other domain may do with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Access {
    /// Only read (`GTF_readonly`).
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Why memory could not be granted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrantError {
    /// No page is left that could be granted.
    #[error("the domain has no free page left to share; give it more memory")]
    OutOfPages,
    /// Every grant table entry is taken.
    #[error("the grant table is full; raise the domain's max_grant_frames")]
    OutOfEntries,
    /// The page is not one of this domain's.
    #[error("that page is not this domain's to grant")]
    NotOurs,
    /// The hypervisor said no.
    #[error("the hypervisor refused: {0}")]
    Refused(GrantStatus),
}

/// The other domain still uses the page; it must stay as it is until a later try succeeds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("grant {0} is still in use by the other domain")]
pub struct Busy(pub GrantRef);

/// Gives other domains access to pages of this one.
pub trait Granter {
    /// Pages of this domain that can be granted. Freed when the last clone is dropped.
    type Pages: SharedMemory + Clone + Send + 'static;

    /// Allocates `count` zeroed pages, contiguous in this domain's address space. They come
    /// zeroed so that nothing of ours leaks through a page that is only partly used (XSA-403).
    ///
    /// # Errors
    /// [`GrantError::OutOfPages`].
    fn alloc_pages(&self, count: usize) -> Result<Self::Pages, GrantError>;

    /// Lets `peer` use page number `page` of `pages`.
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

    /// Takes a grant back. The page may be reused for something else only after this succeeded
    /// (XSA-396).
    ///
    /// # Errors
    /// [`Busy`] while the peer has it mapped or is copying.
    fn end_access(&self, gref: GrantRef) -> Result<(), Busy>;
}

/// Maps pages other domains granted.
pub trait GrantMapper {
    /// Mapped pages. Dropping it unmaps them. Several requests may use a page that stays mapped at
    /// the same time.
    type Mapping: SharedMemory + Send + Sync + 'static;

    /// Maps pages of `domain` one behind the other, all or none: a ring, say.
    ///
    /// # Errors
    /// The status of the first page that could not be mapped.
    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus>;

    /// Maps pages of `domain`, each by itself, with as few hypervisor calls as can be, and hands
    /// each to `each` in order, with its index. Every index is reported exactly once.
    ///
    /// A platform may keep all pages of one call mapped until the last of them is dropped (one
    /// mapping of the kernel's may be all of them): map together what is let go of together. A
    /// frontend that is told that a request is done and finds its page in use takes the backend for
    /// broken (Linux's blkfront, since XSA-396).
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
    /// Where in the page, in bytes; offset plus length stay within one page.
    pub offset: usize,
    /// The private side.
    pub with: CopyBuf<'a>,
    /// What became of it.
    pub status: GrantStatus,
}

/// The private side of a copy, and so its direction.
#[derive(Debug)]
pub enum CopyBuf<'a> {
    /// Out of the granted page.
    FromGrant(&'a mut [u8]),
    /// Into the granted page.
    ToGrant(&'a [u8]),
}

/// Copies to and from pages other domains granted, without mapping them.
pub trait GrantCopier {
    /// Does every copy, in any order, and leaves a status in each.
    fn copy(&self, ops: &mut [CopyOp<'_>]);
}
