//! A mapped file.
#![allow(unsafe_code)]

use memmap2::{MmapOptions, MmapRaw};
use pvio_ring::shm::SharedMemory;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

/// Shared mapping of a file. A clone is another handle to the same memory. The file stays mapped
/// until the last handle is dropped, even if its name is removed.
#[derive(Clone, Debug)]
pub struct RecordFile {
    map: Arc<MmapRaw>,
    base: NonNull<u8>,
}

// SAFETY: the mapping may be used, and is unmapped, by any thread.
unsafe impl Send for RecordFile {}
// SAFETY: its bytes are accessed only through atomics and opaque copies.
unsafe impl Sync for RecordFile {}

impl RecordFile {
    /// Maps `len` zero bytes of private memory, which is lost when this process ends.
    ///
    /// # Errors
    /// A system error.
    pub fn private(len: usize) -> io::Result<Self> {
        Self::new(MmapOptions::new().len(len).map_anon()?.into())
    }

    /// Maps the first `len` bytes of a file and allocates their blocks.
    ///
    /// # Errors
    /// A system error.
    pub fn map(fd: OwnedFd, len: usize) -> io::Result<Self> {
        let fd = Self::allocate(fd, len)?;
        Self::new(MmapOptions::new().len(len).map_raw(&fd)?)
    }

    /// Allocates the blocks of the first `len` bytes of a file. If a full file system could not
    /// provide a page at its first write, the process would end with `SIGBUS`.
    pub(crate) fn allocate(fd: OwnedFd, len: usize) -> io::Result<OwnedFd> {
        let file = File::from(fd);
        match retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, len as u64)) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => write_over(&file, len)?,
            Err(error) => return Err(error.into()),
        }
        Ok(file.into())
    }

    fn new(map: MmapRaw) -> io::Result<Self> {
        let base = NonNull::new(map.as_mut_ptr());
        let base = base.ok_or_else(|| io::Error::other("the mapping is at address 0"))?;
        Ok(Self { map: Arc::new(map), base })
    }
}

/// Allocates the blocks of a file by writing, on a file system without `fallocate`.
fn write_over(file: &File, len: usize) -> io::Result<()> {
    let mut chunk = [0; 4096];
    for at in (0..len).step_by(chunk.len()) {
        let bytes = &mut chunk[..(len - at).min(4096)];
        let found = file.read_at(bytes, at as u64)?;
        bytes[found..].fill(0);
        file.write_all_at(bytes, at as u64)?;
    }
    Ok(())
}

// SAFETY: the mapping stays at its address until the last handle is dropped. Its bytes are
// allocated, and the file is never shortened: other users cannot access it, and this crate never
// does. No reference to its bytes is created.
unsafe impl SharedMemory for RecordFile {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    fn len(&self) -> usize {
        self.map.len()
    }
}
