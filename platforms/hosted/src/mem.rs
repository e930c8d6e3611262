//! Memory of domains: sealed memfds and their mappings. This is the only file with `unsafe` code
//! that maps memory. It provides [`SharedMemory`], which the rest of the crate uses in safe Rust.
//!
//! # Safety argument
//!
//! - A mapping belongs to one [`Mapped`], which unmaps it when dropped and is never moved out of
//!   its owner. Every pointer into it borrows it ([`Slice`]) or owns its keeper ([`Held`]).
//! - An access can only fault if the file becomes shorter than the mapping. Every file is sealed
//!   against shrinking, and [`Mapped`] checks seal and length before it maps.
//! - No reference to mapped bytes is ever created: all access goes through `pvio_ring::shm`.
#![allow(unsafe_code)]

use core::fmt;
use core::marker::PhantomData;
use core::ptr::{NonNull, null_mut};
use memmap2::{MmapOptions, MmapRaw};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Creates a memfd of `len` zero bytes whose length cannot be changed.
pub(crate) fn sealed_memfd(name: &str, len: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let bytes = u64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Mapping, owned until dropped.
#[derive(Debug)]
pub(crate) struct Mapped {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    _owner: Owner,
}

/// What unmaps a mapping when it is dropped.
#[derive(Debug)]
enum Owner {
    File { _map: MmapRaw },
    Stitched { _range: Stitched },
}

/// A range of addresses with pages of a file in any order. `memmap2` cannot map at a given address
/// (`MAP_FIXED`), which this needs for each page.
#[derive(Debug)]
struct Stitched {
    base: NonNull<u8>,
    len: usize,
}

impl Drop for Stitched {
    fn drop(&mut self) {
        // SAFETY: mapped by `Mapped::stitched` with this address and length, and unmapped once;
        // everything that pointed into it borrowed or owned its `Mapped` and has been dropped.
        let done = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(done.is_ok(), "munmap: {done:?}");
    }
}

// SAFETY: the memory is accessed only through atomics and opaque copies, from any thread; the
// mapping itself changes only in `drop`, which has exclusive access.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first `len` bytes of a sealed memfd, readable and writable.
    pub(crate) fn front(fd: impl AsFd, len: usize) -> io::Result<Self> {
        check_sealed(&fd, len)?;
        let map = MmapOptions::new().len(len).no_reserve_swap().map_raw(fd.as_fd().as_raw_fd())?;
        let base = NonNull::new(map.as_mut_ptr()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len, writable: true, _owner: Owner::File { _map: map } })
    }

    /// Maps pages of a sealed memfd of `file_len` bytes contiguously, in any order.
    pub(crate) fn stitched(
        fd: impl AsFd,
        file_len: usize,
        frames: &[u32],
        writable: bool,
    ) -> io::Result<Self> {
        check_sealed(&fd, file_len)?;
        let len = frames.len().checked_mul(PAGE_SIZE).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is requested. The range is reserved without access until every page of
        // it is mapped below; if one fails, dropping `range` unmaps all of it.
        let base = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), flags) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let range = Stitched { base, len };
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        for (i, frame) in frames.iter().enumerate() {
            let offset = *frame as usize * PAGE_SIZE;
            if offset.checked_add(PAGE_SIZE).is_none_or(|end| end > file_len) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
            // SAFETY: `i < frames.len()`, so the page lies in the range just reserved, which this
            // function owns and has not passed on; nothing else is replaced.
            unsafe {
                let at = range.base.as_ptr().add(i * PAGE_SIZE).cast();
                mmap(at, PAGE_SIZE, prot, flags, &fd, offset as u64)?;
            }
        }
        Ok(Self { base, len, writable, _owner: Owner::Stitched { _range: range } })
    }

    /// Returns a part of it; `None` if it is not completely inside or does not start at a multiple
    /// of 8.
    #[inline]
    pub(crate) fn slice(&self, offset: usize, len: usize) -> Option<Slice<'_>> {
        let base = self.place(offset, len)?;
        Some(Slice { base, len, writable: self.writable, of: PhantomData })
    }

    #[inline]
    fn place(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if !offset.is_multiple_of(8) || offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset <= self.len`, so the address is in or one past the mapping.
        Some(unsafe { self.base.add(offset) })
    }
}

// SAFETY: mapped until dropped, at a fixed page-aligned address, with the access that `writable`
// returns; a sealed file cannot shrink below it, so no access faults; no reference to it is
// created.
unsafe impl SharedMemory for Mapped {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    fn writable(&self) -> bool {
        self.writable
    }
}

/// Part of a mapping that is owned elsewhere; writable if the mapping is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice<'a> {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    of: PhantomData<&'a Mapped>,
}

// SAFETY: `Mapped::slice` checked bounds and alignment; the borrow keeps the mapping alive.
unsafe impl SharedMemory for Slice<'_> {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn writable(&self) -> bool {
        self.writable
    }
}

/// Owner of a mapping, or of a reference that keeps it mapped.
///
/// # Safety
/// `memory` returns the same mapping for as long as the value lives, wherever it is moved to.
pub(crate) unsafe trait Keeper {
    /// The mapping.
    fn memory(&self) -> &Mapped;
}

/// Part of shared memory, with the value that keeps it valid. Dropping it drops that value.
pub struct Held<K> {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    keeper: K,
}

impl<K: Clone> Clone for Held<K> {
    fn clone(&self) -> Self {
        Self { keeper: self.keeper.clone(), ..*self }
    }
}

impl<K> Held<K> {
    /// Returns the value that keeps the memory valid.
    pub(crate) fn keeper(&self) -> &K {
        &self.keeper
    }
}

/// Returns a part of the memory that `keeper` keeps valid; `None` if it is not completely inside or
/// does not start at a multiple of 8. It is writable only if both the mapping and `writable` allow
/// it.
#[inline]
pub(crate) fn hold<K: Keeper>(
    keeper: K,
    offset: usize,
    len: usize,
    writable: bool,
) -> Option<Held<K>> {
    let memory = keeper.memory();
    let (base, writable) = (memory.place(offset, len)?, writable && memory.writable);
    Some(Held { base, len, writable, keeper })
}

// SAFETY: the memory is accessed only through atomics and opaque copies; the rest is the keeper's.
unsafe impl<K: Send> Send for Held<K> {}
// SAFETY: as above.
unsafe impl<K: Sync> Sync for Held<K> {}

// SAFETY: created only by `hold` (clones copy a value that it created, together with the keeper),
// which checked that the part lies in the mapping that the keeper keeps valid, for as long as this
// owns the keeper.
unsafe impl<K> SharedMemory for Held<K> {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn writable(&self) -> bool {
        self.writable
    }
}

impl<K> fmt::Debug for Held<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("len", &self.len)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

/// Checks that the length of a file is fixed and at least `len`.
fn check_sealed(fd: impl AsFd, len: usize) -> io::Result<()> {
    let long = usize::try_from(fstat(&fd)?.st_size).is_ok_and(|size| size >= len);
    if len == 0 || !long || !fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a sealed file of that length"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_ring::shm::Region;

    #[test]
    fn unsealed_or_short_memfd_is_not_mapped() {
        let open = rustix::fs::memfd_create("open", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&open, 8192).unwrap();
        assert!(Mapped::front(&open, 4096).is_err());
        let fd = sealed_memfd("sealed", 8192).unwrap();
        assert!(Mapped::front(&fd, 8193).is_err() && Mapped::front(&fd, 0).is_err());
        assert!(Mapped::front(&fd, 8192).is_ok());
        assert!(ftruncate(&fd, 4096).is_err() && ftruncate(&fd, 65536).is_err());
    }

    #[test]
    fn stitched_mapping_has_file_pages_in_requested_order() {
        let fd = sealed_memfd("stitched", 4 * PAGE_SIZE).unwrap();
        let flat = Mapped::front(&fd, 4 * PAGE_SIZE).unwrap();
        for page in 0..4_u8 {
            flat.write_bytes(usize::from(page) * PAGE_SIZE, &[page + 1; 8]).unwrap();
        }
        let odd = Mapped::stitched(&fd, 4 * PAGE_SIZE, &[3, 0, 3], true).unwrap();
        let mut seen = [0; 8];
        for (at, byte) in [(0, 4), (1, 1), (2, 4)] {
            odd.read_bytes(at * PAGE_SIZE, &mut seen).unwrap();
            assert_eq!(seen, [byte; 8]);
        }
        odd.write_bytes(PAGE_SIZE + 8, &[9]).unwrap();
        flat.read_bytes(8, &mut seen[..1]).unwrap();
        assert_eq!(seen[0], 9);
        let fixed = Mapped::stitched(&fd, 4 * PAGE_SIZE, &[1], false).unwrap();
        assert!(fixed.write_bytes(0, &[1]).is_none());
        assert!(fixed.slice(8, 8).unwrap().write_bytes(0, &[1]).is_none());
        assert!(Mapped::stitched(&fd, 4 * PAGE_SIZE, &[4], true).is_err());
        assert!(Mapped::stitched(&fd, 4 * PAGE_SIZE, &[u32::MAX], true).is_err());
    }

    #[test]
    fn slice_outside_mapping_is_none() {
        let fd = sealed_memfd("slices", PAGE_SIZE).unwrap();
        let page = Mapped::front(&fd, PAGE_SIZE).unwrap();
        assert!(page.slice(4088, 8).is_some());
        assert!(page.slice(4088, 9).is_none() && page.slice(4, 8).is_none());
        assert!(page.slice(usize::MAX - 7, 8).is_none());
    }
}
