//! Memory that the kernel may read or write for this process.
#![allow(unsafe_code)]

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
    memory: Box<[u8]>,
    /// Offset of the buffer in `memory`.
    start: usize,
    len: usize,
}

impl PrivateBuf {
    /// Returns a buffer of `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self { memory: vec![0; len].into_boxed_slice(), start: 0, len }
    }

    /// Returns a buffer of `len` zero bytes that starts at a page boundary, which is cheaper for
    /// copies page by page (by a hypervisor). Allocates a page more than `len`, which is not
    /// touched.
    #[must_use]
    pub fn page_aligned(len: usize) -> Self {
        let memory = vec![0; len.saturating_add(PAGE_SIZE - 1)].into_boxed_slice();
        // The memory does not move while the box exists.
        let start = memory.as_ptr().addr().wrapping_neg() % PAGE_SIZE;
        Self { memory, start, len }
    }

    /// Returns the bytes. Only the owner can call this, so no operation is using them.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// Returns the bytes as a mutable slice.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

// SAFETY: a boxed slice does not move when its owner moves, and references to it are borrowed from
// the owner, which an operation in flight has taken.
unsafe impl IoBuf for PrivateBuf {
    fn base(&self) -> *mut u8 {
        self.as_slice().as_ptr().cast_mut()
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
