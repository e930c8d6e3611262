//! Packet memory of two sizes: few large buffers, more small ones.
#![forbid(unsafe_code)]

use super::FRAME_MAX;
use alloc::vec::Vec;
use pvio_ring::shm::PAGE_SIZE;
use pvio_uring::PrivateBuf;

/// Where frames begin that a port puts into a large buffer: with a page, for they are copied on
/// page by page.
pub(super) const FRAME_AT: usize = PAGE_SIZE;
/// Bytes of a large buffer. A page more than a frame, so that its pages can be aligned.
pub(super) const LARGE: usize = FRAME_AT + FRAME_MAX + 1;
/// Bytes of a small buffer.
pub(super) const SMALL: usize = 2048;
/// Buffers for packets on their way out. A ring of 256 slots holds 15 packets of the largest size.
pub(super) const LARGE_OUT: usize = 16;
/// The same, for small ones.
pub(super) const SMALL_OUT: usize = 128;

/// Buffers that nobody uses, of both sizes.
#[derive(Debug)]
pub(super) struct BufferPool {
    pub large: Vec<PrivateBuf>,
    small: Vec<PrivateBuf>,
    /// Bytes of a small buffer that are not the frame's.
    headroom: usize,
}

impl BufferPool {
    pub fn new(headroom: usize) -> Self {
        Self { large: buffers(LARGE, LARGE_OUT), small: buffers(SMALL, SMALL_OUT), headroom }
    }

    pub fn give_back(&mut self, buf: PrivateBuf) {
        if is_large(&buf) { self.large.push(buf) } else { self.small.push(buf) }
    }

    /// A small buffer instead, if a frame of `len` bytes fits in one and there is one.
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
