//! The formats of image files.

use std::path::Path;

/// How an image file is to be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// VMware's format.
    Vmdk,
    /// Virtual PC's and XenServer's format.
    Vhd,
}

impl Format {
    /// By the word that toolstacks, QEMU and this crate use for it.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            // `aio` is libxl's word, `file` QEMU's of old.
            "raw" | "aio" | "file" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Vmdk,
            "vhd" | "vpc" => Self::Vhd,
            _ => return None,
        })
    }

    /// This crate's word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
        }
    }

    /// A format that is known and not read, by its word or by the end of a file's name.
    #[must_use]
    pub fn foreign(word: &str) -> Option<&'static str> {
        const FOREIGN: [&str; 9] =
            ["vhdx", "vdi", "luks", "qed", "qcow", "parallels", "hdd", "dmg", "vhdset"];
        let word = word.to_ascii_lowercase();
        FOREIGN.into_iter().find(|known| *known == word)
    }

    /// The word for a foreign format that content begins like.
    #[must_use]
    pub fn foreign_resembled(head: &[u8]) -> Option<&'static str> {
        const VDI: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();
        match head {
            _ if head.starts_with(b"vhdxfile") => Some("vhdx"),
            _ if head.starts_with(b"LUKS\xba\xbe") => Some("luks"),
            _ if head.starts_with(b"QED\0") => Some("qed"),
            _ if head.get(64..68) == Some(&VDI) => Some("vdi"),
            _ => None,
        }
    }

    /// By the end of a file's name; raw if that says nothing.
    #[must_use]
    pub fn of_name(path: &Path) -> Self {
        let suffix = path.extension().and_then(|s| s.to_str()).unwrap_or_default();
        match suffix.to_ascii_lowercase().as_str() {
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Vmdk,
            "vhd" | "vpc" => Self::Vhd,
            _ => Self::Raw,
        }
    }

    /// What content begins like. Only to tell an operator: **never to decide how to open it**, see
    /// [`spec`](super::spec).
    #[must_use]
    pub fn resembled(head: &[u8]) -> Option<Self> {
        match head {
            [b'Q', b'F', b'I', 0xfb, ..] => Some(Self::Qcow2),
            [b'K', b'D', b'M', b'V', ..] => Some(Self::Vmdk),
            _ if head.starts_with(b"# Disk DescriptorFile") => Some(Self::Vmdk),
            _ if head.starts_with(b"conectix") => Some(Self::Vhd),
            _ => None,
        }
    }
}
