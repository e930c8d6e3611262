//! The footer of a VHD image, and the header of a dynamic one, checked.

use super::super::metadata::{Content, ContentError, read_struct};
use super::layout::{RawDynamicHeader, RawFooter, TableEntry, disk_type};
use alloc::format;

/// Bytes of the footer.
pub const FOOTER: u64 = size_of::<RawFooter>() as u64;
/// Maximum size of a disk: 2040 GiB.
const LARGEST: u64 = 2040 << 30;

/// The footer of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Layout of the image.
    pub kind: Kind,
    /// The footer in the file, to restore it.
    pub(super) raw: RawFooter,
    /// Whether the footer at the end is missing or damaged, and this is the copy at the beginning.
    pub is_copy: bool,
}

/// The layout of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The disk's contents, followed by the footer.
    Fixed,
    /// Blocks in the order of their allocation.
    Dynamic {
        /// Offset of the block table.
        table: u64,
        /// Number of blocks.
        blocks: u32,
        /// Bytes of a block.
        block: u32,
    },
}

impl Footer {
    /// Reads and checks the footer at the end of an image, and the header of a dynamic one. A
    /// dynamic image begins with a copy of the footer, which is used if the footer is invalid: a
    /// writer that is killed while the image grows leaves no footer, and a block device may be
    /// larger than the image.
    ///
    /// # Errors
    /// [`ContentError`].
    pub fn read(content: &dyn Content) -> Result<Self, ContentError> {
        let Some(at) = content.length().checked_sub(FOOTER) else {
            return Err(ContentError::truncated("a footer has 512 bytes"));
        };
        let mut raw: RawFooter = read_struct(content, at)?;
        let is_copy = !raw.is_valid();
        if is_copy {
            let copy: RawFooter = read_struct(content, 0)?;
            if !copy.is_valid() || copy.disk_type == disk_type::FIXED {
                return Err(match [&raw, &copy].map(|found| found.cookie == RawFooter::COOKIE) {
                    [false, false] => ContentError::NotThis("vhd"),
                    [true, _] => ContentError::corrupt("the footer's checksum is wrong"),
                    [false, true] => ContentError::truncated("there is no footer at its end"),
                });
            }
            raw = copy;
        }
        let size = raw.current_size.get();
        if size == 0 || size > LARGEST || !size.is_multiple_of(512) {
            return Err(ContentError::corrupt(format!("a disk of {size} bytes")));
        }
        let kind = match raw.disk_type.get() {
            disk_type::FIXED if size > at => {
                return Err(ContentError::truncated(format!(
                    "the disk has {size} bytes, the file holds {at}"
                )));
            }
            disk_type::FIXED => Kind::Fixed,
            disk_type::DYNAMIC => read_header(content, raw.data_offset.get(), size)?,
            disk_type::DIFFERENCING => return Err(ContentError::Parent),
            other => return Err(ContentError::corrupt(format!("disk type {other}"))),
        };
        Ok(Self { size, kind, raw, is_copy })
    }
}

fn read_header(content: &dyn Content, at: u64, size: u64) -> Result<Kind, ContentError> {
    if at > content.length() {
        return Err(ContentError::truncated("the header is behind the end of the file"));
    }
    let header: RawDynamicHeader = read_struct(content, at)?;
    if !header.is_valid() {
        return Err(ContentError::corrupt("there is no header where the footer says"));
    }
    let table = header.table_offset.get();
    let (blocks, block) = (header.max_table_entries.get(), header.block_size.get());
    if !block.is_power_of_two() || !(4096..=256 << 20).contains(&block) {
        return Err(ContentError::corrupt(format!("blocks of {block} bytes")));
    }
    if u64::from(blocks) < size.div_ceil(block.into()) {
        return Err(ContentError::corrupt(format!("{blocks} blocks, for a disk of {size} bytes")));
    }
    // Blocks behind the end of the disk are not used.
    let blocks = u32::try_from(size.div_ceil(block.into())).unwrap_or(blocks);
    let bytes = u64::from(blocks) * size_of::<TableEntry>() as u64;
    content.meter().retain(bytes)?;
    match table.checked_add(bytes) {
        Some(end) if end <= content.length() && table.is_multiple_of(512) => {
            Ok(Kind::Dynamic { table, blocks, block })
        }
        _ => Err(ContentError::truncated("the table of blocks is behind the end of the file")),
    }
}
