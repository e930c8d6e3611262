//! An image file's content on the way to being believed.

use alloc::string::String;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that can be read from anywhere.
pub trait Content {
    /// How many there are.
    fn length(&self) -> u64;

    /// Fills the buffer.
    ///
    /// # Errors
    /// [`ContentError::Truncated`] if there is less.
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), ContentError>;
}

/// What is wrong with an image's content.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// It is of another format.
    #[error("it does not begin like a {0} image")]
    NotThis(&'static str),
    /// Something in it cannot be.
    #[error("{0}")]
    Corrupt(String),
    /// It ends too early.
    #[error("{0}")]
    Truncated(String),
    /// It needs a key.
    #[error("{0}")]
    Encrypted(&'static str),
    /// A part of its data is in another image.
    #[error("it holds only what differs from a parent image")]
    Parent,
    /// It is one file of a disk that is in several.
    #[error("it is one of several extents")]
    Extent,
    /// It is in order, and more than is understood here.
    #[error("{0}")]
    Unsupported(String),
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ContentError {
    pub(super) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }

    pub(super) fn truncated(what: impl Into<String>) -> Self {
        Self::Truncated(what.into())
    }

    pub(super) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported(what.into())
    }
}

/// A file that is not changed meanwhile.
#[derive(Debug)]
pub struct FileContent<'a> {
    file: &'a File,
    len: u64,
}

impl<'a> FileContent<'a> {
    /// The content of a file or a block device.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(mut file: &'a File) -> io::Result<Self> {
        let len = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(Self { file, len })
    }
}

impl Content for FileContent<'_> {
    fn length(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), ContentError> {
        self.file.read_exact_at(into, at).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                ContentError::truncated(alloc::format!("nothing is there from byte {at} on"))
            }
            _ => e.into(),
        })
    }
}

/// Fields of a buffer that is long enough, big-endian unless they say otherwise; zero where it is not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    fn field<const N: usize>(self, at: usize) -> [u8; N] {
        let found = self.0.get(at..).and_then(|rest| rest.first_chunk());
        debug_assert!(found.is_some(), "a field outside its buffer");
        found.copied().unwrap_or([0; N])
    }

    pub fn u16(self, at: usize) -> u16 {
        u16::from_be_bytes(self.field(at))
    }

    pub fn u32(self, at: usize) -> u32 {
        u32::from_be_bytes(self.field(at))
    }

    pub fn u64(self, at: usize) -> u64 {
        u64::from_be_bytes(self.field(at))
    }
    pub fn u16_le(self, at: usize) -> u16 {
        u16::from_le_bytes(self.field(at))
    }

    pub fn u32_le(self, at: usize) -> u32 {
        u32::from_le_bytes(self.field(at))
    }

    pub fn u64_le(self, at: usize) -> u64 {
        u64::from_le_bytes(self.field(at))
    }
}
