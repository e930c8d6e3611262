//! The contents of a disk, recognised by the signatures of file systems, volumes, partition tables
//! and image formats.

/// Number of bytes at the start of a disk that contain all signatures.
pub const HEAD: usize = 132 << 10;

/// Contents that have a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// Its name with an article: `an NTFS file system`.
    pub name: &'static str,
    /// What to do so that the files can be served.
    pub remedy: &'static str,
}

/// A byte string at a fixed offset.
type Signature = (usize, &'static [u8], Contents);

const fn file_system(name: &'static str) -> Contents {
    Contents {
        name,
        remedy: "use a disk with ext2/3/4 or FAT: other file systems are not supported",
    }
}

const fn partitions(name: &'static str) -> Contents {
    Contents { name, remedy: "use the image of one partition, with ext4 or FAT" }
}

const fn image(name: &'static str, remedy: &'static str) -> Contents {
    Contents { name, remedy }
}

const fn compressed(name: &'static str) -> Contents {
    Contents { name, remedy: "decompress it first" }
}

const CONVERT: &str = "convert it: qemu-img convert -O qcow2 OLD NEW.qcow2, or, if it has a parent, the program that \
    created it";
const RAID: Contents = Contents {
    name: "a member of a Linux RAID array",
    remedy: "assemble the array and use its device, /dev/mdN",
};
const LVM: Contents = Contents {
    name: "an LVM physical volume",
    remedy: "use one of its logical volumes, /dev/GROUP/VOLUME",
};
const ZFS: Contents = file_system("a member of a ZFS pool");
const SWAP: Contents = Contents { name: "swap space", remedy: "use a disk with ext2/3/4 or FAT" };
const GPT: Contents = partitions("a GPT partition table");

/// Signatures in the first sector, in the place of FAT's parameters.
const FIRST_SECTOR: &[Signature] = &[
    (3, b"NTFS    ", file_system("an NTFS file system")),
    (3, b"EXFAT   ", file_system("an exFAT file system")),
    (3, b"ReFS\0\0\0\0", file_system("a ReFS file system")),
    (3, b"-FVE-FS-", file_system("a volume encrypted with BitLocker")),
    (0, b"XFSB", file_system("an XFS file system")),
    (0, b"hsqs", file_system("a SquashFS file system")),
    (0, &[0x45, 0x3d, 0xcd, 0x28], file_system("a cramfs file system")),
    (
        0,
        b"LUKS\xba\xbe",
        Contents {
            name: "a LUKS volume",
            remedy: "unlock it with cryptsetup and use its device below /dev/mapper",
        },
    ),
    (0, &[0xfc, 0x4e, 0x2b, 0xa9], RAID),
    (32, b"NXSB", file_system("an APFS container")),
    (0, b"QFI\xfb", image("a qcow2 image", "serve it with --disk qcow2:PATH")),
    (0, b"KDMV", image("a VMDK image", "serve it with --disk vmdk:PATH")),
    (0, b"conectix", image("a VHD image", "serve it with --disk vhd:PATH")),
    (0, b"vhdxfile", image("a VHDX image", CONVERT)),
    (64, &[0x7f, 0x10, 0xda, 0xbe], image("a VDI image", CONVERT)),
    (0, &[0x1f, 0x8b, 8], compressed("a file compressed with gzip")),
    (0, b"\xfd7zXZ\0", compressed("a file compressed with xz")),
    (0, &[0x28, 0xb5, 0x2f, 0xfd], compressed("a file compressed with zstd")),
    (0, b"BZh", compressed("a file compressed with bzip2")),
    (0, b"PK\x03\x04", compressed("a ZIP archive")),
];

/// Signatures after the first sector, and those that may occur together with others. The more
/// specific ones come first.
const BEHIND: &[Signature] = &[
    (1080, &[0x53, 0xef], file_system("an ext2/3/4 file system")),
    (82, b"FAT32   ", file_system("a FAT file system")),
    (54, b"FAT", file_system("a FAT file system")),
    (65_600, b"_BHRfS_M", file_system("a Btrfs file system")),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], file_system("an F2FS file system")),
    (1024, &[0xe2, 0xe1, 0xf5, 0xe0], file_system("an EROFS file system")),
    (1024, b"H+", file_system("an HFS+ file system")),
    (1024, b"HX", file_system("an HFS+ file system")),
    (1030, &[0x34, 0x34], file_system("a NILFS2 file system")),
    (65_588, b"ReIsEr", file_system("a ReiserFS file system")),
    (65_536, &[0x01, 0x16, 0x19, 0x70], file_system("a GFS2 file system")),
    (32_768, b"JFS1", file_system("a JFS file system")),
    (66_908, &[0x19, 0x01, 0x54, 0x19], file_system("a UFS2 file system")),
    (9_564, &[0x54, 0x19, 0x01, 0x00], file_system("a UFS1 file system")),
    (4120, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a], file_system("a bcachefs file system")),
    (512, b"LABELONE", LVM),
    (0, b"LABELONE", LVM),
    (1024, b"LABELONE", LVM),
    (1536, b"LABELONE", LVM),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9], RAID),
    (131_072, &[0x0c, 0xb1, 0xba, 0], ZFS),
    (4086, b"SWAPSPACE2", SWAP),
    (8182, b"SWAPSPACE2", SWAP),
    (16_374, b"SWAPSPACE2", SWAP),
    (65_526, b"SWAPSPACE2", SWAP),
    (4086, b"S1SUSPEND\0", SWAP),
    // Before the partition tables: a hybrid ISO image has one, too.
    (32_769, b"CD001", file_system("an ISO 9660 file system")),
    (32_769, b"BEA01", file_system("a UDF file system")),
    (512, b"EFI PART", GPT),
    (4096, b"EFI PART", GPT),
    (510, &[0x55, 0xaa], partitions("an MBR partition table or boot sector")),
];

/// Returns the contents recognised in the first [`HEAD`] bytes of a disk, or in all of a smaller
/// one.
#[must_use]
pub fn of(head: &[u8]) -> Option<Contents> {
    in_first_sector(head).or_else(|| find(BEHIND, head))
}

/// Returns the same, but only for signatures in the place of FAT's parameters.
#[must_use]
pub fn in_first_sector(head: &[u8]) -> Option<Contents> {
    find(FIRST_SECTOR, head)
}

fn find(signatures: &[Signature], head: &[u8]) -> Option<Contents> {
    let is = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|from| from.starts_with(magic));
    signatures.iter().find(|(at, magic, _)| is(*at, magic)).map(|(_, _, contents)| *contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (at, bytes) in parts {
            head[*at..][..bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn every_content_signature_is_detected_at_its_offset() {
        for (at, magic, contents) in FIRST_SECTOR.iter().chain(BEHIND) {
            assert_eq!(of(&with(&[(*at, magic)])), Some(*contents), "{}", contents.name);
            assert_eq!(of(&with(&[(*at, magic)])[..at + magic.len() - 1]), None);
        }
        assert_eq!(of(&[]), None);
        assert_eq!(of(&with(&[])), None);
    }

    #[test]
    fn specific_signature_wins_over_mbr_or_gpt() {
        let boot: (usize, &[u8]) = (510, &[0x55, 0xaa]);
        let name = |parts: &[(usize, &[u8])]| of(&with(parts)).unwrap().name;
        assert_eq!(name(&[boot, (3, b"NTFS    ")]), "an NTFS file system");
        assert_eq!(name(&[boot, (3, b"EXFAT   ")]), "an exFAT file system");
        assert_eq!(name(&[boot, (512, b"EFI PART")]), "a GPT partition table");
        let hybrid = [boot, (512, b"EFI PART"), (32_769, b"CD001")];
        assert_eq!(name(&hybrid), "an ISO 9660 file system");
    }
}
