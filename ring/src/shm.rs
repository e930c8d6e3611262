//! The only code that accesses memory which a peer can write concurrently.
//!
//! # Soundness
//!
//! A page shared with another domain can change at any time. Rust does not define a reference
//! (`&T`, `&mut T`, `&[u8]`) into such memory, so this module never creates one. The accesses that
//! it makes are defined as follows:
//!
//! - **Words** (ring indices, grant flags, event bits) are accessed through [`AtomicU16`],
//!   [`AtomicU32`] and [`AtomicU64`], each created from a pointer for the duration of one
//!   operation. An atomic may change at any time: a racing peer changes the value read, but causes
//!   no undefined behavior. Access sizes are mixed only where the value is not relied upon to be
//!   consistent (a peer that tears its own slot gets what it wrote).
//! - **Slots** are copied by `words` only, a few words at a time, and **bulk data** by
//!   `copy_from_shared` and `copy_to_shared` only. On x86-64 these are inline assembly (plain and
//!   vector moves; `rep movsb`, and `rep stosb` to fill). It is opaque to the compiler, which must assume that the
//!   assembly reads and writes the named memory and can assume nothing about the values, as with
//!   device memory. On other architectures they are relaxed atomics.
//! - **The kernel** receives raw addresses ([`RawRange`]) from the engines that submit I/O; it
//!   copies the data itself and races only with the peer that owns the data.
//!
//! Every access is checked against the length that the implementation of [`SharedMemory`] promises,
//! so a wrong offset yields `None` instead of an invalid pointer. All other modules of this crate,
//! and all device crates, are written in safe Rust on top of [`Region`].
#![allow(unsafe_code)]

#[cfg(feature = "alloc")]
mod heap;
#[cfg(all(loom, feature = "alloc"))]
mod model;
#[cfg(feature = "alloc")]
mod private;
pub(crate) mod slot;
mod slots;
mod views;
#[cfg(feature = "alloc")]
mod watched;
mod words;

#[cfg(feature = "alloc")]
pub use heap::HeapMemory;
#[cfg(all(loom, feature = "alloc"))]
pub use model::{ModelMemory, Weakened};
#[cfg(feature = "alloc")]
pub use private::{PoolMemory, PrivatePage};
use slots::SlotBytes;
pub(crate) use slots::{IndexWord, RingMemory};
#[cfg(feature = "alloc")]
pub use watched::Watched;

pub use views::{Either, Guarded, Part};

pub use crate::layout::PAGE_SIZE;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use slot::Slot;

/// A range of memory that another domain may read and write concurrently.
///
/// # Safety
///
/// For as long as the value lives (and wherever it is moved to):
/// - `base()` returns the same address, aligned to at least 8 bytes;
/// - `len()` returns the same length;
/// - every byte of `base()..base() + len()` stays mapped, readable, and (unless [`writable`] is
///   false) writable, and no access to it can fault;
/// - no Rust reference to any of these bytes exists anywhere in this process, except one borrowed
///   exclusively (`&mut`) from the value itself: the code that can use the value then holds that
///   reference. Memory that a peer can access never lends one.
///
/// [`writable`]: SharedMemory::writable
pub unsafe trait SharedMemory {
    /// Returns the address of the first byte.
    fn base(&self) -> NonNull<u8>;

    /// Returns the length in bytes.
    fn len(&self) -> usize;

    /// Returns whether writing is allowed. A grant mapped read-only returns `false`, and every
    /// store to it is rejected here instead of faulting.
    fn writable(&self) -> bool {
        true
    }

    /// Returns whether the length is 0.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Called by this crate before each load from the memory. Does nothing, except in a simulation,
    /// where a peer may write to the memory between any two accesses.
    #[inline(always)]
    fn before_load(&self) {}

    /// Called by this crate before each store to the memory. Does nothing, except in tests that
    /// take a snapshot, or stop a process, at every store.
    #[inline(always)]
    fn before_store(&self) {}

    /// Returns the model that replaces a ring's index words and fences in a build for loom.
    #[cfg(all(loom, feature = "alloc"))]
    fn model(&self) -> Option<&ModelMemory> {
        None
    }
}

/// An address range inside shared memory for the kernel to read or write. It is a number, not a
/// permission: code that passes it to the kernel must own the memory until the kernel has finished,
/// so that the memory stays valid and lends no reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRange {
    addr: NonNull<u8>,
    len: usize,
}

impl RawRange {
    /// Returns the address of the first byte.
    #[must_use]
    pub fn as_ptr(self) -> *mut u8 {
        self.addr.as_ptr()
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.len
    }

    /// Returns whether the length is 0.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// Bounds-checked access to any [`SharedMemory`]. Offsets are in bytes. Every operation returns
/// `None` (or `false`) if the access would exceed the memory, is not aligned to its size, or would
/// write to read-only memory.
pub trait Region: SharedMemory {
    /// Loads a `u32`.
    #[inline]
    fn load_u32(&self, offset: usize, order: Ordering) -> Option<u32> {
        let ptr = self.place::<u32>(offset)?;
        // SAFETY: `place` checked bounds and alignment; the trait's contract keeps it mapped.
        Some(unsafe { AtomicU32::from_ptr(ptr) }.load(order))
    }

    /// Stores a `u64`.
    #[inline]
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) -> bool {
        match self.place_mut::<u64>(offset) {
            // SAFETY: as for `store_u32`.
            Some(ptr) => unsafe { AtomicU64::from_ptr(ptr) }.store(value, order),
            None => return false,
        }
        true
    }

    /// Stores a `u32`.
    #[inline]
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) -> bool {
        match self.place_mut::<u32>(offset) {
            // SAFETY: as for `load_u32`, and `place_mut` checked that writing is allowed.
            Some(ptr) => unsafe { AtomicU32::from_ptr(ptr) }.store(value, order),
            None => return false,
        }
        true
    }

    /// Compares and exchanges a `u32`; `Some(Ok(old))` when it was exchanged.
    #[inline]
    fn compare_exchange_u32(&self, offset: usize, old: u32, new: u32) -> Option<Result<u32, u32>> {
        let ptr = self.place_mut::<u32>(offset)?;
        // SAFETY: as for `store_u32`.
        let word = unsafe { AtomicU32::from_ptr(ptr) };
        Some(word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire))
    }

    /// Compares and exchanges a `u64`; `Some(Ok(old))` when it was exchanged.
    #[inline]
    fn compare_exchange_u64(&self, offset: usize, old: u64, new: u64) -> Option<Result<u64, u64>> {
        let ptr = self.place_mut::<u64>(offset)?;
        // SAFETY: as for `store_u32`.
        let word = unsafe { AtomicU64::from_ptr(ptr) };
        Some(word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire))
    }

    /// Compares and exchanges a `u16`; `Some(Ok(old))` when it was exchanged.
    #[inline]
    fn compare_exchange_u16(&self, offset: usize, old: u16, new: u16) -> Option<Result<u16, u16>> {
        let ptr = self.place_mut::<u16>(offset)?;
        // SAFETY: as for `store_u32`.
        let word = unsafe { AtomicU16::from_ptr(ptr) };
        Some(word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire))
    }

    /// Loads a `u16`.
    #[inline]
    fn load_u16(&self, offset: usize, order: Ordering) -> Option<u16> {
        let ptr = self.place::<u16>(offset)?;
        // SAFETY: as for `load_u32`.
        Some(unsafe { AtomicU16::from_ptr(ptr) }.load(order))
    }

    /// Loads a `u64`.
    #[inline]
    fn load_u64(&self, offset: usize, order: Ordering) -> Option<u64> {
        #[cfg(all(loom, feature = "alloc"))]
        if let Some(model) = self.model() {
            return Some(model.bits(offset).load(order));
        }
        let ptr = self.place::<u64>(offset)?;
        // SAFETY: as for `load_u32`.
        Some(unsafe { AtomicU64::from_ptr(ptr) }.load(order))
    }

    /// Sets bits of a `u64` and returns the previous value. Sequentially consistent.
    #[inline]
    fn fetch_or_u64(&self, offset: usize, bits: u64) -> Option<u64> {
        #[cfg(all(loom, feature = "alloc"))]
        if let Some(model) = self.model() {
            return Some(model.bits(offset).fetch_or(bits, Ordering::SeqCst));
        }
        let ptr = self.place_mut::<u64>(offset)?;
        // SAFETY: as for `store_u32`.
        Some(unsafe { AtomicU64::from_ptr(ptr) }.fetch_or(bits, Ordering::SeqCst))
    }

    /// Clears all but the given bits of a `u64` and returns the previous value. Sequentially
    /// consistent.
    #[inline]
    fn fetch_and_u64(&self, offset: usize, bits: u64) -> Option<u64> {
        #[cfg(all(loom, feature = "alloc"))]
        if let Some(model) = self.model() {
            return Some(model.bits(offset).fetch_and(bits, Ordering::SeqCst));
        }
        let ptr = self.place_mut::<u64>(offset)?;
        // SAFETY: as for `store_u32`.
        Some(unsafe { AtomicU64::from_ptr(ptr) }.fetch_and(bits, Ordering::SeqCst))
    }

    /// Copies a few words from shared memory, in words as wide as alignment and length allow, each
    /// byte once.
    #[inline]
    fn read_words(&self, offset: usize, out: &mut [u8]) -> Option<()> {
        let from = self.range(offset, out.len())?.addr;
        // SAFETY: `range` checked the bounds; the trait's contract keeps it mapped.
        unsafe { words::load_words(from.as_ptr(), out.as_mut_ptr(), out.len()) };
        Some(())
    }

    /// Copies a few words into shared memory; the inverse of [`read_words`](Region::read_words).
    #[inline]
    fn write_words(&self, offset: usize, from: &[u8]) -> Option<()> {
        let to = self.range_mut(offset, from.len())?.addr;
        // SAFETY: `range_mut` checked the bounds and that writing is allowed.
        unsafe { words::store_words(from.as_ptr(), to.as_ptr(), from.len()) };
        Some(())
    }

    /// Copies bulk data out of shared memory into private memory.
    #[inline]
    fn read_bytes(&self, offset: usize, out: &mut [u8]) -> Option<()> {
        let from = self.range(offset, out.len())?.as_ptr();
        // SAFETY: `range` checked the source; `out` is borrowed exclusively and cannot overlap
        // it, since no reference into shared memory exists.
        unsafe { copy_from_shared(from, out) };
        Some(())
    }

    /// Copies private memory into shared memory.
    #[inline]
    fn write_bytes(&self, offset: usize, from: &[u8]) -> Option<()> {
        let to = self.range_mut(offset, from.len())?.as_ptr();
        // SAFETY: as for `read_bytes`, in the other direction.
        unsafe { copy_to_shared(from, to) };
        Some(())
    }

    /// Fills a range with one byte.
    fn fill(&self, offset: usize, len: usize, byte: u8) -> Option<()> {
        let to = self.range_mut(offset, len)?.as_ptr();
        // SAFETY: `range_mut` checked bounds and that writing is allowed.
        unsafe { fill_shared(to, byte, len) };
        Some(())
    }

    /// Returns a range as a slot, to be read front to back.
    #[inline]
    fn slot(&self, offset: usize, len: usize) -> Option<Slot<'_, Self>>
    where
        Self: Sized,
    {
        Some(Slot::new(SlotBytes::of(self, offset, len)?))
    }

    /// Copies the unread rest of a slot to `offset`, each byte once.
    #[inline]
    fn write_slot<M>(&self, offset: usize, mut slot: Slot<'_, M>) -> Option<()> {
        let to = self.range_mut(offset, slot.remaining())?;
        slot.bytes().move_to(to);
        Some(())
    }

    /// Returns the addresses of a range, for the kernel to read.
    #[inline]
    fn range(&self, offset: usize, len: usize) -> Option<RawRange> {
        self.before_load();
        self.within(offset, len)
    }

    #[doc(hidden)]
    #[inline]
    fn within(&self, offset: usize, len: usize) -> Option<RawRange> {
        let end = offset.checked_add(len)?;
        if end > self.len() {
            return None;
        }
        // SAFETY: `offset <= self.len()`, so the address is in or one past the memory.
        let addr = unsafe { self.base().add(offset) };
        Some(RawRange { addr, len })
    }

    /// Returns the addresses of a range, for the kernel to write.
    #[inline]
    fn range_mut(&self, offset: usize, len: usize) -> Option<RawRange> {
        if !self.writable() {
            return None;
        }
        self.before_store();
        self.within(offset, len)
    }

    #[doc(hidden)]
    #[inline]
    fn place<T>(&self, offset: usize) -> Option<*mut T> {
        self.before_load();
        self.aligned(offset)
    }

    #[doc(hidden)]
    #[inline]
    fn aligned<T>(&self, offset: usize) -> Option<*mut T> {
        let ptr = self.within(offset, size_of::<T>())?.as_ptr().cast::<T>();
        ptr.is_aligned().then_some(ptr)
    }

    #[doc(hidden)]
    #[inline]
    fn place_mut<T>(&self, offset: usize) -> Option<*mut T> {
        if !self.writable() {
            return None;
        }
        self.before_store();
        self.aligned(offset)
    }
}

impl<M: SharedMemory + ?Sized> Region for M {}

/// Orders every earlier store before every later load, together with the same fence in the peer
/// (`xen_mb()` / `virt_mb()` in the C headers).
#[inline(always)]
pub fn full_fence() {
    // A locked instruction is a full fence for ordinary memory like `mfence`, which compilers
    // choose for `SeqCst`, and is faster; C compilers and kernels use it for that reason. It does
    // not change the memory. As inline assembly it is a fence for the compiler too.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the word at the stack pointer belongs to this thread, and is not changed.
    unsafe {
        core::arch::asm!("lock or dword ptr [rsp], 0", options(nostack));
    }
    #[cfg(not(target_arch = "x86_64"))]
    core::sync::atomic::fence(Ordering::SeqCst);
}

/// # Safety
/// `from..from + out.len()` is mapped, readable shared memory.
#[inline]
unsafe fn copy_from_shared(from: *const u8, out: &mut [u8]) {
    // SAFETY: the caller's promise; `out` is a valid exclusive slice.
    unsafe { copy_bytes(from, out.as_mut_ptr(), out.len()) }
}

/// # Safety
/// `to..to + from.len()` is mapped, writable shared memory.
#[inline]
unsafe fn copy_to_shared(from: &[u8], to: *mut u8) {
    // SAFETY: the caller's promise; `from` is a valid slice.
    unsafe { copy_bytes(from.as_ptr(), to, from.len()) }
}

/// # Safety
/// `to..to + len` is mapped, writable shared memory.
#[cfg(target_arch = "x86_64")]
unsafe fn fill_shared(to: *mut u8, byte: u8, len: usize) {
    // SAFETY: the caller's promise. The direction flag is clear on entry to any Rust code.
    unsafe {
        core::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            in("al") byte,
            options(nostack, preserves_flags)
        );
    }
}

/// # Safety
/// `to..to + len` is mapped, writable shared memory.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn fill_shared(to: *mut u8, byte: u8, len: usize) {
    use core::sync::atomic::AtomicU8;

    for i in 0..len {
        // SAFETY: `i < len`, inside the range by the caller's promise.
        unsafe { AtomicU8::from_ptr(to.add(i)).store(byte, Ordering::Relaxed) };
    }
}

/// # Safety
/// Both ranges are mapped for `len` bytes and do not overlap.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise. The direction flag is clear on entry to any Rust code.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// # Safety
/// Both ranges are mapped for `len` bytes and do not overlap.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    use core::sync::atomic::AtomicU8;

    for i in 0..len {
        // SAFETY: `i < len`, inside both ranges by the caller's promise.
        unsafe {
            let byte = AtomicU8::from_ptr(from.cast_mut().add(i)).load(Ordering::Relaxed);
            AtomicU8::from_ptr(to.add(i)).store(byte, Ordering::Relaxed);
        }
    }
}
