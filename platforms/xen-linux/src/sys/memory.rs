//! Address ranges of this process that other domains may reach too.

use core::ffi::c_void;
use core::fmt;
use core::ptr::{NonNull, null_mut};
use pvio_ring::shm::SharedMemory;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What is to lie in a range.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Zeroed pages of our own.
    Zeroes,
    /// What a device has at an offset.
    Device(&'a OwnedFd, u64),
}

/// A range of addresses, ours until dropped.
#[derive(Debug)]
pub(crate) struct Area {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the memory is reached only through atomics and opaque copies, from any thread; which
// addresses they are changes only in `drop`, which has exclusive access.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `source`, wherever there is room.
    pub(crate) fn map(len: usize, source: Source<'_>, writable: bool) -> Result<Self, Errno> {
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let base = unsafe { place(null_mut(), len, source, writable, MapFlags::empty()) }?;
        Ok(Self { base, len, writable })
    }

    /// Addresses without memory, to be filled by [`fill`](Self::fill) before anybody sees them.
    pub(crate) fn reserve(len: usize, writable: bool) -> Result<Reserved, Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let base = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), flags) }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Reserved { area: Self { base, len, writable }, filled: 0 })
    }

    /// Puts `new` in the place of `old`, in one step for whoever looks. `at` and `len` are whole
    /// pages inside; the contents are not carried over.
    ///
    /// # Errors
    /// The system's; `old` is mapped again then. If not even that can be done the process aborts:
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
            // SAFETY: only our own range is replaced. Whoever uses it meanwhile does so through
            // atomics, opaque copies or the kernel, for which it is memory that somebody else
            // changed. They never find it missing: the kernel exchanges the mappings under its
            // lock, for which a fault waits. Should mapping the new one fail, which takes being out
            // of memory, the range may be empty until the old one is put back; a thread that
            // touches it just then is killed by a fault and does not go on with a wrong value.
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
        // SAFETY: mapped by us with this very address and length, unmapped once; whatever pointed
        // into it owned a share of `self` and is gone.
        let done = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(done.is_ok(), "munmap: {done:?}");
    }
}

/// Addresses that are being filled from the first on.
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
        // SAFETY: this part of the range is ours, without memory, and nobody has seen it.
        unsafe { place(at, len, source, self.area.writable, MapFlags::FIXED) }?;
        self.filled += len;
        Ok(())
    }

    /// The area, once all of it is filled.
    pub(crate) fn done(self) -> Option<Area> {
        (self.filled == self.area.len).then_some(self.area)
    }
}

/// # Safety
/// `at` is null, or `flags` say `FIXED` and `at..at + len` is a range of ours to replace.
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

/// A range and what belongs to it; when the last share of it goes, the range is unmapped first
/// (fields are dropped in order) and the rest let go of after.
#[derive(Debug)]
pub(crate) struct Run<X> {
    area: Area,
    pub(crate) extra: X,
}

impl<X> Run<X> {
    pub(crate) fn new(area: Area, extra: X) -> Self {
        Self { area, extra }
    }

    /// The range.
    pub(crate) fn area(&self) -> &Area {
        &self.area
    }
}

/// A stretch of memory shared with other domains, and a share of what keeps it mapped.
pub struct Held<X> {
    base: NonNull<u8>,
    len: usize,
    run: Arc<Run<X>>,
}

impl<X> Held<X> {
    /// All of a run.
    pub(crate) fn whole(run: Arc<Run<X>>) -> Self {
        Self { base: run.area.base, len: run.area.len, run }
    }

    /// A part of a run; `None` when it is not all inside or does not start at a multiple of 8.
    pub(crate) fn part(run: &Arc<Run<X>>, offset: usize, len: usize) -> Option<Self> {
        let base = run.area.place(offset, len)?;
        Some(Self { base, len, run: Arc::clone(run) })
    }

    /// What keeps it.
    pub(crate) fn run(&self) -> &Arc<Run<X>> {
        &self.run
    }

    /// Whether it is all of its run.
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

// SAFETY: the memory is reached only through atomics and opaque copies; the rest is the run's.
unsafe impl<X: Send + Sync> Send for Held<X> {}
// SAFETY: as above.
unsafe impl<X: Send + Sync> Sync for Held<X> {}

// SAFETY: made by `whole` and `part` alone, which saw to it that it lies in the area of the run it
// has a share of. The area stays mapped at its address, with the access `writable` tells, until the
// last share goes; `replace` changes what is there, not that something is. Pages of other domains
// stay in place when these die: the hypervisor keeps what is mapped. No reference to it is made.
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
    fn a_page_is_replaced_and_the_others_stay() {
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
    fn a_failed_replacement_leaves_the_page_usable() {
        let (memory, fd) = (held(1), file(7));
        // No file can be mapped at an offset that is not a multiple of a page.
        let odd = Source::Device(&fd, 1);
        assert!(memory.run().area().replace(0, PAGE_SIZE, odd, Source::Zeroes).is_err());
        memory.write_bytes(0, &[3]).unwrap();
        assert_eq!(first(&memory, 0), 3);
    }

    #[test]
    fn a_reservation_is_filled_in_pieces_and_only_then_handed_out() {
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
    fn parts_stay_inside_and_keep_the_run() {
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
