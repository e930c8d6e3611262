//! Pages of our own, to copy a peer's data into and hand to the kernel.

use super::{PAGE_SIZE, SharedMemory};
use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use alloc::sync::Arc;
use core::ptr::NonNull;

/// A page that no peer can reach: page-aligned, zeroed when made, in private memory that is freed
/// with the last page of its [`pool`](Self::pool). There is one value for each page and it is not
/// `Clone`, so whoever has the value (an I/O operation, say) has the page to itself.
///
/// It stands in for a peer's page wherever [`SharedMemory`] does, and can besides lend its bytes:
/// see [`bytes`](Self::bytes).
#[derive(Debug)]
pub struct PrivatePage {
    base: NonNull<u8>,
    number: u32,
    /// Keeps the page allocated.
    slab: Arc<Slab>,
}

/// Where some pages of a [pool](PrivatePage::pool) are. It keeps them allocated and gives no access
/// to them: for whoever tells the kernel of memory before there is an operation on it.
#[derive(Clone, Debug)]
pub struct PoolMemory {
    base: NonNull<u8>,
    len: usize,
    /// Keeps the pages allocated.
    _slab: Arc<Slab>,
}

/// Where the pages of one pool are.
#[derive(Debug)]
struct Slab {
    allocated: NonNull<u8>,
    layout: Layout,
    /// How many pages there are.
    pages: usize,
}

// SAFETY: plain memory, never reached through the slab itself.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}
// SAFETY: a page is reached through the one value that owns it, with `&self` only by atomics and
// opaque copies.
unsafe impl Send for PrivatePage {}
// SAFETY: as above.
unsafe impl Sync for PrivatePage {}
// SAFETY: an address and a length; the memory is not reached through it.
unsafe impl Send for PoolMemory {}
// SAFETY: as above.
unsafe impl Sync for PoolMemory {}

impl PrivatePage {
    /// `count` zeroed pages, one behind the other in memory and numbered from 0. A large pool takes
    /// memory from the system only as its pages are first used.
    ///
    /// # Panics
    /// When `count` pages are more bytes than there are addresses.
    pub fn pool(count: usize) -> impl ExactSizeIterator<Item = Self> {
        let bytes = count.checked_add(1).and_then(|pages| pages.checked_mul(PAGE_SIZE));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 16).ok());
        let layout = layout.expect("size overflows");
        // Not allocated at the alignment of a page: allocators zero that by hand, all of it, while
        // memory of the ordinary alignment comes zeroed from the system. One page more makes room.
        // SAFETY: the layout's size is not zero.
        let Some(allocated) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        let slab = Arc::new(Slab { allocated, layout, pages: count });
        let gap = allocated.as_ptr().align_offset(PAGE_SIZE);
        (0..u32::try_from(count).expect("size overflows")).map(move |number| {
            let at = (number as usize).wrapping_mul(PAGE_SIZE).wrapping_add(gap);
            // SAFETY: `gap` is less than a page and `number` less than `count`, so the page lies
            // inside the `count + 1` pages allocated. Each number is used once: no two values have
            // a byte in common.
            let base = unsafe { allocated.add(at) };
            Self { base, number, slab: Arc::clone(&slab) }
        })
    }

    /// Which page of its pool it is.
    #[inline]
    #[must_use]
    pub fn number(&self) -> usize {
        self.number as usize
    }

    /// Where this page and those that follow it are, `count` in all; `None` if the pool has not so
    /// many.
    #[must_use]
    pub fn stretch(&self, count: usize) -> Option<PoolMemory> {
        let fits = self.number().checked_add(count).is_some_and(|end| end <= self.slab.pages);
        // Inside the allocation, so it does not overflow.
        let len = count.wrapping_mul(PAGE_SIZE);
        fits.then(|| PoolMemory { base: self.base, len, _slab: Arc::clone(&self.slab) })
    }

    /// The page's bytes, lent exclusively: also to read them, since whoever shares the value can
    /// write to them.
    #[inline]
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the page is initialised, inside the slab this keeps alive, and this value's alone
        // (see `pool`). All access is through this value: for the length of the borrow by the slice
        // only. The kernel may be given its address only by who owns the value ([`RawRange`]), and
        // does not lend it meanwhile.
        //
        // [`RawRange`]: super::RawRange
        unsafe { core::slice::from_raw_parts_mut(self.base.as_ptr(), PAGE_SIZE) }
    }
}

impl PoolMemory {
    /// The first byte's address: a number, not a permission.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated in `pool` with this very layout, freed once, when no page is left.
        unsafe { dealloc(self.allocated.as_ptr(), self.layout) }
    }
}

// SAFETY: the page is allocated until the slab is dropped, which this value keeps, and never moves;
// the only reference to it is borrowed exclusively from this value (`bytes`).
unsafe impl SharedMemory for PrivatePage {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    fn len(&self) -> usize {
        PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::Region;
    use alloc::vec::Vec;

    #[test]
    fn pages_are_aligned_zeroed_and_do_not_overlap() {
        let mut pages: Vec<PrivatePage> = PrivatePage::pool(5).collect();
        for (n, page) in pages.iter_mut().enumerate() {
            assert_eq!(page.number(), n);
            assert!(page.base().as_ptr().addr().is_multiple_of(PAGE_SIZE));
            assert!(page.bytes().iter().all(|b| *b == 0));
            page.bytes().fill(n as u8 + 1);
        }
        let last = pages.pop().unwrap();
        drop(pages);
        let mut seen = [0; PAGE_SIZE];
        last.read_bytes(0, &mut seen).unwrap();
        assert_eq!(seen, [5; PAGE_SIZE], "the others left it alone, and it outlives them");
    }

    #[test]
    fn a_stretch_is_of_pages_that_there_are() {
        let pages: Vec<PrivatePage> = PrivatePage::pool(5).collect();
        let [_, second, .., last] = pages.as_slice() else { panic!("five") };
        let stretch = second.stretch(4).unwrap();
        assert_eq!((stretch.base(), stretch.len()), (second.base().as_ptr(), 4 * PAGE_SIZE));
        assert!(second.stretch(5).is_none() && second.stretch(usize::MAX).is_none());
        assert!(last.stretch(1).is_some() && last.stretch(0).unwrap().is_empty());
    }

    #[test]
    fn what_is_copied_in_is_what_is_lent() {
        let mut page = PrivatePage::pool(1).next().unwrap();
        page.write_bytes(4000, &[7; 96]).unwrap();
        assert_eq!(page.bytes().get(4000..), Some(&[7; 96][..]));
        assert!(page.write_bytes(4001, &[7; 96]).is_none());
    }
}
