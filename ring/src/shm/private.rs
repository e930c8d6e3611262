//! Private pages, into which a peer's data is copied and which are passed to the kernel.

use super::{PAGE_SIZE, SharedMemory};
use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use alloc::sync::Arc;
use core::ptr::NonNull;

/// A page that no peer can access: page-aligned, zeroed when allocated, in private memory that is
/// freed with the last page of its [`pool`](Self::pool). There is one value for each page and it is
/// not `Clone`, so the owner of the value (an I/O operation, for example) has exclusive access to
/// the page.
///
/// It can be used in place of a peer's page as [`SharedMemory`], and can also lend its bytes: see
/// [`bytes`](Self::bytes).
#[derive(Debug)]
pub struct PrivatePage {
    base: NonNull<u8>,
    number: u32,
    /// Keeps the page allocated.
    slab: Arc<Slab>,
}

/// The address range of some pages of a [pool](PrivatePage::pool). It keeps them allocated and
/// gives no access to them: for code that registers memory with the kernel before there is an
/// operation on it.
#[derive(Clone, Debug)]
pub struct PoolMemory {
    base: NonNull<u8>,
    len: usize,
    /// Keeps the pages allocated.
    _slab: Arc<Slab>,
}

/// The memory of the pages of one pool.
#[derive(Debug)]
struct Slab {
    allocated: NonNull<u8>,
    layout: Layout,
    /// Number of pages.
    pages: usize,
}

// SAFETY: plain memory, never accessed through the slab itself.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}
// SAFETY: a page is accessed through the one value that owns it, with `&self` only by atomics and
// opaque copies.
unsafe impl Send for PrivatePage {}
// SAFETY: as above.
unsafe impl Sync for PrivatePage {}
// SAFETY: an address and a length; the memory is not accessed through it.
unsafe impl Send for PoolMemory {}
// SAFETY: as above.
unsafe impl Sync for PoolMemory {}

impl PrivatePage {
    /// Allocates `count` zeroed pages, contiguous in memory and numbered from 0. The system commits
    /// memory of a large pool only when its pages are first used.
    ///
    /// # Panics
    /// If the size of `count` pages overflows.
    pub fn pool(count: usize) -> impl ExactSizeIterator<Item = Self> {
        let bytes = count.checked_add(1).and_then(|pages| pages.checked_mul(PAGE_SIZE));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 16).ok());
        let layout = layout.expect("size overflows");
        // Not allocated with page alignment: allocators zero such memory explicitly, all of it,
        // while memory of the ordinary alignment comes zeroed from the system. One more page makes
        // room to align it.
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

    /// Returns the page's number in its pool.
    #[inline]
    #[must_use]
    pub fn number(&self) -> usize {
        self.number as usize
    }

    /// Returns the address range of this page and those that follow it, `count` in all; `None` if
    /// the pool does not have that many.
    #[must_use]
    pub fn stretch(&self, count: usize) -> Option<PoolMemory> {
        let fits = self.number().checked_add(count).is_some_and(|end| end <= self.slab.pages);
        // Within the allocation, so it does not overflow.
        let len = count.wrapping_mul(PAGE_SIZE);
        fits.then(|| PoolMemory { base: self.base, len, _slab: Arc::clone(&self.slab) })
    }

    /// Returns the page's bytes, borrowed exclusively: reading requires it, too, because any code
    /// that shares the value can write to them.
    #[inline]
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the page is initialised, inside the slab that this value keeps allocated, and
        // belongs to this value alone (see `pool`). All access is through this value: for the
        // length of the borrow by the slice only. Only the owner of the value may pass its address
        // to the kernel ([`RawRange`]), and the owner lends no reference until the kernel has
        // finished.
        //
        // [`RawRange`]: super::RawRange
        unsafe { core::slice::from_raw_parts_mut(self.base.as_ptr(), PAGE_SIZE) }
    }
}

impl PoolMemory {
    /// Returns the address of the first byte: a number, not a permission.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the length is 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated in `pool` with this layout, freed once, when no page is left.
        unsafe { dealloc(self.allocated.as_ptr(), self.layout) }
    }
}

// SAFETY: the page is allocated until the slab is dropped, which this value keeps alive, and never
// moves; the only reference to it is borrowed exclusively from this value (`bytes`).
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
    fn private_pages_are_aligned_zeroed_and_do_not_overlap() {
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
        assert_eq!(seen, [5; PAGE_SIZE], "page is unchanged after other pages were dropped");
    }

    #[test]
    fn stretch_beyond_pool_is_none() {
        let pages: Vec<PrivatePage> = PrivatePage::pool(5).collect();
        let [_, second, .., last] = pages.as_slice() else { panic!("five") };
        let stretch = second.stretch(4).unwrap();
        assert_eq!((stretch.base(), stretch.len()), (second.base().as_ptr(), 4 * PAGE_SIZE));
        assert!(second.stretch(5).is_none() && second.stretch(usize::MAX).is_none());
        assert!(last.stretch(1).is_some() && last.stretch(0).unwrap().is_empty());
    }

    #[test]
    fn private_page_returns_written_bytes() {
        let mut page = PrivatePage::pool(1).next().unwrap();
        page.write_bytes(4000, &[7; 96]).unwrap();
        assert_eq!(page.bytes().get(4000..), Some(&[7; 96][..]));
        assert!(page.write_bytes(4001, &[7; 96]).is_none());
    }
}
