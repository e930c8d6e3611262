//! Disks that a file system is read from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A disk that can be read.
pub trait BlockRead: Send {
    /// Returns the size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from byte `offset` on. Offset and length are multiples of 512, and the range is
    /// within the disk.
    ///
    /// # Errors
    /// Any part of it cannot be read.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Does background work while there are no reads, such as a reconnection to a restarted
    /// backend.
    fn poll_backend(&mut self) {}
}

/// A disk of any type.
pub struct Disk(Box<dyn BlockRead>);

impl Disk {
    /// Boxes a disk.
    #[must_use]
    pub fn new(disk: impl BlockRead + 'static) -> Self {
        Self(Box::new(disk))
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Disk({} bytes)", self.0.size())
    }
}

impl BlockRead for Disk {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn poll_backend(&mut self) {
        self.0.poll_backend();
    }
}

/// A disk in memory.
#[derive(Debug, Clone)]
pub struct MemDisk(Vec<u8>);

impl MemDisk {
    /// Returns a disk with these bytes; a last incomplete sector of 512 bytes is left out.
    #[must_use]
    pub fn new(mut bytes: Vec<u8>) -> Self {
        bytes.truncate(bytes.len() & !511);
        Self(bytes)
    }
}

impl BlockRead for MemDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let part = from.checked_add(buf.len()).and_then(|to| self.0.get(from..to));
        buf.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// An image file that is read directly.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    size: u64,
}

impl FileDisk {
    /// Returns a disk with the file's contents.
    ///
    /// # Errors
    /// The file's size cannot be read.
    pub fn new(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len() & !511;
        Ok(Self { file, size })
    }
}

impl BlockRead for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}
