//! On-disk structures of qcow2, in big-endian order.
//!
//! Source: `docs/interop/qcow2.rst` of QEMU (before version 9.1: `qcow2.txt`), whose field names are
//! used here. QEMU's structures of the same layout are `QCowHeader`, `QCowExtension` and
//! `QCowSnapshotHeader` (`block/qcow2.h`, `block/qcow2-snapshot.c`).

use core::mem::offset_of;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `QCOW_MAGIC`.
pub const MAGIC: u32 = 0x5146_49fb;

/// The fixed part of the header.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawHeader {
    pub magic: U32,
    pub version: U32,
    pub backing_file_offset: U64,
    pub backing_file_size: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_size: U32,
    pub l1_table_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub nb_snapshots: U32,
    pub snapshots_offset: U64,
    // From version 3 on.
    pub incompatible_features: U64,
    pub compatible_features: U64,
    pub autoclear_features: U64,
    pub refcount_order: U32,
    pub header_length: U32,
    // Only if `header_length` is at least `LEN_WITH_COMPRESSION`.
    pub compression_type: u8,
    pub padding: [u8; 7],
}

impl RawHeader {
    /// Bytes of the header in version 2.
    pub const LEN_V2: usize = offset_of!(Self, incompatible_features);
    /// Minimum length in bytes of the header in version 3.
    pub const LEN_V3: usize = offset_of!(Self, compression_type);
    /// Minimum length in bytes of a header with a compression type.
    pub const LEN_WITH_COMPRESSION: usize = size_of::<Self>();
    /// Offset of the incompatible features in the file.
    pub const INCOMPATIBLE_FEATURES: u64 = offset_of!(Self, incompatible_features) as u64;
    /// Offset of the autoclear features in the file.
    pub const AUTOCLEAR_FEATURES: u64 = offset_of!(Self, autoclear_features) as u64;
}

/// The beginning of a header extension. Its data follow, padded to a multiple of 8 bytes.
#[derive(FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawExtension {
    /// One of [`extension`].
    pub kind: U32,
    /// Bytes of the data.
    pub len: U32,
}

/// Types of header extensions.
pub mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const DATA_FILE_NAME: u32 = 0x4441_5441;
}

/// The fixed part of an entry of the snapshot table. Extra data, id and name follow.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawSnapshot {
    pub l1_table_offset: U64,
    pub l1_size: U32,
    pub id_str_size: U16,
    pub name_size: U16,
    pub date_sec: U32,
    pub date_nsec: U32,
    pub vm_clock_nsec: U64,
    pub vm_state_size: U32,
    pub extra_data_size: U32,
}

/// The first fields of a snapshot's extra data (`QCowSnapshotExtraData`).
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawSnapshotExtra {
    pub vm_state_size_large: U64,
    pub disk_size: U64,
}

/// `L1E_OFFSET_MASK`, `L2E_OFFSET_MASK`.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// `QCOW_OFLAG_COMPRESSED`.
const COMPRESSED: u64 = 1 << 62;
/// `QCOW_OFLAG_ZERO`.
const ZERO: u64 = 1;

/// An entry of a first-level table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct L1Entry(U64);

impl L1Entry {
    /// Returns the offset of the second-level table; 0 if there is none.
    pub const fn table(self) -> u64 {
        self.0.get() & OFFSET_MASK
    }
}

/// An entry of a second-level table.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct L2Entry(U64);

impl L2Entry {
    /// Returns the offset of the data cluster of an entry that is not compressed; 0 if there is
    /// none.
    pub const fn cluster(self) -> u64 {
        self.0.get() & OFFSET_MASK
    }

    /// Returns whether the cluster reads as zeroes. Not in version 2.
    pub const fn is_zero(self) -> bool {
        self.0.get() & ZERO != 0
    }

    /// Returns the byte range of compressed data; `None` if the cluster is not compressed. The
    /// length is an upper bound: the format counts sectors.
    pub const fn compressed(self, cluster_bits: u32) -> Option<(u64, u64)> {
        let entry = self.0.get();
        if entry & COMPRESSED == 0 {
            return None;
        }
        let bits = 62 - (cluster_bits - 8);
        let at = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        Some((at, sectors * 512 - (at & 511)))
    }
}

/// An entry of the reference count table: the offset of a block of counts, or 0.
pub type RefcountTableEntry = U64;
