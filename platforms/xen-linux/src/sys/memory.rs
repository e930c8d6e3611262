//! Address ranges of this process that other domains may access too.
//!
//! `memmap2` does not fit here: grants are mapped at offsets of a device whose pages exist only
//! while they are mapped, into reserved addresses (`MAP_FIXED`), and pages of a mapping are
//! replaced while others of it are in use.

use core::ffi::c_void;
use core::fmt;
use core::ptr::{NonNull, null_mut};
use pvio_ring::shm::SharedMemory;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Source of the pages of a range.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Zeroed private pages.
    Zeroes,
    /// The pages at an offset of a device.
    Device(&'a OwnedFd, u64),
}

/// Range of addresses, owned until dropped.
#[derive(Debug)]
pub(crate) struct Area {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the memory is accessed only through atomics and opaque copies, from any thread; its
// addresses change only in `drop`, which has exclusive access.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `source` at any free address.
    pub(crate) fn map(len: usize, source: Source<'_>, writable: bool) -> Result<Self, Errno> {
        // SAFETY: no address is requested, so no existing mapping is replaced.
        let base = unsafe { place(null_mut(), len, source, writable, MapFlags::empty()) }?;
        Ok(Self { base, len, writable })
    }

    /// Reserves addresses without memory, to be filled by [`fill`](Self::fill) before they are
    /// used.
    pub(crate) fn reserve(len: usize, writable: bool) -> Result<Reserved, Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is requested, so no existing mapping is replaced.
        let base = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), flags) }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Reserved { area: Self { base, len, writable }, filled: 0 })
    }

    /// Replaces `old` by `new` atomically with respect to accesses. `at` and `len` are whole pages
    /// inside the range; the contents are not copied.
    ///
    /// # Errors
    /// A system error; `old` is mapped again then. If that fails too, the process aborts, because
    /// the addresses were promised to stay valid.
    pub(crate) fn replace(
        &self,
        at: usize,
        len: usize,
        new: Source<'_>,
        old: Source<'_>,
    ) -> Result<(), Errno> {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "outside the area");
        // SAFETY: inside, by the check above.
        let addr = unsafe { self.base.add(at) }.as_ptr().cast();
        let put = |source| {
            // SAFETY: only a range of this area is replaced. Concurrent users access it through
            // atomics, opaque copies or the kernel, for which it is memory that another party
            // changed. They never find it missing: the kernel exchanges the mappings under its
            // lock, for which a fault waits. If mapping the new one fails, which requires being out
            // of memory, the range may be empty until the old one is mapped again; a thread that
            // touches it at that time is killed by a fault and does not continue with a wrong
            // value.
            unsafe { place(addr, len, source, self.writable, MapFlags::FIXED) }
        };
        let Err(why) = put(new) else { return Ok(()) };
        if let Err(why) = put(old) {
            eprintln!("pvio: a shared page can be mapped no more ({why}): aborting");
            std::process::abort();
        }
        Err(why)
    }

    #[inline]
    fn place(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if !offset.is_multiple_of(8) || offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset <= self.len`, so the address is in or one past the range.
        Some(unsafe { self.base.add(offset) })
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: mapped by this type with this address and length, and unmapped once; everything
        // that pointed into it owned a reference to `self` and has been dropped.
        let done = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(done.is_ok(), "munmap: {done:?}");
    }
}

/// Range of addresses that is being filled from its start.
pub(crate) struct Reserved {
    area: Area,
    filled: usize,
}

impl Reserved {
    /// Maps the next `len` bytes.
    pub(crate) fn fill(&mut self, len: usize, source: Source<'_>) -> Result<(), Errno> {
        let left = self.area.len - self.filled;
        assert!(len <= left, "outside the area");
        // SAFETY: inside, by the check above.
        let at = unsafe { self.area.base.add(self.filled) }.as_ptr().cast();
        // SAFETY: this part of the range is owned by this value, without memory, and has not been
        // passed on.
        unsafe { place(at, len, source, self.area.writable, MapFlags::FIXED) }?;
        self.filled += len;
        Ok(())
    }

    /// Returns the area if it is completely filled.
    pub(crate) fn done(self) -> Option<Area> {
        (self.filled == self.area.len).then_some(self.area)
    }
}

/// # Safety
/// `at` is null, or `flags` contains `FIXED` and `at..at + len` is an owned range to replace.
unsafe fn place(
    at: *mut c_void,
    len: usize,
    source: Source<'_>,
    writable: bool,
    flags: MapFlags,
) -> Result<NonNull<u8>, Errno> {
    let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
    let map = || match source {
        Source::Zeroes => {
            // SAFETY: the caller's promise.
            unsafe { mmap_anonymous(at, len, prot, flags | MapFlags::PRIVATE) }
        }
        Source::Device(fd, offset) => {
            // SAFETY: the caller's promise.
            unsafe { mmap(at, len, prot, flags | MapFlags::SHARED, fd, offset) }
        }
    };
    // A signal may interrupt the mapping of grants.
    let base = rustix::io::retry_on_intr(map)?;
    NonNull::new(base.cast()).ok_or(Errno::NOMEM)
}

/// Range with the values that it depends on. When the last reference is dropped, the range is
/// unmapped first (fields are dropped in order), and the other values are dropped after that.
#[derive(Debug)]
pub(crate) struct Run<X> {
    area: Area,
    pub(crate) extra: X,
}

impl<X> Run<X> {
    pub(crate) fn new(area: Area, extra: X) -> Self {
        Self { area, extra }
    }

    /// Returns the range.
    pub(crate) fn area(&self) -> &Area {
        &self.area
    }
}

/// Part of memory shared with other domains, with a reference that keeps it mapped.
pub struct Held<X> {
    base: NonNull<u8>,
    len: usize,
    run: Arc<Run<X>>,
}

impl<X> Held<X> {
    /// Returns the whole range of a run.
    pub(crate) fn whole(run: Arc<Run<X>>) -> Self {
        Self { base: run.area.base, len: run.area.len, run }
    }

    /// Returns a part of a run; `None` if it is not completely inside or does not start at a
    /// multiple of 8.
    pub(crate) fn part(run: &Arc<Run<X>>, offset: usize, len: usize) -> Option<Self> {
        let base = run.area.place(offset, len)?;
        Some(Self { base, len, run: Arc::clone(run) })
    }

    /// Returns the run that keeps it mapped.
    pub(crate) fn run(&self) -> &Arc<Run<X>> {
        &self.run
    }

    /// Whether it covers its whole run.
    pub(crate) fn is_whole(&self) -> bool {
        self.len == self.run.area.len
    }
}

impl<X> fmt::Debug for Held<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("len", &self.len)
            .field("writable", &self.run.area.writable)
            .finish_non_exhaustive()
    }
}

// SAFETY: the memory is accessed only through atomics and opaque copies; the rest is the run's.
unsafe impl<X: Send + Sync> Send for Held<X> {}
// SAFETY: as above.
unsafe impl<X: Send + Sync> Sync for Held<X> {}

// SAFETY: created only by `whole` and `part`, which ensured that it lies in the area of the run
// that it has a reference to. The area stays mapped at its address, with the access that `writable`
// tells, until the last reference is dropped; `replace` changes the memory there, not whether there
// is some. Pages of other domains stay mapped when those domains die: the hypervisor keeps mapped
// pages. No reference to it is created.
unsafe impl<X> SharedMemory for Held<X> {
    #[inline]
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn writable(&self) -> bool {
        self.run.area.writable
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_ring::shm::{PAGE_SIZE, Region};

    fn file(byte: u8) -> OwnedFd {
        let fd = rustix::fs::memfd_create("page", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &[byte; PAGE_SIZE]).unwrap();
        fd
    }

    fn held(pages: usize) -> Held<()> {
        let area = Area::map(pages * PAGE_SIZE, Source::Zeroes, true).unwrap();
        Held::whole(Arc::new(Run::new(area, ())))
    }

    fn first(memory: &Held<()>, page: usize) -> u8 {
        let mut byte = [0];
        memory.read_bytes(page * PAGE_SIZE, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn page_replacement_leaves_other_pages_unchanged() {
        let (memory, fd) = (held(3), file(7));
        for page in 0..3 {
            memory.write_bytes(page * PAGE_SIZE, &[1]).unwrap();
        }
        let area = memory.run().area();
        area.replace(PAGE_SIZE, PAGE_SIZE, Source::Device(&fd, 0), Source::Zeroes).unwrap();
        assert_eq!([0, 1, 2].map(|page| first(&memory, page)), [1, 7, 1]);
        area.replace(PAGE_SIZE, PAGE_SIZE, Source::Zeroes, Source::Zeroes).unwrap();
        assert_eq!([0, 1, 2].map(|page| first(&memory, page)), [1, 0, 1]);
    }

    #[test]
    fn failed_page_replacement_leaves_page_usable() {
        let (memory, fd) = (held(1), file(7));
        // A file cannot be mapped at an offset that is not a multiple of the page size.
        let odd = Source::Device(&fd, 1);
        assert!(memory.run().area().replace(0, PAGE_SIZE, odd, Source::Zeroes).is_err());
        memory.write_bytes(0, &[3]).unwrap();
        assert_eq!(first(&memory, 0), 3);
    }

    #[test]
    fn reserved_area_is_handed_out_only_when_completely_filled() {
        let (a, b) = (file(1), file(2));
        let mut reserved = Area::reserve(2 * PAGE_SIZE, true).unwrap();
        reserved.fill(PAGE_SIZE, Source::Device(&a, 0)).unwrap();
        reserved.fill(PAGE_SIZE, Source::Device(&b, 0)).unwrap();
        let memory = Held::whole(Arc::new(Run::new(reserved.done().unwrap(), ())));
        assert_eq!([first(&memory, 0), first(&memory, 1)], [1, 2]);
        let mut half = Area::reserve(2 * PAGE_SIZE, true).unwrap();
        half.fill(PAGE_SIZE, Source::Device(&a, 0)).unwrap();
        assert!(half.done().is_none());
    }

    #[test]
    fn part_of_memory_stays_inside_and_keeps_mapping_alive() {
        let memory = held(2);
        assert!(Held::part(memory.run(), PAGE_SIZE, PAGE_SIZE + 1).is_none());
        assert!(Held::part(memory.run(), usize::MAX - 7, 8).is_none());
        let part = Held::part(memory.run(), PAGE_SIZE, PAGE_SIZE).unwrap();
        assert!(memory.is_whole() && !part.is_whole());
        drop(memory);
        part.write_bytes(0, &[9]).unwrap();
        assert_eq!(first(&part, 0), 9);
    }
}
