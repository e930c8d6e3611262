//! Memory that the kernel may read or write on our behalf.
#![allow(unsafe_code)]

use pvio_ring::shm::{Region, SharedMemory};

/// Memory an operation owns while the kernel uses it.
///
/// # Safety
/// For as long as the value lives, wherever it is moved to, `base()..base() + len()` stays valid
/// at the same address, and no Rust reference to it exists unless it was borrowed from the value
/// itself.
pub unsafe trait IoBuf: Send + 'static {
    /// The first byte.
    fn base(&self) -> *mut u8;
    /// Length in bytes.
    fn len(&self) -> usize;
    /// Whether the kernel may write to it.
    fn writable(&self) -> bool;
    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// SAFETY: `SharedMemory` promises all of it, and that no reference exists at all.
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

/// Memory of our own, shared with nobody but (while an operation owns it) the kernel.
#[derive(Debug)]
pub struct PrivateBuf(Box<[u8]>);

impl PrivateBuf {
    /// `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self(vec![0; len].into_boxed_slice())
    }

    /// The bytes. Only its owner can ask, so no operation is using it.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

// SAFETY: a boxed slice stays where it is when its owner moves, and references to it are borrowed
// from the owner, which an operation in flight has taken.
unsafe impl IoBuf for PrivateBuf {
    fn base(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut()
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn writable(&self) -> bool {
        true
    }
}

/// A stretch of a buffer.
#[derive(Debug)]
pub struct IoSeg<B> {
    /// The buffer.
    pub buf: B,
    /// Where the stretch begins, in bytes.
    pub offset: usize,
    /// Its length in bytes.
    pub len: usize,
}

impl<B: IoBuf> IoSeg<B> {
    /// All of a buffer.
    pub fn whole(buf: B) -> Self {
        let len = buf.len();
        Self { buf, offset: 0, len }
    }

    /// Its first byte's address; `None` when it is not inside its buffer, or is to be written and
    /// may not be.
    #[inline]
    pub(crate) fn address(&self, write: bool) -> Option<*mut u8> {
        let end = self.offset.checked_add(self.len)?;
        if end > self.buf.len() || (write && !self.buf.writable()) {
            return None;
        }
        // SAFETY: `offset <= len` of the buffer, whose bytes are all valid.
        Some(unsafe { self.buf.base().add(self.offset) })
    }
}

/// A stretch of shared memory as a segment; `None` when it does not lie inside.
pub fn shared_segment<M: SharedMemory + Send + 'static>(
    buf: M,
    offset: usize,
    len: usize,
) -> Option<IoSeg<M>> {
    buf.range(offset, len)?;
    Some(IoSeg { buf, offset, len })
}
