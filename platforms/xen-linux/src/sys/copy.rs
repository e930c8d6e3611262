//! `/dev/xen/gntdev`: copying to and from pages of other domains.

use super::gntdev::Gntdev;
use super::ioctl::{call, code};
use core::ffi::c_void;
use core::mem::offset_of;
use core::ptr::null_mut;
use pvio_grant_table::{CopyBuf, CopyOp, GrantStatus};
use pvio_ring::shm::PAGE_SIZE;
use rustix::io::Errno;
use rustix::ioctl::Opcode;

/// Number of copies in one ioctl. The kernel passes them to the hypervisor 16 at a time
/// (`GNTDEV_COPY_BATCH`) in any case; this only saves system calls, and bounds the stack usage.
const AT_ONCE: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Foreign {
    gref: u32,
    offset: u16,
    domid: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
union Side {
    virt: *mut c_void,
    foreign: Foreign,
}

/// `struct gntdev_grant_copy_segment`
#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    source: Side,
    dest: Side,
    len: u16,
    flags: u16,
    status: i16,
}

/// `struct ioctl_gntdev_grant_copy`
#[repr(C)]
struct Copy {
    count: u32,
    segments: *mut Segment,
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Foreign>() == 8 && offset_of!(Foreign, offset) == 4);
    assert!(offset_of!(Foreign, domid) == 6);
    assert!(size_of::<Segment>() == 24 && offset_of!(Segment, dest) == 8);
    assert!(offset_of!(Segment, len) == 16 && offset_of!(Segment, status) == 20);
    assert!(size_of::<Copy>() == 16 && offset_of!(Copy, segments) == 8);
};

pub(super) const GRANT_COPY: Opcode = code(b'G', 8, size_of::<Copy>());
/// `GNTCOPY_source_gref`
const SOURCE_GREF: u16 = 1;
/// `GNTCOPY_dest_gref`
const DEST_GREF: u16 = 2;

const UNUSED: Segment = Segment {
    source: Side { virt: null_mut() },
    dest: Side { virt: null_mut() },
    len: 0,
    flags: SOURCE_GREF,
    status: 0,
};

impl Gntdev {
    /// Executes every copy whose status `wanted` selects, and stores a status in each of them.
    pub(crate) fn copy(&self, ops: &mut [CopyOp<'_>], wanted: impl Fn(GrantStatus) -> bool) {
        let mut segments = [UNUSED; AT_ONCE];
        let mut from = 0;
        while from < ops.len() {
            // Index in `ops` of each segment.
            let mut of = [0_usize; AT_ONCE];
            let mut count = 0;
            while let Some(op) = ops.get_mut(from)
                && count < AT_ONCE
            {
                if wanted(op.status) {
                    match segment(op) {
                        Some(made) => {
                            (segments[count], of[count]) = (made, from);
                            count += 1;
                        }
                        None => op.status = GrantStatus::BadCopyArgument,
                    }
                }
                from += 1;
            }
            if count == 0 {
                continue;
            }
            if self.run(&mut segments[..count]).is_err() && count > 1 {
                // All statuses are undefined then (for example without memory), so each copy is
                // repeated separately. Copies are idempotent.
                segments[..count].iter_mut().for_each(|one| {
                    if self.run(core::slice::from_mut(one)).is_err() {
                        one.status = GrantStatus::GeneralError as i16;
                    }
                });
            }
            for (segment, at) in segments[..count].iter().zip(of) {
                ops[at].status = GrantStatus::from_wire(segment.status);
            }
        }
    }

    /// If this fails, the statuses are undefined, except for a single segment.
    fn run(&self, segments: &mut [Segment]) -> Result<(), Errno> {
        let count = u32::try_from(segments.len()).map_err(|_| Errno::INVAL)?;
        // Segments without a status from the kernel were not executed.
        segments.iter_mut().for_each(|one| one.status = GrantStatus::GeneralError as i16);
        let mut copy = Copy { count, segments: segments.as_mut_ptr() };
        // SAFETY: the struct of this ioctl and `count` segments. The addresses in them are those of
        // slices that the `CopyOp`s they were made of borrow until `copy` returns: exclusively when
        // the kernel writes, as `flags` tell.
        unsafe { call(&self.fd, GRANT_COPY, &mut copy) }.map(drop)
    }
}

/// Returns `None` if the copy leaves the page.
fn segment(op: &mut CopyOp<'_>) -> Option<Segment> {
    let len = match &op.with {
        CopyBuf::FromGrant(to) => to.len(),
        CopyBuf::ToGrant(from) => from.len(),
    };
    if op.offset.checked_add(len)? > PAGE_SIZE {
        return None;
    }
    let offset = u16::try_from(op.offset).ok()?;
    let foreign = Side { foreign: Foreign { gref: op.gref.0, offset, domid: op.domain.0 } };
    let (source, dest, flags) = match &mut op.with {
        CopyBuf::FromGrant(to) => (foreign, Side { virt: to.as_mut_ptr().cast() }, SOURCE_GREF),
        CopyBuf::ToGrant(from) => {
            (Side { virt: from.as_ptr().cast_mut().cast() }, foreign, DEST_GREF)
        }
    };
    Some(Segment { source, dest, len: u16::try_from(len).ok()?, flags, status: 0 })
}
