//! What lies where in the two memfds of a domain.
//!
//! Memory, in frames of 4 KiB:
//!
//! | frame | holds |
//! |---|---|
//! | 0 | what the hypervisor says of the domain: a `u32` that is not 0 once it was destroyed |
//! | 1 … | the grant table, version 1, [`MAX_GRANT_FRAMES`] frames at most |
//! | behind | pages to grant |
//!
//! Events, apart from memory so that whoever only wakes a domain need not map what it stores:
//!
//! | byte | holds |
//! |---|---|
//! | 0 | pending and mask bits of the two-level ABI |
//! | 4096 | for each port a `u32`: the port at the other end, 0 while nobody is bound |

use crate::mem::{Mapped, Slice};
use core::sync::atomic::Ordering;
use pvio_event_channel::{Port, two_level};
use pvio_grant_table::{DomId, v1};
use pvio_ring::shm::{PAGE_SIZE, Region};
use std::io;

/// Most grant table frames a domain can have: 32768 entries, Xen's own default limit.
pub(crate) const MAX_GRANT_FRAMES: u32 = 64;
/// Most pages a domain can have to share: 64 GiB.
pub(crate) const MAX_MEMORY_PAGES: u32 = 1 << 24;
/// Ports are numbered 1 to this.
pub(crate) const MAX_PORTS: u32 = two_level::PORTS - 1;
/// Bytes of the pending and mask bits: what a peer maps.
pub(crate) const EVENT_BITS_LEN: usize = PAGE_SIZE;
/// Bytes of the whole events file.
pub(crate) const EVENTS_LEN: usize = EVENT_BITS_LEN + two_level::PORTS as usize * 4;

/// The frames of a domain's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Frames {
    total: u32,
    grant: u32,
}

impl Frames {
    /// `pages` to share behind `grant` frames of grant table; `None` when either is out of range.
    pub(crate) fn new(pages: u32, grant: u32) -> Option<Self> {
        let fits =
            (1..=MAX_MEMORY_PAGES).contains(&pages) && (1..=MAX_GRANT_FRAMES).contains(&grant);
        fits.then_some(Self { total: 1 + grant + pages, grant })
    }

    /// As told by the hypervisor.
    pub(crate) fn from_wire(total: u32, grant: u32) -> Option<Self> {
        Self::new(total.checked_sub(grant)?.checked_sub(1)?, grant)
    }

    /// All of them.
    pub(crate) fn total(self) -> u32 {
        self.total
    }

    /// Those of the grant table.
    pub(crate) fn grant(self) -> u32 {
        self.grant
    }

    /// Bytes of all.
    pub(crate) fn len(self) -> usize {
        self.total as usize * PAGE_SIZE
    }

    /// The first page to share.
    pub(crate) fn first(self) -> u32 {
        1 + self.grant
    }

    /// Whether a frame is one that can be shared.
    #[inline]
    pub(crate) fn sharable(self, frame: u32) -> bool {
        (self.first()..self.total).contains(&frame)
    }

    /// Entries of the grant table.
    pub(crate) fn entries(self) -> u32 {
        self.grant * (PAGE_SIZE / v1::ENTRY_SIZE) as u32
    }

    /// Bytes before the first page to share: all that the hypervisor itself maps.
    pub(crate) fn low_len(self) -> usize {
        self.first() as usize * PAGE_SIZE
    }
}

/// A domain's memory, mapped from frame 0 on: at least its low area.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) mapped: Mapped,
    pub(crate) frames: Frames,
}

impl Memory {
    /// The grant table.
    #[inline]
    pub(crate) fn table(&self) -> v1::GrantTable<Slice<'_>> {
        let len = self.frames.grant as usize * PAGE_SIZE;
        v1::GrantTable::new(self.mapped.slice(PAGE_SIZE, len).expect("the low area is mapped"))
    }

    /// Whether the hypervisor destroyed the domain.
    #[inline]
    pub(crate) fn dead(&self) -> bool {
        self.mapped.load_u32(0, Ordering::Acquire) != Some(0)
    }

    /// Marks the domain as destroyed (the hypervisor's side).
    pub(crate) fn set_dead(&self) {
        self.mapped.store_u32(0, 1, Ordering::Release);
    }

    /// Whether the domain granted `user` anything.
    pub(crate) fn grants_to(&self, user: DomId) -> bool {
        let table = self.table();
        (0..self.frames.entries()).any(|gref| {
            table.entry(pvio_grant_table::GrantRef(gref)).is_some_and(|(flags, domain)| {
                domain == user && flags.contains(v1::Flags::PERMIT_ACCESS)
            })
        })
    }
}

/// The pending and mask bits at the start of a mapped events file.
#[inline]
pub(crate) fn event_bits(events: &Mapped) -> two_level::EventPage<Slice<'_>> {
    two_level::EventPage::new(events.slice(0, two_level::SIZE).expect("the bits are mapped"))
}

/// The port at the other end of `port`, as the hypervisor left it in a mapped events file.
#[inline]
pub(crate) fn link(events: &Mapped, port: Port) -> u32 {
    events.load_u32(link_at(port), Ordering::SeqCst).unwrap_or(0)
}

/// Says which port is at the other end of `port` (the hypervisor's side); 0 for none.
pub(crate) fn set_link(events: &Mapped, port: Port, other: u32) {
    events.store_u32(link_at(port), other, Ordering::SeqCst);
}

fn link_at(port: Port) -> usize {
    EVENT_BITS_LEN + (port.0 as usize & (two_level::PORTS as usize - 1)) * 4
}

/// The memory of a domain, mapped in full.
pub(crate) fn map_memory(fd: impl std::os::fd::AsFd, frames: Frames) -> io::Result<Memory> {
    Ok(Memory { mapped: Mapped::front(fd, frames.len())?, frames })
}
