//! Memory that is registered with the kernel before operations use it.
#![allow(unsafe_code)]

use super::Uring;
use crate::buf::IoBuf;
use crate::lists::Vector;
use pvio_ring::shm::PoolMemory;
use std::io;

impl<B: IoBuf> Uring<B> {
    /// Registers memory with the kernel, which pins it once instead of for each operation.
    /// Operations whose segments are one range of it become cheaper, depending on the number of
    /// pages; others are unchanged. The memory stays pinned as long as the ring exists, and counts
    /// as locked.
    ///
    /// # Errors
    /// `ENOMEM` if the limit of locked memory is exceeded (`RLIMIT_MEMLOCK`), `EBUSY` if memory is
    /// registered already, or another error of `io_uring_register`. Nothing is changed then.
    pub fn register(&mut self, memory: PoolMemory) -> io::Result<()> {
        let vector = Vector { base: memory.base(), len: memory.len() };
        // SAFETY: `Vector` has the layout of `struct iovec`. The memory is allocated for as long as
        // `memory` lives, which the ring owns until the memory is unregistered (`Drop`) or, if that
        // fails, the ring itself is closed. The kernel pins the pages: it accesses no others, and
        // these only for operations, each of which owns buffers at the addresses that it names
        // (`push`).
        unsafe {
            let vectors = std::slice::from_raw_parts(std::ptr::from_ref(&vector).cast(), 1);
            self.uring.submitter().register_buffers(vectors)
        }?;
        self.registered = Some(memory);
        Ok(())
    }

    /// Returns the number of operations that used [registered](Self::register) memory.
    #[must_use]
    pub fn on_registered(&self) -> u64 {
        self.on_registered
    }
}

/// Whether a range is completely inside the memory.
#[inline]
pub(super) fn is_in(memory: &PoolMemory, stretch: &Vector) -> bool {
    let at = stretch.base.addr().checked_sub(memory.base().addr());
    at.and_then(|at| at.checked_add(stretch.len)).is_some_and(|end| end <= memory.len())
}
