//! Shared memory composed of other shared memory.

use super::{Region, SharedMemory};
use core::ptr::NonNull;

// SAFETY: the borrowed value keeps its promise and outlives the borrow.
unsafe impl<M: SharedMemory + ?Sized> SharedMemory for &M {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        (**self).base()
    }

    #[inline]
    fn len(&self) -> usize {
        (**self).len()
    }

    #[inline]
    fn writable(&self) -> bool {
        (**self).writable()
    }

    #[inline(always)]
    fn before_load(&self) {
        (**self).before_load();
    }

    #[inline(always)]
    fn before_store(&self) {
        (**self).before_store();
    }
}

/// A part of some shared memory, which keeps the whole alive.
#[derive(Clone, Debug)]
pub struct Part<M> {
    whole: M,
    offset: usize,
    len: usize,
}

impl<M: SharedMemory> Part<M> {
    /// Returns `len` bytes from `offset`; `None` if they are not all inside or `offset` is not a
    /// multiple of 8.
    #[must_use]
    pub fn new(whole: M, offset: usize, len: usize) -> Option<Self> {
        (offset.is_multiple_of(8) && whole.within(offset, len).is_some()).then_some(Self {
            whole,
            offset,
            len,
        })
    }
}

// SAFETY: `new` checked that the part lies inside `whole` and keeps its alignment; all else is
// `whole`'s promise, and `whole` lives as long as this value.
unsafe impl<M: SharedMemory> SharedMemory for Part<M> {
    fn base(&self) -> NonNull<u8> {
        // SAFETY: `offset + len <= whole.len()`.
        unsafe { self.whole.base().add(self.offset) }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn writable(&self) -> bool {
        self.whole.writable()
    }

    #[inline(always)]
    fn before_load(&self) {
        self.whole.before_load();
    }

    #[inline(always)]
    fn before_store(&self) {
        self.whole.before_store();
    }
}

/// Shared memory of one of two kinds, for example a mapped grant or a private buffer.
#[derive(Clone, Debug)]
pub enum Either<A, B> {
    /// The first kind.
    A(A),
    /// The second kind.
    B(B),
}

// SAFETY: each variant passes on the promise of the value in it.
unsafe impl<A: SharedMemory, B: SharedMemory> SharedMemory for Either<A, B> {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        match self {
            Self::A(m) => m.base(),
            Self::B(m) => m.base(),
        }
    }

    #[inline]
    fn len(&self) -> usize {
        match self {
            Self::A(m) => m.len(),
            Self::B(m) => m.len(),
        }
    }

    #[inline]
    fn writable(&self) -> bool {
        match self {
            Self::A(m) => m.writable(),
            Self::B(m) => m.writable(),
        }
    }

    #[inline(always)]
    fn before_load(&self) {
        match self {
            Self::A(m) => m.before_load(),
            Self::B(m) => m.before_load(),
        }
    }

    #[inline(always)]
    fn before_store(&self) {
        match self {
            Self::A(m) => m.before_store(),
            Self::B(m) => m.before_store(),
        }
    }
}

/// Shared memory together with a value that must live as long as the memory is in use (a mapping's
/// reference count, for example). It may permit less than the memory itself does.
#[derive(Clone, Debug)]
pub struct Guarded<M, G> {
    memory: M,
    writable: bool,
    guard: G,
}

impl<M: SharedMemory, G> Guarded<M, G> {
    /// Returns `memory` with a `guard` that is dropped with it.
    #[must_use]
    pub fn new(memory: M, guard: G) -> Self {
        Self { writable: memory.writable(), memory, guard }
    }

    /// Returns `memory` for reading only, with a `guard` that is dropped with it.
    #[must_use]
    pub fn read_only(memory: M, guard: G) -> Self {
        Self { memory, writable: false, guard }
    }

    /// Returns the guard.
    #[must_use]
    pub fn guard(&self) -> &G {
        &self.guard
    }
}

// SAFETY: `memory` keeps the promise and lives as long as this value; nothing is writable that was
// not.
unsafe impl<M: SharedMemory, G> SharedMemory for Guarded<M, G> {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    #[inline]
    fn len(&self) -> usize {
        self.memory.len()
    }

    #[inline]
    fn writable(&self) -> bool {
        self.writable
    }

    #[inline(always)]
    fn before_load(&self) {
        self.memory.before_load();
    }

    #[inline(always)]
    fn before_store(&self) {
        self.memory.before_store();
    }
}
