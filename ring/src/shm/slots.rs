//! A ring's memory. Geometry, address and permission are checked once, when the ring is made, so
//! that each item needs only index masking and copies of words.

use super::words::{load_words, move_words, store_words};
use super::{NonNull, Ordering, RawRange, Region, SharedMemory, full_fence};
use crate::layout::{HEADER, RingFault, RingLayout};
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::sync::atomic::AtomicU32;

/// One of the four index words at the start of a ring; the value is its offset in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum IndexWord {
    ReqProd = 0,
    ReqEvent = 4,
    RspProd = 8,
    RspEvent = 12,
}

/// Shared memory that holds a ring of a known geometry.
#[derive(Debug)]
pub(crate) struct RingMemory<M> {
    mem: M,
    /// `mem.base()`, which the trait promises stays the same.
    base: NonNull<u8>,
    /// The first slot.
    slots: NonNull<u8>,
    /// Mask that converts an index into a slot number.
    mask: u32,
    slot_size: usize,
    layout: RingLayout,
}

// SAFETY: `base` points into memory that `mem` owns or keeps mapped and is used only through
// atomics, so it may be sent wherever `mem` may.
unsafe impl<M: Send> Send for RingMemory<M> {}
// SAFETY: as above.
unsafe impl<M: Sync> Sync for RingMemory<M> {}

impl<M: SharedMemory> RingMemory<M> {
    /// Checks that `mem` can hold a ring with slots of `slot_size` bytes and that it is writable.
    pub(crate) fn new(mem: M, slot_size: usize) -> Result<Self, RingFault> {
        let bytes = mem.len();
        let fault = RingFault::Geometry { bytes, slot_size };
        let layout = RingLayout::new(bytes, slot_size).ok_or(fault)?;
        // All accesses below rely on this check. (`RingLayout` rounds down, so the ring always
        // fits.)
        if !mem.writable() || layout.end() > bytes {
            return Err(fault);
        }
        let base = mem.base();
        // SAFETY: a ring's header is smaller than a page, and there is a page or more.
        let slots = unsafe { base.add(HEADER) };
        let mask = layout.slots().wrapping_sub(1);
        Ok(Self { mem, base, slots, mask, slot_size: layout.slot_size(), layout })
    }

    #[inline]
    pub(crate) fn layout(&self) -> RingLayout {
        self.layout
    }

    pub(crate) fn memory(&self) -> &M {
        &self.mem
    }

    #[inline(always)]
    pub(crate) fn load_index(&self, word: IndexWord, order: Ordering) -> u32 {
        self.mem.before_load();
        #[cfg(all(loom, feature = "alloc"))]
        if let Some(model) = self.mem.model() {
            return model.load(word, order);
        }
        // SAFETY: the header is inside the memory and the word aligned; see `index_word`.
        unsafe { AtomicU32::from_ptr(self.index_word(word)) }.load(order)
    }

    #[inline(always)]
    pub(crate) fn store_index(&self, word: IndexWord, value: u32, order: Ordering) {
        self.mem.before_store();
        #[cfg(all(loom, feature = "alloc"))]
        if let Some(model) = self.mem.model() {
            return model.store(word, value, order);
        }
        // SAFETY: as for `load_index`, and `new` checked that writing is allowed.
        unsafe { AtomicU32::from_ptr(self.index_word(word)) }.store(value, order);
    }

    /// Orders every earlier store before every later load (see [`full_fence`]).
    #[inline(always)]
    pub(crate) fn fence(&self) {
        #[cfg(all(loom, feature = "alloc"))]
        if let Some(model) = self.mem.model() {
            return model.fence();
        }
        full_fence();
    }

    /// Returns the slot of a free-running index, for reading.
    #[inline(always)]
    pub(crate) fn slot(&self, index: u32) -> SlotBytes<'_> {
        self.mem.before_load();
        SlotBytes { at: self.slot_base(index), left: self.slot_size, memory: PhantomData }
    }

    /// Returns the slot of a free-running index, for writing.
    #[inline(always)]
    pub(crate) fn slot_mut(&self, index: u32) -> SlotRoom<'_> {
        self.mem.before_store();
        SlotRoom { at: self.slot_base(index), left: self.slot_size, memory: PhantomData }
    }

    /// Returns an aligned pointer to a word inside the memory.
    #[inline(always)]
    fn index_word(&self, word: IndexWord) -> *mut u32 {
        // SAFETY: at most 12, and a ring is a page or more; `base` is aligned to 8.
        unsafe { self.base.add(word as usize) }.as_ptr().cast()
    }

    /// Returns the first byte of a slot: `slot_size` bytes from it are inside the memory.
    #[inline(always)]
    fn slot_base(&self, index: u32) -> NonNull<u8> {
        let number = (index & self.mask) as usize;
        // SAFETY: `number` is below the number of slots, and `new` checked that the last of them
        // ends inside the memory; so the product does not overflow either.
        unsafe { self.slots.add(number.wrapping_mul(self.slot_size)) }
    }
}

/// The unread rest of one slot: a cursor, so that no byte is read twice.
#[derive(Debug)]
pub(crate) struct SlotBytes<'a> {
    /// `left` bytes from here are inside the ring.
    at: NonNull<u8>,
    left: usize,
    memory: PhantomData<&'a ()>,
}

impl<'a> SlotBytes<'a> {
    /// Returns a range of any shared memory, which the borrow keeps alive.
    #[inline(always)]
    pub(super) fn of(mem: &'a impl SharedMemory, offset: usize, len: usize) -> Option<Self> {
        let range = mem.range(offset, len)?;
        Some(Self { at: range.addr, left: range.len, memory: PhantomData })
    }

    /// Copies the unread rest to a writable range of the same length.
    #[inline(always)]
    pub(super) fn move_to(&mut self, to: RawRange) {
        debug_assert_eq!(self.left, to.len);
        let len = self.left.min(to.len);
        if let Some(from) = self.advance(len) {
            // SAFETY: `advance` returned as many readable bytes, and `to` has as many writable
            // bytes; it came from memory that the caller borrows.
            unsafe { move_words(from, to.as_ptr(), len) };
        }
    }

    #[inline(always)]
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Fills `out` from the cursor, or reads nothing if fewer bytes are left.
    #[inline(always)]
    pub(crate) fn fill<T: PlainWord>(&mut self, out: &mut [T]) -> Option<()> {
        let from = self.advance(size_of_val(out))?;
        // SAFETY: `advance` returned as many readable bytes; `out` is borrowed exclusively, and any
        // bytes make a `PlainWord`.
        unsafe { load_words(from, out.as_mut_ptr().cast(), size_of_val(out)) };
        Some(())
    }

    /// Takes an array of words or bytes from the cursor, or nothing if fewer bytes are left.
    #[inline(always)]
    pub(crate) fn take<T: PlainWord, const N: usize>(&mut self) -> Option<[T; N]> {
        let mut out = MaybeUninit::<[T; N]>::uninit();
        let from = self.advance(size_of::<[T; N]>())?;
        // SAFETY: `advance` returned as many readable bytes, all of `out` is written, and any bytes
        // make a `PlainWord`.
        unsafe {
            load_words(from, out.as_mut_ptr().cast(), size_of::<[T; N]>());
            Some(out.assume_init())
        }
    }

    /// Moves the cursor and returns its previous position: `len` readable bytes.
    #[inline(always)]
    fn advance(&mut self, len: usize) -> Option<*const u8> {
        self.left = self.left.checked_sub(len)?;
        let at = self.at;
        // SAFETY: `len` bytes were left, so the new cursor is at most one past the slot.
        self.at = unsafe { at.add(len) };
        Some(at.as_ptr())
    }
}

/// The unwritten rest of one slot: a cursor, so that no byte is written twice.
#[derive(Debug)]
pub(crate) struct SlotRoom<'a> {
    at: NonNull<u8>,
    left: usize,
    memory: PhantomData<&'a ()>,
}

impl SlotRoom<'_> {
    #[inline(always)]
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Writes `from` at the cursor, or nothing if there is less room.
    #[inline(always)]
    pub(crate) fn write(&mut self, from: &[u8]) -> Option<()> {
        self.left = self.left.checked_sub(from.len())?;
        // SAFETY: `from.len()` bytes were left, so they are inside the slot, which `RingMemory`
        // checked to be writable; the new cursor is at most one past it.
        unsafe {
            store_words(from.as_ptr(), self.at.as_ptr(), from.len());
            self.at = self.at.add(from.len());
        }
        Some(())
    }
}

/// Plain numbers: every bit pattern is a value.
///
/// # Safety
/// Every pattern of `size_of::<Self>()` bytes is a value.
pub(crate) unsafe trait PlainWord: Copy {}
// SAFETY: every byte is a number.
unsafe impl PlainWord for u8 {}
// SAFETY: every eight bytes are a number.
unsafe impl PlainWord for u64 {}
