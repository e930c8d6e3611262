//! `/dev/xen/gntalloc`: granting pages of this domain.

use super::ioctl::{call, code};
use super::memory::Source;
use core::mem::offset_of;
use pvio_grant_table::{Access, DomId, GrantRef};
use rustix::io::Errno;
use rustix::ioctl::Opcode;
use std::os::fd::OwnedFd;

/// `struct ioctl_gntalloc_alloc_gref`, for one page.
#[repr(C)]
struct Alloc {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    gref: u32,
}

/// `struct ioctl_gntalloc_dealloc_gref`
#[repr(C)]
struct Dealloc {
    index: u64,
    count: u32,
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Alloc>() == 24 && offset_of!(Alloc, flags) == 2);
    assert!(offset_of!(Alloc, count) == 4 && offset_of!(Alloc, index) == 8);
    assert!(offset_of!(Alloc, gref) == 16);
    assert!(size_of::<Dealloc>() == 16 && offset_of!(Dealloc, count) == 8);
};

pub(super) const ALLOC_GREF: Opcode = code(b'G', 5, size_of::<Alloc>());
pub(super) const DEALLOC_GREF: Opcode = code(b'G', 6, size_of::<Dealloc>());
/// `GNTALLOC_FLAG_WRITABLE`
const WRITABLE: u16 = 1;

/// Open device.
#[derive(Debug)]
pub(crate) struct Gntalloc(OwnedFd);

/// Granted page that the kernel allocated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GrantedPage {
    pub(crate) gref: GrantRef,
    /// Offset in the device at which it can be mapped, in bytes.
    index: u64,
}

impl Gntalloc {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Allocates a zeroed page that `peer` may use.
    pub(crate) fn alloc(&self, peer: DomId, access: Access) -> Result<GrantedPage, Errno> {
        let flags = if access == Access::ReadWrite { WRITABLE } else { 0 };
        let mut alloc = Alloc { domid: peer.0, flags, count: 1, index: 0, gref: 0 };
        // SAFETY: the struct of this ioctl, with room for the one reference that it requests.
        unsafe { call(&self.0, ALLOC_GREF, &mut alloc) }?;
        Ok(GrantedPage { gref: GrantRef(alloc.gref), index: alloc.index })
    }

    /// Ends the grant, or, while the other domain uses it, as soon as that use ends. After that,
    /// and after it is unmapped here, the page is freed.
    pub(crate) fn dealloc(&self, page: GrantedPage) {
        let mut dealloc = Dealloc { index: page.index, count: 1 };
        // SAFETY: the struct of this ioctl. It releases what `alloc` made; a mapping of the page
        // keeps it by its own reference.
        let done = unsafe { call(&self.0, DEALLOC_GREF, &mut dealloc) };
        debug_assert!(done.is_ok(), "DEALLOC_GREF: {done:?}");
    }

    /// Returns the source for mapping the page.
    pub(crate) fn source(&self, page: GrantedPage) -> Source<'_> {
        Source::Device(&self.0, page.index)
    }
}
