//! Memory of one process in the role of shared memory.

use super::{PAGE_SIZE, SharedMemory};
use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use alloc::sync::Arc;
use core::ptr::NonNull;

/// Zeroed, page-aligned pages shared by the clones of one value: the shared memory of two domains
/// inside one process. For tests, benchmarks, the simulator, and buffers that the kernel fills.
#[derive(Clone, Debug)]
pub struct HeapMemory(Arc<Pages>);

#[derive(Debug)]
struct Pages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the pages are plain memory accessed only through atomics and opaque copies.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl HeapMemory {
    /// Allocates `count` zeroed pages of [`PAGE_SIZE`] bytes.
    ///
    /// # Panics
    /// If `count` is 0 or the size overflows.
    #[must_use]
    pub fn pages(count: usize) -> Self {
        assert!(count > 0, "shared memory of no pages");
        let bytes = count.checked_mul(PAGE_SIZE).expect("size overflows");
        let layout = Layout::from_size_align(bytes, PAGE_SIZE).expect("size overflows");
        // SAFETY: the layout's size is not zero.
        let Some(base) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        Self(Arc::new(Pages { base, layout }))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `pages` with this layout, freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

// SAFETY: the allocation lives until the last clone is dropped and never moves; no reference to
// its bytes is ever made.
unsafe impl SharedMemory for HeapMemory {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        self.0.base
    }

    #[inline]
    fn len(&self) -> usize {
        self.0.layout.size()
    }
}

// SAFETY: the shared value keeps its promise for as long as any clone exists.
unsafe impl<M: SharedMemory + ?Sized> SharedMemory for Arc<M> {
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
