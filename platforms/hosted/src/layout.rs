//! Layout of the two memfds of a domain.
//!
//! Memory, in frames of 4 KiB:
//!
//! | frame | holds |
//! |---|---|
//! | 0 | state of the domain, set by the hypervisor: a `u32` that is not 0 after destruction |
//! | 1 … | the grant table, version 1, [`MAX_GRANT_FRAMES`] frames at most |
//! | after these | pages to grant |
//!
//! Events have a separate file, so that a domain that only sends notifications need not map the
//! receiver's memory:
//!
//! | byte | holds |
//! |---|---|
//! | 0 | pending and mask bits of the two-level ABI |
//! | 4096 | for each port a `u32`: the peer's port, 0 while no peer is bound |

use crate::mem::{Mapped, Slice};
use core::sync::atomic::Ordering;
use pvio_event_channel::{Port, two_level};
use pvio_grant_table::{DomId, v1};
use pvio_ring::shm::{PAGE_SIZE, Region};
use std::io;

/// Largest number of grant table frames of a domain: 32768 entries, Xen's default limit.
pub(crate) const MAX_GRANT_FRAMES: u32 = 64;
/// Largest number of sharable pages of a domain: 64 GiB.
pub(crate) const MAX_MEMORY_PAGES: u32 = 1 << 24;
/// Largest port number; the smallest is 1.
pub(crate) const MAX_PORTS: u32 = two_level::PORTS - 1;
/// Size of the pending and mask bits in bytes, which a peer maps.
pub(crate) const EVENT_BITS_LEN: usize = PAGE_SIZE;
/// Size of the whole events file in bytes.
pub(crate) const EVENTS_LEN: usize = EVENT_BITS_LEN + two_level::PORTS as usize * 4;

/// Numbers of frames of a domain's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Frames {
    total: u32,
    grant: u32,
}

impl Frames {
    /// Returns the layout with `pages` sharable pages after `grant` grant table frames; `None` if a
    /// number is out of range.
    pub(crate) fn new(pages: u32, grant: u32) -> Option<Self> {
        let fits =
            (1..=MAX_MEMORY_PAGES).contains(&pages) && (1..=MAX_GRANT_FRAMES).contains(&grant);
        fits.then_some(Self { total: 1 + grant + pages, grant })
    }

    /// Returns the layout that a hypervisor's reply describes.
    pub(crate) fn from_wire(total: u32, grant: u32) -> Option<Self> {
        Self::new(total.checked_sub(grant)?.checked_sub(1)?, grant)
    }

    /// Returns the number of all frames.
    pub(crate) fn total(self) -> u32 {
        self.total
    }

    /// Returns the number of grant table frames.
    pub(crate) fn grant(self) -> u32 {
        self.grant
    }

    /// Returns the size of all frames in bytes.
    pub(crate) fn len(self) -> usize {
        self.total as usize * PAGE_SIZE
    }

    /// Returns the number of the first sharable page.
    pub(crate) fn first(self) -> u32 {
        1 + self.grant
    }

    /// Whether a frame is a sharable page.
    #[inline]
    pub(crate) fn sharable(self, frame: u32) -> bool {
        (self.first()..self.total).contains(&frame)
    }

    /// Returns the number of grant table entries.
    pub(crate) fn entries(self) -> u32 {
        self.grant * (PAGE_SIZE / v1::ENTRY_SIZE) as u32
    }

    /// Returns the number of bytes before the first sharable page, which is all that the hypervisor
    /// maps.
    pub(crate) fn low_len(self) -> usize {
        self.first() as usize * PAGE_SIZE
    }
}

/// Mapped memory of a domain, from frame 0: at least all frames before the sharable pages.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) mapped: Mapped,
    pub(crate) frames: Frames,
}

impl Memory {
    /// Returns the grant table.
    #[inline]
    pub(crate) fn table(&self) -> v1::GrantTable<Slice<'_>> {
        let len = self.frames.grant as usize * PAGE_SIZE;
        v1::GrantTable::new(self.mapped.slice(PAGE_SIZE, len).expect("the low area is mapped"))
    }

    /// Whether the hypervisor has destroyed the domain.
    #[inline]
    pub(crate) fn dead(&self) -> bool {
        self.mapped.load_u32(0, Ordering::Acquire) != Some(0)
    }

    /// Marks the domain as destroyed. For the hypervisor.
    pub(crate) fn set_dead(&self) {
        self.mapped.store_u32(0, 1, Ordering::Release);
    }

    /// Whether the domain has granted any page to `user`.
    pub(crate) fn grants_to(&self, user: DomId) -> bool {
        let table = self.table();
        (0..self.frames.entries()).any(|gref| {
            table.entry(pvio_grant_table::GrantRef(gref)).is_some_and(|(flags, domain)| {
                domain == user && flags.contains(v1::Flags::PERMIT_ACCESS)
            })
        })
    }
}

/// Returns the pending and mask bits at the start of a mapped events file.
#[inline]
pub(crate) fn event_bits(events: &Mapped) -> two_level::EventPage<Slice<'_>> {
    two_level::EventPage::new(events.slice(0, two_level::SIZE).expect("the bits are mapped"))
}

/// Returns the peer's port of `port`, as the hypervisor stored it in a mapped events file.
#[inline]
pub(crate) fn link(events: &Mapped, port: Port) -> u32 {
    events.load_u32(link_at(port), Ordering::SeqCst).unwrap_or(0)
}

/// Stores the peer's port of `port`, 0 for none. For the hypervisor.
pub(crate) fn set_link(events: &Mapped, port: Port, other: u32) {
    events.store_u32(link_at(port), other, Ordering::SeqCst);
}

fn link_at(port: Port) -> usize {
    EVENT_BITS_LEN + (port.0 as usize & (two_level::PORTS as usize - 1)) * 4
}

/// Maps the whole memory of a domain.
pub(crate) fn map_memory(fd: impl std::os::fd::AsFd, frames: Frames) -> io::Result<Memory> {
    Ok(Memory { mapped: Mapped::front(fd, frames.len())?, frames })
}
