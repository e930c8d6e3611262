//! Moving a few words between shared and private memory.
//!
//! Of one slot no more than the whole is ever moved, so what counts is that the common lengths come
//! out as few straight loads and stores; lengths are constants at nearly every call. How many
//! stores matters most: each holds a place in the processor's store queue until its cache line has
//! come over from the peer's core.
//!
//! Each byte is read or written exactly once. On x86-64 that is inline assembly, for the reason
//! given for bulk data in the parent module; elsewhere it is relaxed atomics.

#![expect(clippy::arithmetic_side_effects, reason = "offsets below the length of one slice")]

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
pub(super) use portable::{load_words, store_words};
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
pub(super) use x86_64::{load_words, store_words};

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

    /// Copies `len` bytes into shared memory; the mirror of [`load_words`].
    ///
    /// # Safety
    /// `len` bytes are readable private memory from `from` on and writable shared memory from `to`
    /// on.
    #[inline(always)]
    pub(in super::super) unsafe fn store_words(from: *const u8, to: *mut u8, len: usize) {
        let mut done = 0;
        // SAFETY: every step moves bytes `done..done + step`, and `done + step <= len`.
        unsafe {
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

    /// Several words of one kind at constant offsets from one address.
    macro_rules! moves {
        ($load:ident, $store:ident, $word:ty, $class:ident, $mov:literal, $($name:ident $at:literal),+) => {
            /// # Safety
            /// As for [`load_words`], with the length in the name.
            #[inline(always)]
            unsafe fn $load(from: *const u8, to: *mut u8) {
                $(let $name: $word;)+
                // SAFETY: the caller's promise; these loads need no alignment.
                unsafe {
                    asm!(
                        $(concat!($mov, " {", stringify!($name), "}, [{from} + ", $at, "]"),)+
                        from = in(reg) from,
                        $($name = out($class) $name,)+
                        options(nostack, preserves_flags, readonly)
                    );
                    $(to.add($at).cast::<$word>().write_unaligned($name);)+
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
                        $(concat!($mov, " [{to} + ", $at, "], {", stringify!($name), "}"),)+
                        to = in(reg) to,
                        $($name = in($class) $name,)+
                        options(nostack, preserves_flags)
                    );
                }
            }
        };
    }

    moves!(load_64, store_64, __m128i, xmm_reg, "movups", a 0, b 16, c 32, d 48);
    moves!(load_32, store_32, __m128i, xmm_reg, "movups", a 0, b 16);
    moves!(load_24, store_24, u64, reg, "mov", a 0, b 8, c 16);
    moves!(load_16, store_16, u64, reg, "mov", a 0, b 8);
    moves!(load_8, store_8, u64, reg, "mov", a 0);

    /// Narrow words, whose register has to be named by its width.
    macro_rules! narrow {
        ($load:ident, $store:ident, $word:ty, $class:ident, $modifier:literal, $size:literal) => {
            /// # Safety
            /// As for [`load_words`], with the length in the name.
            #[inline(always)]
            unsafe fn $load(from: *const u8, to: *mut u8) {
                let word: $word;
                // SAFETY: the caller's promise; the load needs no alignment.
                unsafe {
                    asm!(
                        concat!("mov {word", $modifier, "}, ", $size, " ptr [{from}]"),
                        from = in(reg) from,
                        word = out($class) word,
                        options(nostack, preserves_flags, readonly)
                    );
                    to.cast::<$word>().write_unaligned(word);
                }
            }

            /// # Safety
            /// As for [`store_words`], with the length in the name.
            #[inline(always)]
            unsafe fn $store(from: *const u8, to: *mut u8) {
                // SAFETY: the caller's promise; the store needs no alignment.
                unsafe {
                    let word = from.cast::<$word>().read_unaligned();
                    asm!(
                        concat!("mov ", $size, " ptr [{to}], {word", $modifier, "}"),
                        to = in(reg) to,
                        word = in($class) word,
                        options(nostack, preserves_flags)
                    );
                }
            }
        };
    }

    narrow!(load_4, store_4, u32, reg, ":e", "dword");
    narrow!(load_1, store_1, u8, reg_byte, "", "byte");
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

    /// Copies `len` bytes into shared memory; the mirror of [`load_words`].
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
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::{load_words, portable, store_words};

    /// Every length and alignment, both implementations: exactly the bytes asked for move.
    #[test]
    fn exactly_the_bytes_asked_for_move() {
        let source: [u8; 160] = core::array::from_fn(|i| i as u8 ^ 0x5a);
        type Copy = unsafe fn(*const u8, *mut u8, usize);
        for copy in [load_words as Copy, store_words, portable::load_words, portable::store_words] {
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
                    // And the other way round, for the alignment of what is written.
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
