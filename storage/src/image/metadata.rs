//! Bounded reading of an image file's metadata, and the errors of its content.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Random access to an image's bytes.
pub trait Content {
    /// Returns the length in bytes.
    fn length(&self) -> u64;

    /// Reads into the buffer.
    ///
    /// # Errors
    /// [`ContentError::Truncated`] if the content is too short, and [`ContentError::Unsupported`]
    /// if the disk's [`Meter`] is exhausted.
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), ContentError>;

    /// Returns the meter that reads count against.
    fn meter(&self) -> &Meter;
}

/// Limits the cost of opening a disk, whatever its files contain. All files of a disk share one
/// meter. Everything whose size an image determines is read and allocated through it.
#[derive(Debug, Default)]
pub struct Meter {
    reads: AtomicU64,
    bytes: AtomicU64,
    retained: AtomicU64,
}

/// Maximum number of system calls to read tables: a quarter of a second, if each is short.
const MOST_READS: u64 = 1 << 18;
/// Maximum bytes of tables: those of 2 TiB of data in clusters of 64 KiB, with their reference
/// counts.
const MOST_BYTES: u64 = 384 << 20;
/// Maximum bytes of tables in memory while the disk is open. During opening, derived and temporary
/// data take up to three times as much in addition.
const MAX_RETAINED: u64 = 16 << 20;
/// Bytes to read at a time.
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

    /// Returns the bytes of tables that stay in memory, and their limit.
    #[must_use]
    pub fn retained(&self) -> (u64, u64) {
        (self.retained.load(Ordering::Relaxed), MAX_RETAINED)
    }

    /// Counts bytes that stay in memory.
    ///
    /// # Errors
    /// [`ContentError::Unsupported`] if the limit is exceeded.
    pub fn retain(&self, bytes: u64) -> Result<(), ContentError> {
        Self::add(&self.retained, bytes, MAX_RETAINED, "bytes of tables in memory")
    }
}

/// Returns an empty list with capacity for `count` entries.
///
/// # Errors
/// The memory cannot be allocated.
pub(super) fn try_vec<T>(count: u64) -> Result<Vec<T>, ContentError> {
    let mut list = Vec::new();
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    list.try_reserve_exact(count)
        .map_err(|_| ContentError::Io(io::ErrorKind::OutOfMemory.into()))?;
    Ok(list)
}

/// Returns a buffer of zeroes.
///
/// # Errors
/// The memory cannot be allocated.
pub(super) fn buffer(bytes: u64) -> Result<Vec<u8>, ContentError> {
    let mut buffer = try_vec(bytes)?;
    buffer.resize(bytes as usize, 0);
    Ok(buffer)
}

/// Reads an on-disk structure.
///
/// # Errors
/// The error of reading.
pub(super) fn read_struct<T: FromBytes + IntoBytes>(
    content: &dyn Content,
    at: u64,
) -> Result<T, ContentError> {
    let mut found = T::new_zeroed();
    content.read(at, found.as_mut_bytes())?;
    Ok(found)
}

/// Calls `each` for every entry of a table, with its index. The table is read in large parts.
///
/// # Errors
/// The error of reading, or of `each`.
pub(super) fn each_entry<T>(
    content: &dyn Content,
    at: u64,
    count: u64,
    mut each: impl FnMut(u64, T) -> Result<(), ContentError>,
) -> Result<(), ContentError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned + Copy,
{
    const { assert!(PART.is_multiple_of(size_of::<T>()), "a part has whole entries") };
    let size = size_of::<T>() as u64;
    let bytes = count.saturating_mul(size);
    let mut part = buffer(bytes.min(PART as u64))?;
    let mut done = 0;
    while done < bytes {
        let n = part.len().min(usize::try_from(bytes - done).unwrap_or(usize::MAX));
        let part = part.get_mut(..n).unwrap_or_default();
        content.read(at.saturating_add(done), part)?;
        let entries = <[T]>::ref_from_prefix(part).map_or(&[][..], |(entries, _)| entries);
        for (index, entry) in (done / size..).zip(entries) {
            each(index, *entry)?;
        }
        done += n as u64;
    }
    Ok(())
}

/// A problem with an image's content.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// It is not of the expected format.
    #[error("no {0} {mark} was found", mark = signature(.0))]
    NotThis(&'static str),
    /// It is inconsistent.
    #[error("the image is corrupt: {0}")]
    Corrupt(String),
    /// It is too short.
    #[error("the image is cut short: {0}")]
    Truncated(String),
    /// It is encrypted.
    #[error("encryption with {0} is not supported")]
    Encrypted(&'static str),
    /// It depends on data in a parent image.
    #[error("differences to a parent image are not supported")]
    Parent,
    /// It is one file of a disk that consists of several.
    #[error("the file is one of several extents, without a descriptor")]
    Extent,
    /// It is valid, but uses a feature that is not supported.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Returns by what an image of a format is recognized.
fn signature(format: &str) -> &'static str {
    match format {
        // A fixed VHD image is recognized by its end alone.
        "vhd" => "footer",
        _ => "header",
    }
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

/// The content of a file that does not change during the reads.
#[derive(Debug)]
pub struct FileContent<'a> {
    file: &'a File,
    len: u64,
    meter: &'a Meter,
}

impl<'a> FileContent<'a> {
    /// Creates the content of a file or a block device.
    ///
    /// # Errors
    /// The system's error.
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
                ContentError::truncated(alloc::format!("it ends before byte {at}"))
            }
            _ => e.into(),
        })
    }
}
