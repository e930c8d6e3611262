//! Mapping of a file's blocks: extents, or the indirect blocks of ext2 and ext3.

use super::layout::{Extent, ExtentHeader, ExtentIndex, flags};
use super::volume::{Node, Volume};
use crate::guest::fs::FsError;
use zerocopy::FromBytes;

/// A range of a file's blocks that is contiguous on the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Number of the first block on the disk. `None` if the range reads as zeros: a hole, or an
    /// unwritten extent.
    pub start: Option<u64>,
    /// Number of blocks.
    pub blocks: u64,
}

const MAGIC: u16 = 0xf30a;
/// `EXT4_MAX_EXTENT_DEPTH`.
const DEPTH_MAX: u16 = 5;
/// A longer extent is an unwritten one (`EXT_INIT_MAX_LEN`).
const WRITTEN_MAX: u16 = 32_768;
const ENTRY: usize = 12;
/// Number of direct block pointers in the inode; three more are the roots of one to three levels of
/// indirect blocks.
const DIRECT: u64 = 12;

/// Returns the contiguous range that begins with block number `block` of a file.
///
/// # Errors
/// [`FsError::Corrupt`], or the disk's error.
pub fn run(volume: &Volume, node: &Node, block: u64) -> Result<Run, FsError> {
    if node.inode.flags.get() & flags::EXTENTS != 0 {
        extents(volume, node, block)
    } else {
        tables(volume, node, block)
    }
}

fn extents(volume: &Volume, node: &Node, block: u64) -> Result<Run, FsError> {
    let Ok(wanted) = u32::try_from(block) else {
        return Err(corrupt("a file longer than its extents can tell"));
    };
    let mut here = node.inode.block.to_vec();
    let mut depth = None;
    // End of the hole, if `block` is not mapped.
    let mut end = u64::from(u32::MAX) + 1;
    loop {
        let (header, entries) = header(&here)?;
        let level = header.depth.get();
        if level > DEPTH_MAX || depth.is_some_and(|above| level.checked_add(1) != Some(above)) {
            return Err(corrupt("an extent tree of the wrong depth"));
        }
        depth = Some(level);
        let key =
            |entry: &[u8]| entry.first_chunk().map_or(u32::MAX, |bytes| u32::from_le_bytes(*bytes));
        let after = entries.partition_point(|entry| key(entry) <= wanted);
        if let Some(next) = entries.get(after) {
            end = end.min(key(next).into());
        }
        let hole = Run { start: None, blocks: end.saturating_sub(block) };
        let Some(entry) = after.checked_sub(1).and_then(|n| entries.get(n)) else {
            return Ok(hole);
        };
        if level == 0 {
            return leaf(volume, entry, block, hole);
        }
        let (index, _) = ExtentIndex::ref_from_prefix(entry).map_err(|_| cut())?;
        let at = u64::from(index.leaf_hi.get()) << 32 | u64::from(index.leaf_lo.get());
        here = volume.block(at)?;
        check_tail(volume, node, &here)?;
    }
}

fn leaf(volume: &Volume, entry: &[u8], block: u64, hole: Run) -> Result<Run, FsError> {
    let (extent, _) = Extent::ref_from_prefix(entry).map_err(|_| cut())?;
    let (first, len) = (u64::from(extent.block.get()), extent.len.get());
    let written = len <= WRITTEN_MAX;
    let len = u64::from(if written { len } else { len - WRITTEN_MAX });
    let within = block - first;
    if within >= len {
        return Ok(hole);
    }
    let start = u64::from(extent.start_hi.get()) << 32 | u64::from(extent.start_lo.get());
    volume.check_blocks(start, len)?;
    Ok(Run { start: written.then_some(start + within), blocks: len - within })
}

/// Returns the header of an extent block and its entries; fails if they are not in ascending order.
fn header(bytes: &[u8]) -> Result<(&ExtentHeader, Vec<&[u8]>), FsError> {
    let (header, rest) = ExtentHeader::ref_from_prefix(bytes).map_err(|_| cut())?;
    let entries = usize::from(header.entries.get());
    if header.magic.get() != MAGIC || entries > usize::from(header.max.get()) {
        return Err(corrupt("an extent block that is none"));
    }
    let list = rest.get(..entries * ENTRY).ok_or_else(cut)?;
    let entries: Vec<&[u8]> = list.chunks_exact(ENTRY).collect();
    if !entries.is_sorted_by_key(|entry| entry.first_chunk().map(|b| u32::from_le_bytes(*b))) {
        return Err(corrupt("extents out of order"));
    }
    Ok((header, entries))
}

/// Verifies the checksum after an extent block's entries.
fn check_tail(volume: &Volume, node: &Node, block: &[u8]) -> Result<(), FsError> {
    let (header, _) = ExtentHeader::ref_from_prefix(block).map_err(|_| cut())?;
    let at = size_of::<ExtentHeader>() + usize::from(header.max.get()) * ENTRY;
    let (covered, tail) = block.split_at_checked(at).ok_or_else(cut)?;
    let Some(tail) = tail.first_chunk() else { return Ok(()) };
    volume.check(node.seed, covered, u32::from_le_bytes(*tail), "an extent block")
}

fn tables(volume: &Volume, node: &Node, block: u64) -> Result<Run, FsError> {
    let per_table = volume.block_size / 4;
    if block < DIRECT {
        return pointers(volume, &node.inode.block, block, DIRECT - block);
    }
    let mut block = block - DIRECT;
    let mut span = per_table;
    for level in 0..3_u64 {
        if block < span {
            return indirect(volume, node, block, level, per_table);
        }
        block -= span;
        span *= per_table;
    }
    Err(corrupt("a file longer than its tables can tell"))
}

/// Returns the range from a block that is reached through `level + 1` levels of indirect blocks;
/// `block` counts from the first such block.
fn indirect(
    volume: &Volume,
    node: &Node,
    block: u64,
    level: u64,
    per_table: u64,
) -> Result<Run, FsError> {
    let mut span = per_table.pow(u32::try_from(level).unwrap_or_default());
    let mut table = pointer(&node.inode.block, DIRECT + level)?;
    let mut rest = block;
    loop {
        if table == 0 {
            return Ok(Run { start: None, blocks: span * per_table - rest });
        }
        let bytes = volume.block(table)?;
        let (slot, within) = (rest / span, rest % span);
        if span == 1 {
            return pointers(volume, &bytes, slot, per_table - slot);
        }
        (table, rest, span) = (pointer(&bytes, slot)?, within, span / per_table);
    }
}

/// Returns the contiguous range that a list of pointers describes from entry `first` on.
fn pointers(volume: &Volume, list: &[u8], first: u64, most: u64) -> Result<Run, FsError> {
    let start = pointer(list, first)?;
    let mut blocks = 1;
    while blocks < most {
        let next = pointer(list, first + blocks)?;
        if next != if start == 0 { 0 } else { start + blocks } {
            break;
        }
        blocks += 1;
    }
    if start == 0 {
        return Ok(Run { start: None, blocks });
    }
    volume.check_blocks(start, blocks)?;
    Ok(Run { start: Some(start), blocks })
}

fn pointer(list: &[u8], n: u64) -> Result<u64, FsError> {
    let at = usize::try_from(n).unwrap_or(usize::MAX).saturating_mul(4);
    let bytes = list.get(at..).and_then(<[u8]>::first_chunk).ok_or_else(cut)?;
    Ok(u32::from_le_bytes(*bytes).into())
}

fn cut() -> FsError {
    corrupt("a structure that is cut short")
}

fn corrupt(what: &str) -> FsError {
    FsError::Corrupt(what.into())
}
