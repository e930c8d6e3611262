//! Shared memory without a heap: pages in a static.

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};

use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "reached by address")] UnsafeCell<[u8; PAGE_SIZE]>);

// SAFETY: the bytes are reached only through `pvio_ring::shm`, which has no references to them.
unsafe impl Sync for Page {}

static PAGE: Page = Page(UnsafeCell::new([0; PAGE_SIZE]));
static TAKEN: AtomicBool = AtomicBool::new(false);

fn bytes() -> NonNull<u8> {
    NonNull::new((&raw const PAGE).cast_mut()).expect("a static's address").cast()
}

/// The one page, until dropped; both sides borrow it.
pub struct TheBss(());

/// One side's view of the page.
pub struct End<'a>(#[expect(dead_code, reason = "keeps the page taken")] &'a TheBss);

impl TheBss {
    /// Returns the page, filled with zeros, if it is not taken.
    pub fn take() -> Option<Self> {
        if TAKEN.swap(true, Ordering::Acquire) {
            return None;
        }
        // SAFETY: the page was not taken, so nothing else accesses it, and it has this length.
        unsafe { bytes().write_bytes(0, PAGE_SIZE) };
        Some(Self(()))
    }

    /// Returns a view of the page.
    pub fn end(&self) -> End<'_> {
        End(self)
    }
}

impl Drop for TheBss {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

// SAFETY: a static never moves, stays mapped and writable, is page-aligned, and no reference to its
// bytes is made while it is taken, nor otherwise.
unsafe impl SharedMemory for End<'_> {
    fn base(&self) -> NonNull<u8> {
        bytes()
    }

    fn len(&self) -> usize {
        PAGE_SIZE
    }
}
