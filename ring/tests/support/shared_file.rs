//! A file mapped by two processes: the shared memory of tests with a peer in another process.
#![allow(unsafe_code)]

use core::ptr::NonNull;
use memmap2::{MmapOptions, MmapRaw};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};
use std::fs::File;
use std::sync::Arc;

/// Some pages of a file, shared with all processes that map it.
#[derive(Clone, Debug)]
pub struct SharedFile(Arc<MmapRaw>);

impl SharedFile {
    /// Resizes `file` to that many zeroed pages and maps it.
    pub fn map(file: &File, pages: usize) -> std::io::Result<Self> {
        let bytes = pages * PAGE_SIZE;
        file.set_len(bytes as u64)?;
        Ok(Self(Arc::new(MmapOptions::new().len(bytes).map_raw(file)?)))
    }
}

// SAFETY: the mapping is page-aligned, writable and stays at its address until the last clone is
// dropped; `MmapRaw` makes no reference to its bytes. The file belongs to the test and is never
// shortened, so no access faults.
unsafe impl SharedMemory for SharedFile {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.0.as_mut_ptr()).expect("a mapping is not at address 0")
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}
