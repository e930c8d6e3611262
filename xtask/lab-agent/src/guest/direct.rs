//! A disk without the page cache, so that every access reaches the backend.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};

const O_DIRECT: i32 = 0o40_000;
const PAGE: usize = 4096;

/// Page-aligned memory.
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Returns a buffer of zeros.
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        Self { memory, start, len }
    }

    /// Returns the bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// An open disk.
pub struct Direct {
    file: File,
}

impl Direct {
    /// Opens a block device such as `xvda`, for reading and optionally for writing.
    ///
    /// # Errors
    /// It does not exist or is read-only.
    pub fn open(name: &str, write: bool) -> Result<Self> {
        Self::with_flags(name, write, 0)
    }

    /// Does as [`Self::open`], with more `O_` flags.
    ///
    /// # Errors
    /// It does not exist or is read-only.
    pub fn with_flags(name: &str, write: bool, flags: i32) -> Result<Self> {
        let path = Path::new("/dev").join(name);
        let mut options = File::options();
        options.read(true).write(write).custom_flags(O_DIRECT | flags);
        Ok(Self { file: options.open(path).with_context(|| name.to_owned())? })
    }

    /// Fills `bytes`; all numbers are multiples of 512.
    ///
    /// # Errors
    /// The disk's error.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        let len = bytes.len();
        let read = self.file.read_exact_at(bytes, offset);
        read.with_context(|| format!("read {len} bytes at {offset}"))
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The disk's error.
    pub fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.with_context(|| format!("write {} bytes at {offset}", bytes.len()))
    }

    /// Flushes the disk.
    ///
    /// # Errors
    /// The disk's error.
    pub fn flush(&self) -> Result<()> {
        self.file.sync_data().context("flush")
    }
}
