//! Memory that the kernel may read or write for this process.
#![allow(unsafe_code)]

use core::ptr::NonNull;
use pvio_ring::IoSeg;
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

/// Memory that an operation owns while the kernel uses it.
///
/// # Safety
/// For as long as the value lives, wherever it is moved to, `base()..base() + len()` stays valid
/// at the same address, and no Rust reference to it exists unless it was borrowed from the value
/// itself.
pub unsafe trait IoBuf: Send + 'static {
    /// Returns the address of the first byte.
    fn base(&self) -> *mut u8;
    /// Returns the length in bytes.
    fn len(&self) -> usize;
    /// Whether the kernel may write to it.
    fn writable(&self) -> bool;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// SAFETY: `SharedMemory` promises all of this, and that no reference exists at all.
unsafe impl<M: SharedMemory + Send + 'static> IoBuf for M {
    fn base(&self) -> *mut u8 {
        SharedMemory::base(self).as_ptr()
    }

    fn len(&self) -> usize {
        SharedMemory::len(self)
    }

    fn writable(&self) -> bool {
        SharedMemory::writable(self)
    }
}

/// Private memory, accessed only by its owner and (while an operation owns it) by the kernel.
#[derive(Debug)]
pub struct PrivateBuf {
    /// An allocation that this value owns, kept as a raw pointer: the kernel writes to it through a
    /// copy of the pointer, which no reference and no move of a box may invalidate.
    memory: NonNull<[u8]>,
    /// Offset of the buffer in `memory`.
    start: usize,
    len: usize,
}

// SAFETY: plain memory that belongs to this value alone.
unsafe impl Send for PrivateBuf {}
// SAFETY: with `&self` its bytes are only read.
unsafe impl Sync for PrivateBuf {}

impl Drop for PrivateBuf {
    fn drop(&mut self) {
        // SAFETY: the pointer of the box that `of` took apart, freed once. The owner of the value
        // drops it, so no operation uses the memory.
        drop(unsafe { Box::from_raw(self.memory.as_ptr()) });
    }
}

impl PrivateBuf {
    /// Returns a buffer of `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self::of(vec![0; len].into_boxed_slice(), 0, len)
    }

    /// Returns the buffer of `len` bytes from `start` on, which are inside `memory`.
    fn of(memory: Box<[u8]>, start: usize, len: usize) -> Self {
        assert!(start.checked_add(len).is_some_and(|end| end <= memory.len()));
        Self { memory: NonNull::from(Box::leak(memory)), start, len }
    }

    /// Returns a buffer of `len` zero bytes that starts at a page boundary, which is cheaper for
    /// copies page by page (by a hypervisor). Allocates a page more than `len`, which is not
    /// touched.
    #[must_use]
    pub fn page_aligned(len: usize) -> Self {
        let memory = vec![0; len.saturating_add(PAGE_SIZE - 1)].into_boxed_slice();
        // The memory does not move while the box exists.
        let start = memory.as_ptr().addr().wrapping_neg() % PAGE_SIZE;
        Self::of(memory, start, len)
    }

    fn first(&self) -> NonNull<u8> {
        // SAFETY: `start` is inside the allocation or one past it, by `of`.
        unsafe { self.memory.cast::<u8>().add(self.start) }
    }

    /// Returns the bytes. Only the owner can call this, so no operation is using them.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised bytes of the allocation, by `of`. They are written only through
        // `&mut self`, and by the kernel for an operation that owns this value.
        unsafe { core::slice::from_raw_parts(self.first().as_ptr(), self.len) }
    }

    /// Returns the bytes as a mutable slice.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`; `&mut self` is the only access.
        unsafe { core::slice::from_raw_parts_mut(self.first().as_ptr(), self.len) }
    }
}

// SAFETY: an allocation does not move when its owner moves, and references to it are borrowed from
// the owner, which an operation in flight has taken. The pointer is that of the allocation, so it
// may be written through.
unsafe impl IoBuf for PrivateBuf {
    fn base(&self) -> *mut u8 {
        self.first().as_ptr()
    }

    fn len(&self) -> usize {
        self.len
    }

    fn writable(&self) -> bool {
        true
    }
}

/// Returns the segment that covers the whole buffer.
pub fn whole<B: IoBuf>(buf: B) -> IoSeg<B> {
    let len = buf.len();
    IoSeg { buf, offset: 0, len }
}

/// Returns the address of a segment's first byte; `None` if it is not inside its buffer, or is to
/// be written and the buffer is not writable.
#[inline]
pub(crate) fn address<B: IoBuf>(seg: &IoSeg<B>, write: bool) -> Option<*mut u8> {
    let end = seg.offset.checked_add(seg.len)?;
    if end > seg.buf.len() || (write && !seg.buf.writable()) {
        return None;
    }
    // SAFETY: `offset <= len` of the buffer, whose bytes are all valid.
    Some(unsafe { seg.buf.base().add(seg.offset) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_aligned_buffer_is_aligned_and_keeps_address_when_moved() {
        for len in [1, 4095, 4096, 70_000] {
            let mut buf = PrivateBuf::page_aligned(len);
            assert_eq!((buf.as_slice().len(), IoBuf::len(&buf)), (len, len));
            buf.as_mut_slice().fill(7);
            let base = IoBuf::base(&buf);
            let moved = Box::new(buf);
            assert_eq!((base.addr() % PAGE_SIZE, IoBuf::base(&*moved)), (0, base));
        }
    }
}
