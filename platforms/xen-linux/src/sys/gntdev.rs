//! `/dev/xen/gntdev`: mapping pages of other domains.

use super::ioctl::{call, code};
use super::memory::{Area, Run, Source};
use core::mem::offset_of;
use pvio_grant_table::{DomId, GrantRef};
use pvio_ring::shm::PAGE_SIZE;
use rustix::io::Errno;
use rustix::ioctl::Opcode;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Largest number of pages in one ioctl: those of the largest request (`blkif.h`, 256 indirect
/// segments).
pub(crate) const MOST_AT_ONCE: usize = 256;

/// `struct ioctl_gntdev_grant_ref`
#[repr(C)]
#[derive(Clone, Copy)]
struct Grant {
    domid: u32,
    gref: u32,
}

/// `struct ioctl_gntdev_map_grant_ref`, whose last field has a variable length.
#[repr(C)]
struct Map<const N: usize> {
    count: u32,
    pad: u32,
    index: u64,
    refs: [Grant; N],
}

/// `struct ioctl_gntdev_unmap_grant_ref`
#[repr(C)]
struct Unmap {
    index: u64,
    count: u32,
    pad: u32,
}

/// `struct ioctl_gntdev_unmap_notify`
#[repr(C)]
struct UnmapNotify {
    index: u64,
    action: u32,
    event_channel_port: u32,
}

const _: () = {
    assert!(size_of::<Grant>() == 8 && size_of::<Map<1>>() == 24);
    assert!(offset_of!(Map<1>, index) == 8 && offset_of!(Map<1>, refs) == 16);
    assert!(size_of::<Unmap>() == 16 && offset_of!(Unmap, count) == 8);
    assert!(size_of::<UnmapNotify>() == 16 && offset_of!(UnmapNotify, action) == 8);
    assert!(offset_of!(UnmapNotify, event_channel_port) == 12);
};

pub(super) const MAP_GRANT_REF: Opcode = code(b'G', 0, size_of::<Map<1>>());
pub(super) const UNMAP_GRANT_REF: Opcode = code(b'G', 1, size_of::<Unmap>());
pub(super) const SET_UNMAP_NOTIFY: Opcode = code(b'G', 7, size_of::<UnmapNotify>());
/// `UNMAP_NOTIFY_CLEAR_BYTE`
const CLEAR_BYTE: u32 = 1;
/// `UNMAP_NOTIFY_SEND_EVENT`
const SEND_EVENT: u32 = 2;

/// Open device. The kernel has a separate list of mappings for each descriptor, under a separate
/// mutex, and every call that maps or unmaps searches it.
#[derive(Debug)]
pub(crate) struct Gntdev {
    pub(super) fd: OwnedFd,
    /// Largest number of pages in one ioctl, at most [`MOST_AT_ONCE`].
    at_once: usize,
}

/// Grants that are registered with the kernel until dropped. Their mappings must be removed first.
#[derive(Debug)]
pub struct Grants {
    gntdev: Arc<Gntdev>,
    first: Piece,
    more: Vec<Piece>,
}

/// Result of one ioctl.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Offset in the device, in bytes.
    index: u64,
    pages: u32,
}

impl Gntdev {
    /// Wraps the device. `limit` is the kernel's limit of grants in one ioctl.
    pub(crate) fn new(fd: OwnedFd, limit: Option<usize>) -> Self {
        Self { fd, at_once: limit.unwrap_or(MOST_AT_ONCE).clamp(1, MOST_AT_ONCE) }
    }

    /// Returns the descriptor, to be passed to another process.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Returns the largest number of pages that one call maps.
    pub(crate) fn at_once(&self) -> usize {
        self.at_once
    }

    /// Maps pages contiguously, all or none; `grefs` must not be empty.
    pub(crate) fn map(
        self: &Arc<Self>,
        domain: DomId,
        grefs: &[GrantRef],
        writable: bool,
    ) -> Result<Run<Grants>, Errno> {
        let len = grefs.len().checked_mul(PAGE_SIZE).ok_or(Errno::NOMEM)?;
        let mut chunks = grefs.chunks(self.at_once);
        let first = self.announce(domain, chunks.next().ok_or(Errno::INVAL)?)?;
        // From here on, a drop undoes the registrations.
        let mut grants = Grants { gntdev: Arc::clone(self), first, more: Vec::new() };
        if grefs.len() <= self.at_once {
            let area = Area::map(len, Source::Device(&self.fd, first.index), writable)?;
            return Ok(Run::new(area, grants));
        }
        for chunk in chunks {
            let piece = self.announce(domain, chunk)?;
            grants.more.push(piece);
        }
        let mut reserved = Area::reserve(len, writable)?;
        for piece in core::iter::once(&grants.first).chain(&grants.more) {
            let source = Source::Device(&self.fd, piece.index);
            reserved.fill(piece.pages as usize * PAGE_SIZE, source)?;
        }
        Ok(Run::new(reserved.done().ok_or(Errno::INVAL)?, grants))
    }

    /// Registers grants with the kernel, without mapping them.
    fn announce(&self, domain: DomId, grefs: &[GrantRef]) -> Result<Piece, Errno> {
        let none = Grant { domid: domain.0.into(), gref: 0 };
        let (pages, index) = match grefs {
            // A request without indirect segments needs a smaller array on the stack.
            [..] if grefs.len() <= 11 => announce(&self.fd, grefs, [none; 11]),
            _ => announce(&self.fd, grefs, [none; MOST_AT_ONCE]),
        }?;
        Ok(Piece { index, pages })
    }

    fn forget(&self, piece: Piece) {
        let mut unmap = Unmap { index: piece.index, count: piece.pages, pad: 0 };
        // SAFETY: the struct of this ioctl, for which nothing else is read or written. It removes
        // an entry from the kernel's list; pages that are still mapped would stay mapped.
        let done = unsafe { call(&self.fd, UNMAP_GRANT_REF, &mut unmap) };
        debug_assert!(done.is_ok(), "UNMAP_GRANT_REF: {done:?}");
    }
}

fn announce<const N: usize>(
    fd: &OwnedFd,
    grefs: &[GrantRef],
    mut refs: [Grant; N],
) -> Result<(u32, u64), Errno> {
    let count = u32::try_from(grefs.len()).map_err(|_| Errno::INVAL)?;
    refs.get_mut(..grefs.len())
        .ok_or(Errno::INVAL)?
        .iter_mut()
        .zip(grefs)
        .for_each(|(grant, gref)| grant.gref = gref.0);
    let mut map = Map { count, pad: 0, index: 0, refs };
    // SAFETY: the struct of this ioctl, followed by at least `count` references: the slice above
    // exists. The kernel writes `index` only.
    unsafe { call(fd, MAP_GRANT_REF, &mut map) }?;
    Ok((count, map.index))
}

impl Grants {
    /// Requests the kernel to clear a byte and to send an event when the pages are unmapped, for
    /// any reason including the end of this process. There is one such request for all pages of one
    /// ioctl.
    pub(crate) fn notify(&self, clear: Option<usize>, event: Option<u32>) -> Result<(), Errno> {
        if !self.more.is_empty() {
            return Err(Errno::INVAL);
        }
        let at = clear.unwrap_or(0) as u64;
        if at >= u64::from(self.first.pages) * PAGE_SIZE as u64 {
            return Err(Errno::INVAL);
        }
        let mut notify = UnmapNotify {
            index: self.first.index + at,
            action: clear.map_or(0, |_| CLEAR_BYTE) | event.map_or(0, |_| SEND_EVENT),
            event_channel_port: event.unwrap_or(0),
        };
        // SAFETY: the struct of this ioctl, for which nothing else is read or written now. The byte
        // that it will clear is one of shared pages, which a peer may change at any time anyway.
        unsafe { call(&self.gntdev.fd, SET_UNMAP_NOTIFY, &mut notify) }.map(drop)
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        for piece in core::iter::once(&self.first).chain(&self.more) {
            self.gntdev.forget(*piece);
        }
    }
}
