//! On-disk structures of ext2, ext3 and ext4 (Linux: `fs/ext4/ext4.h`,
//! `Documentation/filesystems/ext4`). All numbers are little-endian.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// `s_feature_incompat`: features that a reader must support.
pub mod incompat {
    /// Directory entries have a file type.
    pub const FILETYPE: u32 = 0x2;
    /// The journal must be replayed.
    pub const RECOVER: u32 = 0x4;
    /// Group descriptors are distributed over the disk.
    pub const META_BG: u32 = 0x10;
    /// Files are mapped by extents.
    pub const EXTENTS: u32 = 0x40;
    /// Block numbers of 48 bits.
    pub const BITS_64: u32 = 0x80;
    /// Directories may be larger than 4 GiB.
    pub const LARGEDIR: u32 = 0x4000;
    /// The checksum seed is in the superblock.
    pub const CSUM_SEED: u32 = 0x2000;
    /// Small files and directories are stored in their inode.
    pub const INLINE_DATA: u32 = 0x8000;
    /// Features that this reader supports. Those without an effect on a reader are multiple mount
    /// protection (0x100), flexible block groups (0x200), large extended attributes (0x400),
    /// encryption (0x10000, rejected per file) and case-insensitive names (0x20000).
    pub const READABLE: u32 = FILETYPE
        | META_BG
        | EXTENTS
        | BITS_64
        | 0x100
        | 0x200
        | 0x400
        | CSUM_SEED
        | LARGEDIR
        | INLINE_DATA
        | 0x1_0000
        | 0x2_0000;
}

/// `s_feature_ro_compat`.
pub mod ro_compat {
    /// Only some groups have a copy of the superblock.
    pub const SPARSE_SUPER: u32 = 0x1;
    /// Metadata has checksums.
    pub const METADATA_CSUM: u32 = 0x400;
}

/// `s_feature_compat`: two groups have a copy of the superblock.
pub const COMPAT_SPARSE_SUPER2: u32 = 0x200;

/// `i_flags`.
pub mod flags {
    /// Encrypted.
    pub const ENCRYPT: u32 = 0x800;
    /// A directory with an index.
    pub const INDEX: u32 = 0x1000;
    /// Mapped by extents.
    pub const EXTENTS: u32 = 0x8_0000;
    /// The data is in the inode.
    pub const INLINE_DATA: u32 = 0x1000_0000;
}

/// `struct ext4_super_block`, the fields that are used.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug, Clone)]
#[repr(C)]
pub struct Superblock {
    pub inodes_count: U32,
    pub blocks_count_lo: U32,
    _a: [u8; 12],
    pub first_data_block: U32,
    pub log_block_size: U32,
    _b: [u8; 4],
    pub blocks_per_group: U32,
    _c: [u8; 4],
    pub inodes_per_group: U32,
    _d: [u8; 32],
    pub rev_level: U32,
    _e: [u8; 8],
    pub inode_size: U16,
    _f: [u8; 2],
    pub feature_compat: U32,
    pub feature_incompat: U32,
    pub feature_ro_compat: U32,
    pub uuid: [u8; 16],
    pub volume_name: [u8; 16],
    _g: [u8; 118],
    pub desc_size: U16,
    _h: [u8; 4],
    pub first_meta_bg: U32,
    _i: [u8; 72],
    pub blocks_count_hi: U32,
    _j: [u8; 248],
    pub backup_bgs: [U32; 2],
    _k: [u8; 28],
    pub checksum_seed: U32,
    _l: [u8; 392],
    pub checksum: U32,
}

/// `struct ext4_group_desc`: its first 32 bytes.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct GroupDescriptor {
    _a: [u8; 8],
    pub inode_table_lo: U32,
    _b: [u8; 20],
}

/// `struct ext4_inode`: its first 128 bytes.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug, Clone)]
#[repr(C)]
pub struct Inode {
    pub mode: U16,
    _a: [u8; 2],
    pub size_lo: U32,
    _b: [u8; 8],
    pub mtime: U32,
    _c: [u8; 6],
    pub links_count: U16,
    _d: [u8; 4],
    pub flags: U32,
    _e: [u8; 4],
    pub block: [u8; 60],
    pub generation: U32,
    _f: [u8; 4],
    pub size_high: U32,
    _g: [u8; 12],
    pub checksum_lo: U16,
    _h: [u8; 2],
}

/// `struct ext4_extent_header`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct ExtentHeader {
    pub magic: U16,
    pub entries: U16,
    pub max: U16,
    pub depth: U16,
    _generation: U32,
}

/// `struct ext4_extent_idx`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct ExtentIndex {
    pub block: U32,
    pub leaf_lo: U32,
    pub leaf_hi: U16,
    _unused: U16,
}

/// `struct ext4_extent`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct Extent {
    pub block: U32,
    pub len: U16,
    pub start_hi: U16,
    pub start_lo: U32,
}

/// `struct ext4_dir_entry_2`, without the name.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct DirEntry {
    pub inode: U32,
    pub rec_len: U16,
    pub name_len: u8,
    pub file_type: u8,
}

/// `struct ext4_xattr_entry`, without the name.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct XattrEntry {
    pub name_len: u8,
    pub name_index: u8,
    pub value_offs: U16,
    pub value_inum: U32,
    pub value_size: U32,
    _hash: U32,
}

const _: () = {
    assert!(size_of::<Superblock>() == 1024);
    assert!(core::mem::offset_of!(Superblock, uuid) == 104);
    assert!(core::mem::offset_of!(Superblock, desc_size) == 254);
    assert!(core::mem::offset_of!(Superblock, blocks_count_hi) == 0x150);
    assert!(core::mem::offset_of!(Superblock, backup_bgs) == 0x24c);
    assert!(core::mem::offset_of!(Superblock, checksum_seed) == 0x270);
    assert!(size_of::<GroupDescriptor>() == 32);
    assert!(size_of::<Inode>() == 128);
    assert!(core::mem::offset_of!(Inode, block) == 40);
    assert!(core::mem::offset_of!(Inode, checksum_lo) == 124);
};
