//! The formats of image files.

use std::path::Path;

/// The format of an image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The disk's contents without metadata.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// VMware's format.
    Vmdk,
    /// The format of Virtual PC and XenServer.
    Vhd,
}

impl Format {
    /// Returns the format with this name, as used by toolstacks, QEMU and this crate.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            // `aio` is used by libxl, `file` by old versions of QEMU.
            "raw" | "aio" | "file" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Vmdk,
            "vhd" | "vpc" => Self::Vhd,
            _ => return None,
        })
    }

    /// Returns this crate's name of the format.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
        }
    }

    /// Returns the name of a known but unsupported format, from its name or a file name's
    /// extension.
    #[must_use]
    pub fn foreign(word: &str) -> Option<&'static str> {
        const FOREIGN: [&str; 9] =
            ["vhdx", "vdi", "luks", "qed", "qcow", "parallels", "hdd", "dmg", "vhdset"];
        let word = word.to_ascii_lowercase();
        FOREIGN.into_iter().find(|known| *known == word)
    }

    /// Returns the name of the unsupported format whose magic number the content begins with.
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

    /// Returns the format by a file name's extension; raw if the extension is unknown.
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

    /// Returns the format whose magic number the content begins with. Only for messages to the
    /// operator: **never decide by this how to open an image**, see [`spec`](super::spec).
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
