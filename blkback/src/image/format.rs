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
