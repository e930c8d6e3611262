//! A volume: superblock, block groups, inodes.

use super::layout::{
    COMPAT_SPARSE_SUPER2, GroupDescriptor, Inode, Superblock, XattrEntry, incompat, ro_compat,
};
use crate::guest::fs::FsError;
use crate::guest::fs::cache::Cache;
use crc::{Algorithm, CRC_32_ISCSI, Crc, Table};
use std::cell::RefCell;
use std::rc::Rc;
use zerocopy::FromBytes;

/// ext4's checksum: CRC-32C without the final inversion, so that it can be continued.
static CRC32C: Crc<u32, Table<16>> =
    Crc::<u32, Table<16>>::new(&Algorithm { xorout: 0, ..CRC_32_ISCSI });

/// Inode size in bytes of revision 0.
const OLD_INODE: u16 = 128;
const SUPERBLOCK: u64 = 1024;
const DESCRIPTOR: u64 = 32;
/// Offset of `bg_inode_table_hi` in a 64-bit group descriptor.
const INODE_TABLE_HI: usize = 0x28;

/// A mounted volume.
pub struct Volume {
    cache: Rc<RefCell<Cache>>,
    pub superblock: Superblock,
    /// Block size in bytes.
    pub block_size: u64,
    blocks: u64,
    inode_size: usize,
    desc_size: u64,
    incompat: u32,
    ro_compat: u32,
    /// Initial value of checksums of this volume; `None` if it has none.
    seed: Option<u32>,
}

/// An inode.
#[derive(Clone)]
pub struct Node {
    pub inode: Inode,
    /// The complete inode.
    raw: Vec<u8>,
    /// Initial value of checksums of its blocks.
    pub seed: Option<u32>,
}

impl Volume {
    pub fn mount(cache: &Rc<RefCell<Cache>>) -> Result<Self, FsError> {
        let mut bytes = [0; 1024];
        cache.borrow_mut().read_exact(SUPERBLOCK, &mut bytes)?;
        let superblock =
            Superblock::read_from_bytes(&bytes).map_err(|_| corrupt("no superblock"))?;
        // Revision 0 has none of the feature fields.
        let old = superblock.rev_level.get() == 0;
        let feature = |word: u32| if old { 0 } else { word };
        let incompat = feature(superblock.feature_incompat.get());
        let ro_compat = feature(superblock.feature_ro_compat.get());
        readable(incompat)?;
        let block_size = 1024_u64.checked_shl(superblock.log_block_size.get());
        let block_size = block_size.filter(|size| *size <= 65_536);
        let block_size = block_size.ok_or_else(|| corrupt("a block size above 64 KiB"))?;
        let inode_size = if old { OLD_INODE } else { superblock.inode_size.get() };
        if inode_size < OLD_INODE
            || !inode_size.is_power_of_two()
            || u64::from(inode_size) > block_size
        {
            return Err(corrupt("no sensible size of inodes"));
        }
        let is_64bit = incompat & incompat::BITS_64 != 0;
        let desc_size = match u64::from(superblock.desc_size.get()) {
            size if is_64bit && (64..=block_size).contains(&size) && size.is_power_of_two() => size,
            _ if is_64bit => return Err(corrupt("no sensible size of group descriptors")),
            _ => DESCRIPTOR,
        };
        let high = if is_64bit { superblock.blocks_count_hi.get() } else { 0 };
        let blocks = u64::from(high) << 32 | u64::from(superblock.blocks_count_lo.get());
        if superblock.blocks_per_group.get() == 0 || superblock.inodes_per_group.get() == 0 {
            return Err(corrupt("groups of nothing"));
        }
        let seed = (ro_compat & ro_compat::METADATA_CSUM != 0).then(|| {
            if incompat & incompat::CSUM_SEED != 0 {
                superblock.checksum_seed.get()
            } else {
                continued(!0, &superblock.uuid)
            }
        });
        let inode_size = usize::from(inode_size);
        let cache = Rc::clone(cache);
        let volume = Self {
            cache,
            superblock,
            block_size,
            blocks,
            inode_size,
            desc_size,
            incompat,
            ro_compat,
            seed,
        };
        let (covered, stored) = (&bytes[..1020], volume.superblock.checksum.get());
        volume.check(volume.seed.map(|_| !0), covered, stored, "the superblock")?;
        Ok(volume)
    }

    /// Returns the size of the volume in bytes.
    pub fn size(&self) -> u64 {
        self.cache.borrow().size()
    }

    /// Returns whether files are mapped by extents.
    pub fn has_extents(&self) -> bool {
        self.incompat & incompat::EXTENTS != 0
    }

    /// Returns whether directory entries have a file type.
    pub fn has_file_types(&self) -> bool {
        self.incompat & incompat::FILETYPE != 0
    }

    /// Returns whether the size of a directory has 64 bits.
    pub fn has_large_directories(&self) -> bool {
        self.incompat & incompat::LARGEDIR != 0
    }

    /// Reads at an offset in a block.
    pub fn read(&self, block: u64, within: u64, buf: &mut [u8]) -> Result<(), FsError> {
        let end = within.saturating_add(buf.len() as u64);
        self.check_blocks(block, end.div_ceil(self.block_size))?;
        let at = block.checked_mul(self.block_size).and_then(|at| at.checked_add(within));
        let at = at.ok_or_else(|| corrupt("a block behind the end"))?;
        Ok(self.cache.borrow_mut().read_exact(at, buf)?)
    }

    /// Reads a whole block.
    pub fn block(&self, block: u64) -> Result<Vec<u8>, FsError> {
        let mut bytes = vec![0; usize::try_from(self.block_size).unwrap_or_default()];
        self.read(block, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Checks that a range of blocks is within the volume and does not include the superblock.
    pub fn check_blocks(&self, start: u64, len: u64) -> Result<(), FsError> {
        let first = u64::from(self.superblock.first_data_block.get());
        let inside = start.checked_add(len).is_some_and(|end| end <= self.blocks);
        if inside && start > first {
            return Ok(());
        }
        Err(corrupt("a block that is not the volume's"))
    }

    /// Verifies a checksum, if the volume has checksums.
    pub fn check(
        &self,
        seed: Option<u32>,
        covered: &[u8],
        stored: u32,
        of: &str,
    ) -> Result<(), FsError> {
        match seed {
            Some(seed) if continued(seed, covered) != stored => {
                Err(FsError::Corrupt(format!("the checksum of {of} is wrong")))
            }
            _ => Ok(()),
        }
    }

    /// Reads the inode of that number.
    pub fn node(&self, number: u32) -> Result<Node, FsError> {
        if number == 0 || number > self.superblock.inodes_count.get() {
            return Err(corrupt("an inode that there is not"));
        }
        let per_group = self.superblock.inodes_per_group.get();
        let (group, index) = ((number - 1) / per_group, (number - 1) % per_group);
        let at = u64::from(index) * self.inode_size as u64;
        let table = self.inode_table(group.into())?;
        let mut raw = vec![0; self.inode_size];
        let block = table
            .checked_add(at / self.block_size)
            .ok_or_else(|| corrupt("an inode table behind the end"))?;
        self.read(block, at % self.block_size, &mut raw)?;
        let (inode, _) =
            Inode::read_from_prefix(&raw).map_err(|_| corrupt("an inode that is cut short"))?;
        let seed = self.seed.map(|seed| {
            let seed = continued(seed, &number.to_le_bytes());
            continued(seed, &inode.generation.get().to_le_bytes())
        });
        let node = Node { inode, raw, seed };
        self.check_node(&node)?;
        if node.inode.links_count.get() == 0 || node.inode.mode.get() == 0 {
            return Err(corrupt("an inode that is not in use"));
        }
        Ok(node)
    }

    fn check_node(&self, node: &Node) -> Result<(), FsError> {
        const LO: usize = 0x7c;
        const HI: usize = 0x82;
        let Some(seed) = node.seed else { return Ok(()) };
        let mut covered = node.raw.clone();
        let has_high = node.extra() >= HI + 2 - 128;
        let mut stored = u32::from(node.inode.checksum_lo.get());
        covered[LO..LO + 2].fill(0);
        if has_high {
            stored |= u32::from(u16::from_le_bytes([covered[HI], covered[HI + 1]])) << 16;
            covered[HI..HI + 2].fill(0);
        }
        let mask = if has_high { !0 } else { 0xffff };
        if continued(seed, &covered) & mask == stored {
            return Ok(());
        }
        Err(corrupt("the checksum of an inode is wrong"))
    }

    fn inode_table(&self, group: u64) -> Result<u64, FsError> {
        let per_block = self.block_size / self.desc_size;
        let (number, within) = (group / per_block, group % per_block * self.desc_size);
        let mut bytes = vec![0; usize::try_from(self.desc_size).unwrap_or_default()];
        self.read(self.descriptors(number, per_block), within, &mut bytes)?;
        let (descriptor, _) = GroupDescriptor::ref_from_prefix(&bytes)
            .map_err(|_| corrupt("a group descriptor that is cut short"))?;
        let high = bytes.get(INODE_TABLE_HI..).and_then(<[u8]>::first_chunk);
        let high = high.map_or(0, |bytes| u32::from_le_bytes(*bytes));
        Ok(u64::from(high) << 32 | u64::from(descriptor.inode_table_lo.get()))
    }

    /// Returns the number of a block of group descriptors (Linux: `descriptor_loc`).
    fn descriptors(&self, number: u64, per_block: u64) -> u64 {
        let first = u64::from(self.superblock.first_data_block.get());
        let spread = self.incompat & incompat::META_BG != 0;
        if !spread || number < u64::from(self.superblock.first_meta_bg.get()) {
            return SUPERBLOCK / self.block_size + number + 1;
        }
        let group = number.saturating_mul(per_block);
        let mut before = u64::from(self.has_superblock(group));
        if self.block_size == 1024 && number == 0 && first == 0 {
            before += 1;
        }
        let start = group.saturating_mul(self.superblock.blocks_per_group.get().into());
        start.saturating_add(first).saturating_add(before)
    }

    fn has_superblock(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.superblock.feature_compat.get() & COMPAT_SPARSE_SUPER2 != 0 {
            return self.superblock.backup_bgs.iter().any(|it| u64::from(it.get()) == group);
        }
        let power_of = |base: u64| {
            core::iter::successors(Some(base), |n| n.checked_mul(base))
                .take_while(|n| *n <= group)
                .any(|n| n == group)
        };
        self.ro_compat & ro_compat::SPARSE_SUPER == 0
            || group == 1
            || [3, 5, 7].into_iter().any(power_of)
    }
}

impl Node {
    /// Returns whether it has this file type of `mode`.
    pub fn is(&self, kind: u16) -> bool {
        self.inode.mode.get() & 0xf000 == kind
    }

    pub fn has(&self, flag: u32) -> bool {
        self.inode.flags.get() & flag != 0
    }

    /// Returns the size of its data in bytes.
    pub fn len(&self, large_directories: bool) -> u64 {
        let is_file = self.is(super::REGULAR);
        let high = if is_file || large_directories { self.inode.size_high.get() } else { 0 };
        u64::from(high) << 32 | u64::from(self.inode.size_lo.get())
    }

    /// Returns the modification time in seconds since 1970, with the extra bits for times beyond 32
    /// bits.
    pub fn modified(&self) -> i64 {
        const MTIME_EXTRA: usize = 0x88;
        let seconds = i64::from(self.inode.mtime.get().cast_signed());
        let extra = self.raw.get(MTIME_EXTRA..).and_then(<[u8]>::first_chunk);
        match extra {
            Some(extra) if self.extra() >= MTIME_EXTRA + 4 - 128 => {
                seconds + (i64::from(u32::from_le_bytes(*extra) & 3) << 32)
            }
            _ => seconds,
        }
    }

    /// Returns the size of the fields after the first 128 bytes (`i_extra_isize`).
    fn extra(&self) -> usize {
        let bytes = self.raw.get(128..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| usize::from(u16::from_le_bytes(*bytes)))
    }

    /// Returns inline data: the block pointer area, and what exceeds it in the attribute
    /// `system.data`.
    pub fn inline_data(&self) -> Result<Vec<u8>, FsError> {
        let mut data = self.inode.block.to_vec();
        data.extend_from_slice(self.attribute(b"data")?.unwrap_or_default());
        Ok(data)
    }

    /// Returns the value of an extended attribute `system.NAME` in the inode.
    fn attribute(&self, name: &[u8]) -> Result<Option<&[u8]>, FsError> {
        const MAGIC: [u8; 4] = 0xea02_0000_u32.to_le_bytes();
        const SYSTEM: u8 = 7;
        let cut = || corrupt("extended attributes that are cut short");
        let Some(body) = self.raw.get(128 + self.extra()..) else { return Ok(None) };
        let Some(entries) = body.strip_prefix(&MAGIC) else { return Ok(None) };
        let mut rest = entries;
        // The list ends with four zero bytes or with the inode.
        while rest.first_chunk::<4>().is_some_and(|word| *word != [0; 4]) {
            let (entry, after) = XattrEntry::ref_from_prefix(rest).map_err(|_| cut())?;
            let len = usize::from(entry.name_len);
            let found = after.get(..len).ok_or_else(cut)?;
            if entry.name_index == SYSTEM && found == name && entry.value_inum.get() == 0 {
                let from = usize::from(entry.value_offs.get());
                let len = usize::try_from(entry.value_size.get()).map_err(|_| cut())?;
                let value = entries.get(from..).and_then(|value| value.get(..len));
                return value.map(Some).ok_or_else(cut);
            }
            rest = after.get(len.next_multiple_of(4)..).ok_or_else(cut)?;
        }
        Ok(None)
    }
}

/// Rejects volumes with features that this reader does not support.
fn readable(incompat: u32) -> Result<(), FsError> {
    if incompat & incompat::RECOVER != 0 {
        return Err(FsError::Journal);
    }
    match incompat & !incompat::READABLE {
        0 => Ok(()),
        0x8 => Err(FsError::Unsupported("it is the journal of another file system".into())),
        unknown => Err(FsError::Unsupported(format!(
            "it has unsupported features of ext4 (incompat {unknown:#x})"
        ))),
    }
}

/// Continues a checksum.
fn continued(seed: u32, bytes: &[u8]) -> u32 {
    let mut digest = CRC32C.digest_with_initial(seed.reverse_bits());
    digest.update(bytes);
    digest.finalize()
}

fn corrupt(what: &str) -> FsError {
    FsError::Corrupt(what.into())
}
