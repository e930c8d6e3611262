//! A guest page that a request uses.

use pvio_grant_table::Access;
use pvio_ring::IoSeg;
use pvio_ring::proto::blkif::Segment;

/// A guest page that a request uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageRequest {
    pub segment: Segment,
    /// Whether the backend writes the guest page: the request reads from the disk.
    pub into_guest: bool,
    /// Whether it is the first page of the request.
    pub first: bool,
    /// Number of pages of the request from this one on.
    pub left: u16,
    /// Whether it is mapped or copied for this request alone: it has no cached mapping.
    pub uncached: bool,
}

impl PageRequest {
    /// Returns a page without its position in the request, which [`number`] sets.
    pub const fn new(segment: Segment, into_guest: bool) -> Self {
        Self { segment, into_guest, first: false, left: 0, uncached: true }
    }

    /// Returns writable access if the guest reads from the disk: the backend then writes guest
    /// memory.
    pub const fn access(&self) -> Access {
        if self.into_guest { Access::ReadWrite } else { Access::ReadOnly }
    }

    /// Returns its part of `buf`, which has the size of a page.
    pub fn io_seg<B>(&self, buf: B) -> IoSeg<B> {
        IoSeg { buf, offset: self.segment.offset(), len: self.segment.len() }
    }
}

/// Sets the position of each page in its request.
pub(super) fn number(pages: &mut [PageRequest]) {
    for (page, left) in pages.iter_mut().rev().zip(1..) {
        page.left = left;
    }
    if let Some(page) = pages.first_mut() {
        page.first = true;
    }
}
