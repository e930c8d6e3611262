//! Copies a few words between shared and private memory, and between two shared memories.
//!
//! At most one slot is copied at a time, so the common lengths must compile to few straight-line
//! loads and stores; lengths are constants at nearly every call. The number of stores matters most:
//! each occupies an entry of the processor's store queue until its cache line has arrived from the
//! peer's core.
//!
//! Each byte is read or written exactly once. On x86-64 that is inline assembly, for the reason
//! given for bulk data in the parent module; elsewhere it is relaxed atomics.

#![expect(clippy::arithmetic_side_effects, reason = "offsets below the length of one slice")]

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
pub(super) use portable::{load_words, move_words, store_words};
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
pub(super) use x86_64::{load_words, move_words, store_words};

#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
mod x86_64 {
    use core::arch::asm;
    use core::arch::x86_64::__m128i;

    /// Copies `len` bytes out of shared memory.
    ///
    /// # Safety
    /// `len` bytes are readable shared memory from `from` on and writable private memory from `to`
    /// on.
    #[inline(always)]
    pub(in super::super) unsafe fn load_words(from: *const u8, to: *mut u8, len: usize) {
        let mut done = 0;
        // SAFETY: every step moves bytes `done..done + step`, and `done + step <= len`.
        unsafe {
            if len == 12 {
                return load_12(from, to);
            }
            while len - done >= 64 {
                load_64(from.add(done), to.add(done));
                done += 64;
            }
            if len & 32 != 0 {
                load_32(from.add(done), to.add(done));
                done += 32;
            }
            if len & 24 == 24 {
                load_24(from.add(done), to.add(done));
                done += 24;
            } else if len & 16 != 0 {
                load_16(from.add(done), to.add(done));
                done += 16;
            } else if len & 8 != 0 {
                load_8(from.add(done), to.add(done));
                done += 8;
            }
            if len & 4 != 0 {
                load_4(from.add(done), to.add(done));
                done += 4;
            }
            while done < len {
                load_1(from.add(done), to.add(done));
                done += 1;
            }
        }
    }

    /// Copies `len` bytes into shared memory; the inverse of [`load_words`].
    ///
    /// # Safety
    /// `len` bytes are readable private memory from `from` on and writable shared memory from `to`
    /// on.
    #[inline(always)]
    pub(in super::super) unsafe fn store_words(from: *const u8, to: *mut u8, len: usize) {
        let mut done = 0;
        // SAFETY: every step moves bytes `done..done + step`, and `done + step <= len`.
        unsafe {
            if len == 12 {
                return store_12(from, to);
            }
            while len - done >= 64 {
                store_64(from.add(done), to.add(done));
                done += 64;
            }
            if len & 32 != 0 {
                store_32(from.add(done), to.add(done));
                done += 32;
            }
            if len & 24 == 24 {
                store_24(from.add(done), to.add(done));
                done += 24;
            } else if len & 16 != 0 {
                store_16(from.add(done), to.add(done));
                done += 16;
            } else if len & 8 != 0 {
                store_8(from.add(done), to.add(done));
                done += 8;
            }
            if len & 4 != 0 {
                store_4(from.add(done), to.add(done));
                done += 4;
            }
            while done < len {
                store_1(from.add(done), to.add(done));
                done += 1;
            }
        }
    }

    /// Copies `len` bytes from shared memory to other shared memory, both accessed as by
    /// [`load_words`] and [`store_words`].
    ///
    /// # Safety
    /// `len` bytes are readable shared memory from `from` on and writable shared memory from `to`
    /// on.
    #[inline(always)]
    pub(in super::super) unsafe fn move_words(from: *const u8, to: *mut u8, len: usize) {
        let mut done = 0;
        // SAFETY: every step moves bytes `done..done + step`, and `done + step <= len`.
        unsafe {
            while len - done >= 64 {
                move_64(from.add(done), to.add(done));
                done += 64;
            }
            if len & 32 != 0 {
                move_32(from.add(done), to.add(done));
                done += 32;
            }
            if len & 16 != 0 {
                move_16(from.add(done), to.add(done));
                done += 16;
            }
            if len & 8 != 0 {
                move_8(from.add(done), to.add(done));
                done += 8;
            }
            if len & 4 != 0 {
                move_4(from.add(done), to.add(done));
                done += 4;
            }
            while done < len {
                move_1(from.add(done), to.add(done));
                done += 1;
            }
        }
    }

    /// Copies of words of one kind at constant offsets: the functions' names, the word, its
    /// register class, the modifier of its register, the instruction, and a name and offset for
    /// each word.
    macro_rules! moves {
        ($load:ident, $store:ident, $move:ident, $word:ty, $class:ident, $register:literal, $mov:literal,
            $($name:ident $at:literal),+) => {
            /// # Safety
            /// As for [`load_words`], with the length in the name.
            #[inline(always)]
            unsafe fn $load(from: *const u8, to: *mut u8) {
                $(let $name: $word;)+
                // SAFETY: the caller's promise; these loads need no alignment.
                unsafe {
                    asm!(
                        $(concat!($mov, " {", stringify!($name), $register, "}, [{from} + ", $at, "]"),)+
                        from = in(reg) from,
                        $($name = out($class) $name,)+
                        options(nostack, preserves_flags, readonly)
                    );
                    $(to.add($at).cast::<$word>().write_unaligned($name);)+
                }
            }

            /// # Safety
            /// As for [`move_words`], with the length in the name.
            #[allow(dead_code, reason = "not of every length")]
            #[inline(always)]
            unsafe fn $move(from: *const u8, to: *mut u8) {
                $(let $name: $word;)+
                // SAFETY: the caller's promise; these accesses need no alignment.
                unsafe {
                    asm!(
                        $(concat!($mov, " {", stringify!($name), $register, "}, [{from} + ", $at, "]"),)+
                        from = in(reg) from,
                        $($name = out($class) $name,)+
                        options(nostack, preserves_flags, readonly)
                    );
                    asm!(
                        $(concat!($mov, " [{to} + ", $at, "], {", stringify!($name), $register, "}"),)+
                        to = in(reg) to,
                        $($name = in($class) $name,)+
                        options(nostack, preserves_flags)
                    );
                }
            }

            /// # Safety
            /// As for [`store_words`], with the length in the name.
            #[inline(always)]
            unsafe fn $store(from: *const u8, to: *mut u8) {
                // SAFETY: the caller's promise; these stores need no alignment.
                unsafe {
                    $(let $name = from.add($at).cast::<$word>().read_unaligned();)+
                    asm!(
                        $(concat!($mov, " [{to} + ", $at, "], {", stringify!($name), $register, "}"),)+
                        to = in(reg) to,
                        $($name = in($class) $name,)+
                        options(nostack, preserves_flags)
                    );
                }
            }
        };
    }

    moves!(load_64, store_64, move_64, __m128i, xmm_reg, "", "movups", a 0, b 16, c 32, d 48);
    moves!(load_32, store_32, move_32, __m128i, xmm_reg, "", "movups", a 0, b 16);
    moves!(load_24, store_24, move_24, u64, reg, ":r", "mov", a 0, b 8, c 16);
    moves!(load_16, store_16, move_16, u64, reg, ":r", "mov", a 0, b 8);
    // A netif request. Its slots are aligned to 4 bytes, so wider words would sometimes cross a
    // cache line.
    moves!(load_12, store_12, move_12, u32, reg, ":e", "mov", a 0, b 4, c 8);
    moves!(load_8, store_8, move_8, u64, reg, ":r", "mov", a 0);
    moves!(load_4, store_4, move_4, u32, reg, ":e", "mov", a 0);
    moves!(load_1, store_1, move_1, u8, reg_byte, "", "mov", a 0);
}

#[cfg_attr(all(target_arch = "x86_64", target_feature = "sse2"), cfg(test))]
mod portable {
    use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

    /// Copies `len` bytes out of shared memory, in words as wide as alignment and length allow.
    ///
    /// # Safety
    /// `len` bytes are readable shared memory from `from` on and writable private memory from `to`
    /// on.
    #[inline(always)]
    pub(in super::super) unsafe fn load_words(from: *const u8, to: *mut u8, len: usize) {
        let (from, mut done) = (from.cast_mut(), 0);
        // SAFETY: every step moves bytes `done..done + step`, and `done + step <= len`; an atomic
        // is made only of an aligned address.
        unsafe {
            while len - done >= 8 && from.add(done).addr().is_multiple_of(8) {
                let word = AtomicU64::from_ptr(from.add(done).cast()).load(Relaxed);
                to.add(done).cast::<u64>().write_unaligned(word);
                done += 8;
            }
            while len - done >= 4 && from.add(done).addr().is_multiple_of(4) {
                let word = AtomicU32::from_ptr(from.add(done).cast()).load(Relaxed);
                to.add(done).cast::<u32>().write_unaligned(word);
                done += 4;
            }
            while done < len {
                to.add(done).write(AtomicU8::from_ptr(from.add(done)).load(Relaxed));
                done += 1;
            }
        }
    }

    /// Copies `len` bytes into shared memory; the inverse of [`load_words`].
    ///
    /// # Safety
    /// `len` bytes are readable private memory from `from` on and writable shared memory from `to`
    /// on.
    #[inline(always)]
    pub(in super::super) unsafe fn store_words(from: *const u8, to: *mut u8, len: usize) {
        let mut done = 0;
        // SAFETY: as above.
        unsafe {
            while len - done >= 8 && to.add(done).addr().is_multiple_of(8) {
                let word = from.add(done).cast::<u64>().read_unaligned();
                AtomicU64::from_ptr(to.add(done).cast()).store(word, Relaxed);
                done += 8;
            }
            while len - done >= 4 && to.add(done).addr().is_multiple_of(4) {
                let word = from.add(done).cast::<u32>().read_unaligned();
                AtomicU32::from_ptr(to.add(done).cast()).store(word, Relaxed);
                done += 4;
            }
            while done < len {
                AtomicU8::from_ptr(to.add(done)).store(from.add(done).read(), Relaxed);
                done += 1;
            }
        }
    }

    /// Copies `len` bytes from shared memory to other shared memory.
    ///
    /// # Safety
    /// `len` bytes are readable shared memory from `from` on and writable shared memory from `to`
    /// on.
    #[inline(always)]
    pub(in super::super) unsafe fn move_words(from: *const u8, to: *mut u8, len: usize) {
        let (from, mut done) = (from.cast_mut(), 0);
        let aligned = |at: *mut u8, to: *mut u8, size| (at.addr() | to.addr()).is_multiple_of(size);
        // SAFETY: as above.
        unsafe {
            while len - done >= 8 && aligned(from.add(done), to.add(done), 8) {
                let word = AtomicU64::from_ptr(from.add(done).cast()).load(Relaxed);
                AtomicU64::from_ptr(to.add(done).cast()).store(word, Relaxed);
                done += 8;
            }
            while len - done >= 4 && aligned(from.add(done), to.add(done), 4) {
                let word = AtomicU32::from_ptr(from.add(done).cast()).load(Relaxed);
                AtomicU32::from_ptr(to.add(done).cast()).store(word, Relaxed);
                done += 4;
            }
            while done < len {
                let byte = AtomicU8::from_ptr(from.add(done)).load(Relaxed);
                AtomicU8::from_ptr(to.add(done)).store(byte, Relaxed);
                done += 1;
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::{load_words, move_words, portable, store_words};

    /// Every length and alignment, both implementations: exactly the requested bytes are copied.
    #[test]
    fn word_copies_move_exactly_requested_bytes() {
        let source: [u8; 160] = core::array::from_fn(|i| i as u8 ^ 0x5a);
        type Copy = unsafe fn(*const u8, *mut u8, usize);
        let own = [load_words as Copy, store_words, move_words];
        let portable = [portable::load_words as Copy, portable::store_words, portable::move_words];
        for copy in own.into_iter().chain(portable) {
            for offset in 0..16 {
                for len in 0..=source.len() - 16 {
                    let mut out = [0xee; 192];
                    // SAFETY: both ranges are inside their arrays.
                    unsafe {
                        copy(source.as_ptr().add(offset), out.as_mut_ptr().add(8), len);
                    }
                    assert_eq!(out[8..8 + len], source[offset..offset + len]);
                    let rest = [&out[..8], &out[8 + len..]].concat();
                    assert!(rest.iter().all(|b| *b == 0xee), "{len} bytes from {offset}");
                    // The inverse, for the alignment of the destination.
                    let mut out = [0xee; 192];
                    // SAFETY: as above.
                    unsafe { copy(source.as_ptr(), out.as_mut_ptr().add(offset), len) };
                    assert_eq!(out[offset..offset + len], source[..len]);
                    assert!(out[offset + len..].iter().all(|b| *b == 0xee), "{len} to {offset}");
                }
            }
        }
    }
}
