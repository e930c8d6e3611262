//! An image file's content on the way to being believed.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
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
    /// [`ContentError::Truncated`] if there is less, and [`ContentError::Unsupported`] when the
    /// [`Meter`] of the disk has nothing left.
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), ContentError>;

    /// What is counted against.
    fn meter(&self) -> &Meter;
}

/// What opening one disk may cost, whatever its files say: one meter is shared by all of them.
/// Nothing whose size an image gives is read or allocated but through it.
#[derive(Debug, Default)]
pub struct Meter {
    reads: AtomicU64,
    bytes: AtomicU64,
    kept: AtomicU64,
}

/// System calls to read tables: a quarter of a second, if each is short.
const MOST_READS: u64 = 1 << 18;
/// Bytes of tables: those of 2 TiB of data in clusters of 64 KiB, with their reference counts.
const MOST_BYTES: u64 = 384 << 20;
/// Bytes of tables in memory for as long as the disk is open. While it is opened what is made
/// of them, and what is needed only meanwhile, takes up to three times as many beside.
const MOST_KEPT: u64 = 16 << 20;
/// Bytes that are read at a time.
const PART: usize = 128 << 10;

impl Meter {
    fn add(total: &AtomicU64, more: u64, most: u64, what: &str) -> Result<(), ContentError> {
        let before = total.fetch_add(more, Ordering::Relaxed);
        if before.saturating_add(more) > most {
            return Err(ContentError::unsupported(format!("more than {most} {what}")));
        }
        Ok(())
    }

    fn read(&self, bytes: usize) -> Result<(), ContentError> {
        Self::add(&self.reads, 1, MOST_READS, "parts of tables")?;
        Self::add(&self.bytes, bytes as u64, MOST_BYTES, "bytes of tables")
    }

    /// Bytes that stay in memory, and how many may.
    #[must_use]
    pub fn kept(&self) -> (u64, u64) {
        (self.kept.load(Ordering::Relaxed), MOST_KEPT)
    }

    /// Counts bytes that stay in memory.
    ///
    /// # Errors
    /// [`ContentError::Unsupported`] if they are too many.
    pub fn keep(&self, bytes: u64) -> Result<(), ContentError> {
        Self::add(&self.kept, bytes, MOST_KEPT, "bytes of tables to be kept in memory")
    }
}

/// An empty list with room for so many.
///
/// # Errors
/// There is no memory.
pub(super) fn room<T>(count: u64) -> Result<Vec<T>, ContentError> {
    let mut list = Vec::new();
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    list.try_reserve_exact(count)
        .map_err(|_| ContentError::Io(io::ErrorKind::OutOfMemory.into()))?;
    Ok(list)
}

/// Zeroes to be read over.
///
/// # Errors
/// There is no memory.
pub(super) fn buffer(bytes: u64) -> Result<Vec<u8>, ContentError> {
    let mut buffer = room(bytes)?;
    buffer.resize(bytes as usize, 0);
    Ok(buffer)
}

/// Calls `each` for every entry of a table, with its index. The table is read in large parts.
///
/// # Errors
/// What reading it says, and `each`.
pub(super) fn each_entry<const N: usize>(
    content: &dyn Content,
    at: u64,
    count: u64,
    mut each: impl FnMut(u64, [u8; N]) -> Result<(), ContentError>,
) -> Result<(), ContentError> {
    let bytes = count.saturating_mul(N as u64);
    let mut part = buffer(bytes.min(PART as u64))?;
    let mut done = 0;
    while done < bytes {
        let n = part.len().min(usize::try_from(bytes - done).unwrap_or(usize::MAX));
        let part = part.get_mut(..n).unwrap_or_default();
        content.read(at.saturating_add(done), part)?;
        for (index, entry) in (done / N as u64..).zip(part.as_chunks().0) {
            each(index, *entry)?;
        }
        done += n as u64;
    }
    Ok(())
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
    meter: &'a Meter,
}

impl<'a> FileContent<'a> {
    /// The content of a file or a block device.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(mut file: &'a File, meter: &'a Meter) -> io::Result<Self> {
        let len = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(Self { file, len, meter })
    }
}

impl Content for FileContent<'_> {
    fn length(&self) -> u64 {
        self.len
    }

    fn meter(&self) -> &Meter {
        self.meter
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), ContentError> {
        self.meter.read(into.len())?;
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
