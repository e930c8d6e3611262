//! Detection of a disk's file system from its first sectors.

use super::FsError;
use super::cache::Cache;
use crate::contents::{self, HEAD};

/// The supported families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// ext2, ext3, ext4.
    Ext,
    /// FAT12, FAT16, FAT32.
    Fat,
}

/// Offset of the ext superblock.
const SUPER: usize = 1024;
/// Size of the ext superblock in bytes.
const SUPER_LEN: usize = 1024;
const EXT_MAGIC: u16 = 0xef53;
/// `mke2fs` never creates smaller groups. With smaller ones, a volume would have millions of
/// groups.
const MIN_BLOCKS_PER_GROUP: u32 = 256;

/// Detects the file system and checks that it fits the disk.
///
/// # Errors
/// [`FsError::Unrecognised`] with a description of the contents, [`FsError::Truncated`],
/// [`FsError::Corrupt`], [`FsError::Io`].
pub fn family(cache: &mut Cache) -> Result<Family, FsError> {
    let mut head = vec![0; HEAD];
    cache.allow(HEAD as u64);
    let got = cache.read(0, &mut head)?;
    let size = cache.size();
    if got >= SUPER + SUPER_LEN && u16_at(&head, SUPER + 56) == EXT_MAGIC {
        return ext(&head[SUPER..], size);
    }
    // NTFS and others have a first sector with the layout of FAT's.
    let signed = head[510] == 0x55 && head[511] == 0xaa;
    if signed && is_fat(&head) && contents::in_first_sector(&head).is_none() {
        return fat(&head, size);
    }
    let make = "use a disk with ext2/3/4 or FAT (mke2fs -t ext4 -d DIR NEW.img 64M creates one)";
    let (found, remedy) = match contents::of(&head[..got]) {
        Some(found) => (format!("the disk holds {}", found.name), found.remedy),
        None if head.iter().all(|b| *b == 0) => ("the disk is empty".into(), make),
        None => ("the disk holds no ext2/3/4 or FAT file system".into(), make),
    };
    Err(FsError::Unrecognised { found, remedy })
}

/// Checks the sizes in an ext superblock from which memory is allocated.
fn ext(superblock: &[u8], size: u64) -> Result<Family, FsError> {
    let bad = |what: &str| Err(FsError::Corrupt(format!("ext superblock: {what}")));
    let log = u32_at(superblock, 24);
    if log > 6 {
        return bad("block size above 64 KiB");
    }
    if u32_at(superblock, 32) < MIN_BLOCKS_PER_GROUP {
        return bad("too few blocks per group");
    }
    let is_64bit = u32_at(superblock, 96) & 0x80 != 0;
    let high = if is_64bit { u32_at(superblock, 0x150) } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(u32_at(superblock, 4));
    let needed = blocks.checked_mul(1024 << log);
    match needed {
        Some(0) | None => bad("no sensible number of blocks"),
        Some(needed) if needed > size => Err(FsError::Truncated { needed, size }),
        Some(_) => Ok(Family::Ext),
    }
}

fn is_fat(head: &[u8]) -> bool {
    let bytes_per_sector = u16_at(head, 11);
    let sectors_per_cluster = head[13];
    (512..=4096).contains(&bytes_per_sector)
        && bytes_per_sector.is_power_of_two()
        && sectors_per_cluster.is_power_of_two()
        && (head[0] == 0xeb || head[0] == 0xe9)
        && (head[21] == 0xf0 || head[21] >= 0xf8)
}

fn fat(head: &[u8], size: u64) -> Result<Family, FsError> {
    let small = u32::from(u16_at(head, 19));
    let sectors = if small != 0 { small } else { u32_at(head, 32) };
    let needed = u64::from(sectors) * u64::from(u16_at(head, 11));
    if needed > size { Err(FsError::Truncated { needed, size }) } else { Ok(Family::Fat) }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
