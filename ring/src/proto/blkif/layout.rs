//! Structures of the ring (`io/blkif.h`), little-endian as on all of Xen's architectures.
//!
//! A request has three parts, which are in the slot in this order:
//!
//! | part | native and 64-bit ABI | 32-bit x86 ABI |
//! |---|---|---|
//! | [`RawStart`] | offset 0 | offset 0 |
//! | `id`, `sector_number` | offset 8 (after 4 bytes of padding) | offset 4 |
//! | [segments](RawSegment), [indirect pages](RawIndirectPages) or the number of sectors to discard | offset 24 | offset 20 |
//!
//! Only the padding differs between the ABIs. The parts are copied from the slot as words, and
//! these structures give names to the bytes of the copies.

use zerocopy::little_endian::{I16, U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first 4 bytes of `blkif_request_t`, `blkif_request_discard_t` and
/// `blkif_request_indirect_t`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawStart {
    /// One of [`op`](super::op).
    pub operation: u8,
    /// `nr_segments`; of a discard, `flag`; of an indirect request, `indirect_op`.
    pub second: u8,
    /// `handle`; of an indirect request, `nr_segments`.
    pub third: U16,
}

/// `struct blkif_request_segment`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawSegment {
    pub gref: U32,
    pub first_sect: u8,
    pub last_sect: u8,
    pub pad: U16,
}

/// `handle` of `blkif_request_indirect_t`, and the padding before its `indirect_grefs`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawHandle {
    pub handle: U16,
    pub pad: U16,
}

/// `indirect_grefs` of `blkif_request_indirect_t`.
pub type RawIndirectPages = [U32; super::MAX_INDIRECT_PAGES];

/// `blkif_response_t` after its `id`. Padding follows in the native and the 64-bit ABI.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawResponseEnd {
    pub operation: u8,
    pub pad: u8,
    pub status: I16,
}
