//! The footer of a VHD image, and the header of a dynamic one.
//!
//! After Microsoft's "Virtual Hard Disk Image Format Specification" 1.0.

use super::super::content::{Bytes, Content, ContentError};
use alloc::format;

/// Bytes of the footer.
pub const FOOTER: u64 = 512;
const HEADER: usize = 1024;
/// Magic number of a footer.
const COOKIE: &[u8] = b"conectix";
/// Disk type of a fixed image.
const FIXED: u32 = 2;
/// Maximum size of a disk: 2040 GiB.
const LARGEST: u64 = 2040 << 30;

/// The footer of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Layout of the image.
    pub kind: Kind,
    /// The bytes of the footer, to restore it.
    pub bytes: [u8; FOOTER as usize],
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
        let mut bytes = [0; FOOTER as usize];
        content.read(at, &mut bytes)?;
        let is_copy = !is_sound(&bytes);
        if is_copy {
            let mut copy = [0; FOOTER as usize];
            content.read(0, &mut copy)?;
            if !is_sound(&copy) || Bytes(&copy).u32(60) == FIXED {
                return Err(match [&bytes, &copy].map(|found| found.starts_with(COOKIE)) {
                    [false, false] => ContentError::NotThis("vhd"),
                    [true, _] => ContentError::corrupt("the footer's checksum is wrong"),
                    [false, true] => ContentError::truncated("there is no footer at its end"),
                });
            }
            bytes = copy;
        }
        let fields = Bytes(&bytes);
        let size = fields.u64(48);
        if size == 0 || size > LARGEST || !size.is_multiple_of(512) {
            return Err(ContentError::corrupt(format!("a disk of {size} bytes")));
        }
        let kind = match fields.u32(60) {
            FIXED if size > at => {
                return Err(ContentError::truncated(format!(
                    "{size} bytes, with {at} of them there"
                )));
            }
            FIXED => Kind::Fixed,
            3 => read_header(content, fields.u64(16), size)?,
            4 => return Err(ContentError::Parent),
            other => return Err(ContentError::corrupt(format!("disk type {other}"))),
        };
        Ok(Self { size, kind, bytes, is_copy })
    }
}

/// Returns whether the bytes are a valid footer.
fn is_sound(bytes: &[u8; FOOTER as usize]) -> bool {
    bytes.starts_with(COOKIE) && sum(bytes, 64) == Bytes(bytes).u32(64)
}

fn read_header(content: &dyn Content, at: u64, size: u64) -> Result<Kind, ContentError> {
    if at > content.length() {
        return Err(ContentError::truncated("the header is behind the end of the file"));
    }
    let mut bytes = [0; HEADER];
    content.read(at, &mut bytes)?;
    let header = Bytes(&bytes);
    if !bytes.starts_with(b"cxsparse") || sum(&bytes, 36) != header.u32(36) {
        return Err(ContentError::corrupt("there is no header where the footer says"));
    }
    let (table, blocks, block) = (header.u64(16), header.u32(28), header.u32(32));
    if !block.is_power_of_two() || !(4096..=256 << 20).contains(&block) {
        return Err(ContentError::corrupt(format!("blocks of {block} bytes")));
    }
    if u64::from(blocks) < size.div_ceil(block.into()) {
        return Err(ContentError::corrupt(format!("{blocks} blocks, for a disk of {size} bytes")));
    }
    // Blocks behind the end of the disk are not used.
    let blocks = u32::try_from(size.div_ceil(block.into())).unwrap_or(blocks);
    content.meter().keep(u64::from(blocks) * 4)?;
    match table.checked_add(u64::from(blocks) * 4) {
        Some(end) if end <= content.length() && table.is_multiple_of(512) => {
            Ok(Kind::Dynamic { table, blocks, block })
        }
        _ => Err(ContentError::truncated("the table of blocks is behind the end of the file")),
    }
}

/// Returns the checksum of a structure: the inverted sum of all bytes except the checksum field.
fn sum(bytes: &[u8], at: usize) -> u32 {
    let others = bytes.iter().enumerate().filter(|(i, _)| !(at..at + 4).contains(i));
    !others.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}
