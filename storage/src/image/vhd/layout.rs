//! On-disk structures of VHD, in big-endian order.
//!
//! Source: Microsoft's "Virtual Hard Disk Image Format Specification" 1.0 (2006), "Hard Disk Footer
//! Format" and "Dynamic Disk Header Format", whose field names are used here.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The footer of an image.
#[derive(
    Clone, Copy, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable, PartialEq, Eq, Debug,
)]
#[repr(C)]
pub struct RawFooter {
    pub cookie: [u8; 8],
    pub features: U32,
    pub file_format_version: U32,
    /// Offset of the dynamic disk header.
    pub data_offset: U64,
    pub time_stamp: U32,
    pub creator_application: [u8; 4],
    pub creator_version: U32,
    pub creator_host_os: U32,
    pub original_size: U64,
    pub current_size: U64,
    pub disk_geometry: U32,
    /// One of [`disk_type`].
    pub disk_type: U32,
    pub checksum: U32,
    pub unique_id: [u8; 16],
    pub saved_state: u8,
    pub reserved: [u8; 427],
}

/// Values of [`RawFooter::disk_type`].
pub mod disk_type {
    pub const FIXED: u32 = 2;
    pub const DYNAMIC: u32 = 3;
    pub const DIFFERENCING: u32 = 4;
}

impl RawFooter {
    pub const COOKIE: [u8; 8] = *b"conectix";

    /// Returns whether cookie and checksum are correct.
    pub fn is_valid(&self) -> bool {
        let unsummed = Self { checksum: U32::ZERO, ..*self };
        self.cookie == Self::COOKIE && checksum(unsummed.as_bytes()) == self.checksum.get()
    }
}

/// The header of a dynamic image.
#[derive(Clone, Copy, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawDynamicHeader {
    pub cookie: [u8; 8],
    pub data_offset: U64,
    pub table_offset: U64,
    pub header_version: U32,
    pub max_table_entries: U32,
    pub block_size: U32,
    pub checksum: U32,
    pub parent_unique_id: [u8; 16],
    pub parent_time_stamp: U32,
    pub reserved1: U32,
    pub parent_unicode_name: [u8; 512],
    pub parent_locator_entries: [[u8; 24]; 8],
    pub reserved2: [u8; 256],
}

impl RawDynamicHeader {
    const COOKIE: [u8; 8] = *b"cxsparse";

    /// Returns whether cookie and checksum are correct.
    pub fn is_valid(&self) -> bool {
        let unsummed = Self { checksum: U32::ZERO, ..*self };
        self.cookie == Self::COOKIE && checksum(unsummed.as_bytes()) == self.checksum.get()
    }
}

const _: () = assert!(size_of::<RawFooter>() == 512 && size_of::<RawDynamicHeader>() == 1024);

/// An entry of the block allocation table: the first sector of a block, or [`UNUSED`].
pub type TableEntry = U32;

/// Table entry of a block that was never written.
pub const UNUSED: u32 = u32::MAX;

/// Returns the checksum of a structure whose checksum field is zero: the inverted sum of its bytes.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))
}
