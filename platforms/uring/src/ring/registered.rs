//! Memory that the kernel knows before there is an operation on it.
#![allow(unsafe_code)]

use super::Uring;
use crate::buf::IoBuf;
use crate::lists::Vector;
use pvio_ring::shm::PoolMemory;
use std::io;

impl<B: IoBuf> Uring<B> {
    /// Makes memory known to the kernel, which pins it now and not for each operation. Operations
    /// whose segments are one stretch of it gain by that, the more pages the more; all others are
    /// as before. It is in memory for as long as there is the ring, and counts as locked.
    ///
    /// # Errors
    /// `ENOMEM` where the process may not lock so much (`RLIMIT_MEMLOCK`), `EBUSY` where there is
    /// some already, or what else `io_uring_register` says. Nothing is changed then.
    pub fn register(&mut self, memory: PoolMemory) -> io::Result<()> {
        let vector = Vector { base: memory.base(), len: memory.len() };
        // SAFETY: `Vector` is laid out as `struct iovec`. The memory is allocated for as long as
        // `memory` lives, which the ring owns until the kernel was told to forget it (`Drop`) or,
        // where that fails, is closed itself. The kernel pins the pages: it touches no others, and
        // these only for operations, each of which owns buffers at the addresses it names (`push`).
        unsafe {
            let vectors = std::slice::from_raw_parts(std::ptr::from_ref(&vector).cast(), 1);
            self.uring.submitter().register_buffers(vectors)
        }?;
        self.registered = Some(memory);
        Ok(())
    }

    /// How many operations were on [registered](Self::register) memory.
    #[must_use]
    pub fn on_registered(&self) -> u64 {
        self.on_registered
    }
}

/// Whether a stretch is all inside.
#[inline]
pub(super) fn is_in(memory: &PoolMemory, stretch: &Vector) -> bool {
    let at = stretch.base.addr().checked_sub(memory.base().addr());
    at.and_then(|at| at.checked_add(stretch.len)).is_some_and(|end| end <= memory.len())
}
