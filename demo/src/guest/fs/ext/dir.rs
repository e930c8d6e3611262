//! Entries of a directory, read block after block. Index blocks (`dir_index`) look like unused
//! entries to a linear reader, so the index is ignored and any hash version is supported.

use super::layout::{DirEntry, flags};
use super::map;
use super::volume::{Node, Volume};
use crate::guest::fs::FsError;
use std::ops::ControlFlow;
use zerocopy::FromBytes;

const HEAD: usize = size_of::<DirEntry>();
/// The file type of the entry that contains a block's checksum.
const CHECKSUM: u8 = 0xde;
const TAIL: usize = 12;

/// Calls `each` with the inode number and name of every entry except `.` and `..`, until it breaks.
///
/// # Errors
/// [`FsError::Corrupt`], or the disk's error.
pub fn entries<B>(
    volume: &Volume,
    node: &Node,
    mut each: impl FnMut(u32, &[u8]) -> ControlFlow<B>,
) -> Result<ControlFlow<B>, FsError> {
    if node.has(flags::INLINE_DATA) {
        return inline(volume, node, each);
    }
    let blocks = node.len(volume.has_large_directories()) / volume.block_size;
    let mut block = 0;
    while block < blocks {
        let run = map::run(volume, node, block)?;
        let Some(start) = run.start else {
            // Linux logs a hole in a directory and continues after it.
            block = block.saturating_add(run.blocks);
            continue;
        };
        for n in 0..run.blocks.min(blocks - block) {
            let bytes = volume.block(start + n)?;
            check(volume, node, block + n, &bytes)?;
            if let ControlFlow::Break(found) = list(volume, &bytes, &mut each)? {
                return Ok(ControlFlow::Break(found));
            }
        }
        block += run.blocks;
    }
    Ok(ControlFlow::Continue(()))
}

/// Lists an inline directory: four bytes with the parent's inode number, then entries. Further
/// entries are in an extended attribute.
fn inline<B>(
    volume: &Volume,
    node: &Node,
    mut each: impl FnMut(u32, &[u8]) -> ControlFlow<B>,
) -> Result<ControlFlow<B>, FsError> {
    let data = node.inline_data()?;
    let (first, more) = data.split_at(node.inode.block.len());
    for part in [&first[4..], more] {
        if let ControlFlow::Break(found) = list(volume, part, &mut each)? {
            return Ok(ControlFlow::Break(found));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn list<B>(
    volume: &Volume,
    mut rest: &[u8],
    each: &mut impl FnMut(u32, &[u8]) -> ControlFlow<B>,
) -> Result<ControlFlow<B>, FsError> {
    let wrong = || FsError::Corrupt("a directory entry that reaches out of its block".into());
    while !rest.is_empty() {
        let (entry, after) = DirEntry::ref_from_prefix(rest).map_err(|_| wrong())?;
        let len = record(entry.rec_len.get(), rest.len());
        if len < HEAD + 4 || !len.is_multiple_of(4) || len > rest.len() {
            return Err(wrong());
        }
        let inode = entry.inode.get();
        // Without the file type feature, this byte is the upper half of the name length, which is
        // 0.
        let name_len = usize::from(entry.name_len);
        if inode != 0 && (volume.has_file_types() || entry.file_type == 0) {
            let name = after.get(..name_len).filter(|_| HEAD + name_len <= len);
            let name = name.ok_or_else(wrong)?;
            if name != b"." && name != b".." {
                if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                    return Err(FsError::Corrupt("a name that is none".into()));
                }
                if let ControlFlow::Break(found) = each(inode, name) {
                    return Ok(ControlFlow::Break(found));
                }
            }
        }
        rest = rest.get(len..).unwrap_or_default();
    }
    Ok(ControlFlow::Continue(()))
}

/// Returns the length of an entry (Linux: `ext4_rec_len_from_disk`).
fn record(rec_len: u16, block: usize) -> usize {
    match usize::from(rec_len) {
        0 | 65_535 => block,
        len => (len & 65_532) | ((len & 3) << 16),
    }
}

/// Verifies the checksum of a block of entries. Index blocks have it at another offset, where an
/// old entry checksum may remain as well, so those are not verified.
fn check(volume: &Volume, node: &Node, number: u64, block: &[u8]) -> Result<(), FsError> {
    let Some((covered, tail)) = block.len().checked_sub(TAIL).map(|at| block.split_at(at)) else {
        return Ok(());
    };
    let whole = |entry: &DirEntry| {
        entry.inode.get() == 0 && record(entry.rec_len.get(), block.len()) == block.len()
    };
    let is_index = node.has(flags::INDEX)
        && (number == 0 || DirEntry::ref_from_prefix(block).is_ok_and(|(entry, _)| whole(entry)));
    let is_tail = tail.starts_with(&[0, 0, 0, 0, 12, 0, 0, CHECKSUM]);
    match tail.last_chunk() {
        Some(stored) if is_tail && !is_index => {
            volume.check(node.seed, covered, u32::from_le_bytes(*stored), "a directory")
        }
        _ => Ok(()),
    }
}
