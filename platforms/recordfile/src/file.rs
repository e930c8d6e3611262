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

/// A file that is mapped shared. Cloning it gives another handle to the same memory. It stays mapped
/// until the last handle is dropped, also if its name is removed.
#[derive(Clone, Debug)]
pub struct RecordFile {
    map: Arc<MmapRaw>,
    base: NonNull<u8>,
}

// SAFETY: the mapping may be used, and is unmapped, by any thread.
unsafe impl Send for RecordFile {}
// SAFETY: its bytes are reached through atomics and opaque copies alone.
unsafe impl Sync for RecordFile {}

impl RecordFile {
    /// `len` zero bytes that end with this process.
    ///
    /// # Errors
    /// What the system reports.
    pub fn private(len: usize) -> io::Result<Self> {
        Self::new(MmapOptions::new().len(len).map_anon()?.into())
    }

    /// Maps the first `len` bytes of a file, and has the system allocate them: a page that a full file
    /// system cannot provide when it is first written would end the process with `SIGBUS`.
    pub(crate) fn map(fd: OwnedFd, len: usize) -> io::Result<Self> {
        let file = File::from(fd);
        match retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, len as u64)) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => write_over(&file, len)?,
            Err(error) => return Err(error.into()),
        }
        Self::new(MmapOptions::new().len(len).map_raw(&file)?)
    }

    fn new(map: MmapRaw) -> io::Result<Self> {
        let base = NonNull::new(map.as_mut_ptr());
        let base = base.ok_or_else(|| io::Error::other("the mapping is at address 0"))?;
        Ok(Self { map: Arc::new(map), base })
    }
}

/// Allocates the blocks of a file on a file system that does so only when they are written.
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

// SAFETY: the mapping stays where it is until the last handle is dropped. Its bytes are allocated, and
// nobody shortens the file: others cannot reach it, and this crate never does. No reference to its bytes
// is made.
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
