//! Packet buffers of two sizes: few large ones, more small ones.
#![forbid(unsafe_code)]

use super::{FRAME_MAX, WouldBlock};
use alloc::vec::Vec;
use pvio_ring::shm::PAGE_SIZE;
use pvio_runtime::PrivateBuf;

/// Offset of a frame that a port puts into a large buffer: the start of a page, since frames are
/// copied page by page later.
pub(super) const FRAME_AT: usize = PAGE_SIZE;
/// Size of a large buffer in bytes: a page more than a frame, so that the frame's pages can be
/// aligned.
pub(super) const LARGE: usize = FRAME_AT + FRAME_MAX + 1;
/// Size of a small buffer in bytes.
pub(super) const SMALL: usize = 2048;
/// Number of large buffers for sending. A ring of 256 slots holds 15 packets of the largest size.
pub(super) const LARGE_OUT: usize = 16;
/// Number of small buffers for sending.
pub(super) const SMALL_OUT: usize = 128;

/// Free buffers of both sizes.
#[derive(Debug)]
pub(super) struct BufferPool {
    pub large: Vec<PrivateBuf>,
    small: Vec<PrivateBuf>,
    /// Bytes of a small buffer that are reserved for headroom.
    headroom: usize,
}

impl BufferPool {
    pub fn new(headroom: usize) -> Self {
        Self { large: buffers(LARGE, LARGE_OUT), small: buffers(SMALL, SMALL_OUT), headroom }
    }

    /// Returns a large buffer, for a packet whose size is not known.
    pub fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.large.pop().ok_or(WouldBlock)
    }

    pub fn give_back(&mut self, buf: PrivateBuf) {
        if is_large(&buf) { self.large.push(buf) } else { self.small.push(buf) }
    }

    /// Exchanges a buffer for a small one if a frame of `len` bytes fits and a small one is free.
    pub fn fit(&mut self, buf: PrivateBuf, len: usize) -> PrivateBuf {
        if len.saturating_add(self.headroom) > SMALL {
            return buf;
        }
        match self.small.pop() {
            Some(small) => {
                self.give_back(buf);
                small
            }
            None => buf,
        }
    }
}

pub(super) fn buffers(len: usize, count: usize) -> Vec<PrivateBuf> {
    core::iter::repeat_with(|| PrivateBuf::page_aligned(len)).take(count).collect()
}

pub(super) fn is_large(buf: &PrivateBuf) -> bool {
    buf.as_slice().len() > SMALL
}
