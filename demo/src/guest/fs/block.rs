//! What a file system is read from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A disk that can be read.
pub trait BlockRead: Send {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `buf` from byte `offset` on. Offset and length are multiples of 512, and lie within
    /// the disk.
    ///
    /// # Errors
    /// When any of it cannot be read.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Looks after itself while nobody reads: attaches again to a backend that came back, say.
    fn tend(&mut self) {}
}

/// A disk of whatever sort.
pub struct Disk(Box<dyn BlockRead>);

impl Disk {
    /// Boxes it.
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

    fn tend(&mut self) {
        self.0.tend();
    }
}

/// A disk in memory.
#[derive(Debug, Clone)]
pub struct MemDisk(Vec<u8>);

impl MemDisk {
    /// The bytes as a disk; what exceeds a multiple of 512 is left out.
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

/// An image file, read directly.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    size: u64,
}

impl FileDisk {
    /// The file as a disk.
    ///
    /// # Errors
    /// When its size cannot be found out.
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
