//! On-disk structures of sparse extents, in little-endian order.
//!
//! Source: VMware's "Virtual Disk Format 5.0", "Hosted Sparse Extents" and "Stream-Optimized
//! Compressed Sparse Extents". The fields have the names of its `SparseExtentHeader`.

use core::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector, the unit of all offsets in the format.
pub const SECTOR: u64 = 512;

/// The header of a sparse extent.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawHeader {
    pub magic_number: [u8; 4],
    pub version: U32,
    /// Bits of [`flags`].
    pub flags: U32,
    pub capacity: U64,
    pub grain_size: U64,
    pub descriptor_offset: U64,
    pub descriptor_size: U64,
    pub num_gtes_per_gt: U32,
    pub rgd_offset: U64,
    pub gd_offset: U64,
    pub over_head: U64,
    pub unclean_shutdown: u8,
    /// `singleEndLineChar`, `nonEndLineChar`, `doubleEndLineChar1`, `doubleEndLineChar2`.
    pub line_ends: [u8; 4],
    pub compress_algorithm: U16,
    pub pad: [u8; 433],
}

impl RawHeader {
    pub const MAGIC: [u8; 4] = *b"KDMV";
    /// A file transfer in text mode would have converted these line ends.
    pub const LINE_ENDS: [u8; 4] = *b"\n \r\n";
    /// `COMPRESSION_DEFLATE`.
    pub const DEFLATE: u16 = 1;
    /// `GD_AT_END`: the header at the end of the extent has the directory's offset.
    pub const GD_AT_END: u64 = u64::MAX;
    /// Offset of `unclean_shutdown` in the file.
    pub const UNCLEAN_SHUTDOWN: u64 = offset_of!(Self, unclean_shutdown) as u64;
}

const _: () = assert!(size_of::<RawHeader>() == SECTOR as usize);

/// Bits of [`RawHeader::flags`]; `VMDK4_FLAG_*` in QEMU's `block/vmdk.c`.
pub mod flags {
    /// There is a redundant directory with its own tables.
    pub const REDUNDANT: u32 = 1 << 1;
    /// A table entry of 1 means a grain of zeroes.
    pub const ZEROED_GRAINS: u32 = 1 << 2;
    /// Grains are compressed.
    pub const COMPRESSED: u32 = 1 << 16;
}

/// The marker before the data of a compressed grain.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct GrainMarker {
    /// First sector of the grain on the disk.
    pub lba: U64,
    /// Bytes of the compressed data that follow.
    pub size: U32,
}

impl GrainMarker {
    /// Bytes of a marker.
    pub const LEN: u64 = size_of::<Self>() as u64;
}

/// An entry of a grain directory or of a grain table: a sector of the file.
pub type TableEntry = U32;
