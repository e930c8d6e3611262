//! Layout of the memfds that domains share.
//!
//! Memory of a domain, in frames of 4 KiB:
//!
//! | frame | holds |
//! |---|---|
//! | 0 | two `u32` of the hypervisor: not 0 after destruction; not 0 after a process left |
//! | 1 … | the grant table, version 1, [`MAX_GRANT_FRAMES`] frames at most |
//! | after these | pages to grant |
//!
//! An event channel has a file of one page, which only the processes of its two ends map. One of
//! them can therefore neither raise nor clear an event of another channel:
//!
//! | byte | holds |
//! |---|---|
//! | 0 | pending and mask bits (two-level ABI) of end 0, of which it uses those of port 1 |
//! | 1024 | the same for end 1 |
//! | 2048 | a `u32` that is 1 while both ends are open |
//!
//! The uses of another domain's grants by one connection are in a file that its process and the
//! hypervisor map. So the hypervisor can end the uses of a process that was killed:
//!
//! | byte | holds |
//! |---|---|
//! | 0 | a `u32` that is not 0 after the hypervisor has ended all uses |
//! | 64 | for each grant a `u32`: the number of its uses, or [`USES_LOCKED`] while they change |

use crate::mem::{Mapped, Slice};
use core::hint::spin_loop;
use core::sync::atomic::Ordering;
use pvio_event_channel::{Port, two_level};
use pvio_grant_table::{DomId, GrantRef, v1};
use pvio_ring::shm::{PAGE_SIZE, Region};
use std::io;
use std::os::fd::AsFd;

/// Largest number of grant table frames of a domain: 32768 entries, Xen's default limit.
pub(crate) const MAX_GRANT_FRAMES: u32 = 64;
/// Largest number of sharable pages of a domain: 64 GiB.
pub(crate) const MAX_MEMORY_PAGES: u32 = 1 << 24;
/// Largest port number; the smallest is 1.
pub(crate) const MAX_PORTS: u32 = two_level::PORTS - 1;
/// Size of the file of an event channel in bytes.
pub(crate) const CHANNEL_LEN: usize = PAGE_SIZE;
/// Bit of an end of an event channel, in the two-level bits of this end.
const END: Port = Port(1);
const BOUND_AT: usize = 2 * two_level::SIZE;
/// Number of uses while a process changes it.
pub(crate) const USES_LOCKED: u32 = u32::MAX;
const USES_AT: usize = 64;

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

    /// Marks that a process has left the domain, which may have left grants. For the hypervisor.
    pub(crate) fn set_left(&self) {
        self.mapped.store_u32(4, 1, Ordering::Release);
    }

    /// Whether another process was joined as the domain before.
    pub(crate) fn was_left(&self) -> bool {
        self.mapped.load_u32(4, Ordering::Acquire) != Some(0)
    }

    /// Ends every grant of the domain that no other domain uses. Returns the remaining ones and
    /// their frames.
    pub(crate) fn end_grants(&self) -> Vec<(GrantRef, u32)> {
        let table = self.table();
        let all = (GrantRef::FIRST_FREE.0..self.frames.entries()).map(GrantRef);
        let busy = all.filter(|gref| table.end_access(*gref).is_err());
        let frame = |gref: &GrantRef| {
            let at = PAGE_SIZE + gref.0 as usize * v1::ENTRY_SIZE + size_of::<u32>();
            self.mapped.load_u32(at, Ordering::Acquire).unwrap_or(0)
        };
        busy.map(|gref| (gref, frame(&gref))).collect()
    }

    /// Whether the domain has granted any page to `user`.
    pub(crate) fn grants_to(&self, user: DomId) -> bool {
        let table = self.table();
        (0..self.frames.entries()).any(|gref| {
            table.entry(GrantRef(gref)).is_some_and(|(flags, domain)| {
                domain == user && flags.contains(v1::Flags::PERMIT_ACCESS)
            })
        })
    }
}

/// Mapped page of an event channel.
#[derive(Debug)]
pub(crate) struct ChannelPage(Mapped);

impl ChannelPage {
    /// Maps the file of an event channel.
    pub(crate) fn map(fd: impl AsFd) -> io::Result<Self> {
        Mapped::front(fd, CHANNEL_LEN).map(Self)
    }

    /// Marks an event of an end pending. Returns whether the end must be woken.
    #[inline]
    pub(crate) fn raise(&self, end: EndIndex) -> bool {
        self.bits(end).raise(END)
    }

    /// Marks an event of an end pending, and calls `wake` if the end must be woken.
    #[inline]
    pub(crate) fn send(&self, end: EndIndex, wake: impl FnOnce()) {
        self.bits(end).send(END, wake);
    }

    /// Resets the wake-up of an end with `reset`, then clears its pending event. Returns whether
    /// there was one.
    #[inline]
    pub(crate) fn receive<E>(
        &self,
        end: EndIndex,
        reset: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        self.bits(end).receive(END, reset)
    }

    /// Whether both ends are open.
    pub(crate) fn is_bound(&self) -> bool {
        self.0.load_u32(BOUND_AT, Ordering::SeqCst) == Some(1)
    }

    /// Stores whether both ends are open. For the hypervisor.
    pub(crate) fn set_bound(&self, bound: bool) {
        self.0.store_u32(BOUND_AT, bound.into(), Ordering::SeqCst);
    }

    #[inline]
    fn bits(&self, end: EndIndex) -> two_level::EventPage<Slice<'_>> {
        let at = if end == EndIndex::First { 0 } else { two_level::SIZE };
        two_level::EventPage::new(self.0.slice(at, two_level::SIZE).expect("the bits are mapped"))
    }
}

/// One of the two ends of an event channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EndIndex {
    First,
    Second,
}

impl EndIndex {
    /// Returns the index as sent to a process.
    pub(crate) fn to_wire(self) -> u32 {
        self as u32
    }

    /// Returns the index that the hypervisor sent.
    pub(crate) fn from_wire(index: u32) -> Option<Self> {
        [Self::First, Self::Second].into_iter().find(|end| end.to_wire() == index)
    }

    /// Returns the peer's index.
    #[inline]
    pub(crate) fn peer(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// Mapped numbers of uses of a domain's grants by one connection.
#[derive(Debug)]
pub(crate) struct Uses {
    mapped: Mapped,
    entries: u32,
}

impl Uses {
    /// Returns the size of the file for a domain with this layout, in bytes.
    pub(crate) fn file_len(frames: Frames) -> usize {
        (USES_AT + frames.entries() as usize * 4).next_multiple_of(PAGE_SIZE)
    }

    /// Maps the file.
    pub(crate) fn map(fd: impl AsFd, frames: Frames) -> io::Result<Self> {
        let mapped = Mapped::front(fd, Self::file_len(frames))?;
        Ok(Self { mapped, entries: frames.entries() })
    }

    /// Whether the hypervisor has ended all uses.
    #[inline]
    pub(crate) fn revoked(&self) -> bool {
        self.mapped.load_u32(0, Ordering::Acquire) != Some(0)
    }

    /// Marks all uses as ended. For the hypervisor.
    pub(crate) fn revoke(&self) {
        self.mapped.store_u32(0, 1, Ordering::SeqCst);
    }

    /// Returns the number of uses of a grant, or [`USES_LOCKED`].
    pub(crate) fn count(&self, gref: GrantRef) -> u32 {
        let at = self.place(gref);
        at.and_then(|at| self.mapped.load_u32(at, Ordering::SeqCst)).unwrap_or(0)
    }

    /// Returns all grants that are in use, or locked.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = GrantRef> + '_ {
        (0..self.entries).map(GrantRef).filter(|gref| self.count(*gref) != 0)
    }

    /// Locks the number of uses of a grant and returns it; `None` if there is no such grant. Number
    /// and lock are one word, so that the marks in the grant table and the number change
    /// together. The lock is held for a few instructions, and contended only if two threads use the
    /// same page at the same time.
    #[inline]
    pub(crate) fn lock(&self, gref: GrantRef) -> Option<u32> {
        let at = self.place(gref)?;
        let mut tries = 0_u32;
        loop {
            let count = self.mapped.load_u32(at, Ordering::Relaxed)?;
            if count != USES_LOCKED
                && self.mapped.compare_exchange_u32(at, count, USES_LOCKED)?.is_ok()
            {
                return Some(count);
            }
            // The thread that holds the lock may have been preempted.
            tries += 1;
            if tries.is_multiple_of(64) {
                std::thread::yield_now();
            }
            spin_loop();
        }
    }

    /// Stores the number of uses of a locked grant.
    #[inline]
    pub(crate) fn unlock(&self, gref: GrantRef, count: u32) {
        if let Some(at) = self.place(gref) {
            self.mapped.store_u32(at, count, Ordering::Release);
        }
    }

    #[inline]
    fn place(&self, gref: GrantRef) -> Option<usize> {
        (gref.0 < self.entries).then_some(USES_AT + gref.0 as usize * 4)
    }
}

/// Maps the whole memory of a domain.
pub(crate) fn map_memory(fd: impl AsFd, frames: Frames) -> io::Result<Memory> {
    Ok(Memory { mapped: Mapped::front(fd, frames.len())?, frames })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sealed_memfd;

    #[test]
    fn use_count_is_correct_under_concurrent_threads() {
        let frames = Frames::new(1, 1).unwrap();
        let file = sealed_memfd("uses", Uses::file_len(frames)).unwrap();
        let (ours, hypervisors) = (Uses::map(&file, frames).unwrap(), Uses::map(&file, frames));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..100_000 {
                        let count = ours.lock(GrantRef(511)).unwrap();
                        ours.unlock(GrantRef(511), count + 1);
                    }
                });
            }
        });
        let hypervisors = hypervisors.unwrap();
        assert_eq!(hypervisors.count(GrantRef(511)), 200_000);
        assert_eq!(hypervisors.in_use().collect::<Vec<_>>(), [GrantRef(511)]);
        assert_eq!(ours.lock(GrantRef(512)), None, "beyond the table");
        assert!(!ours.revoked());
        hypervisors.revoke();
        assert!(ours.revoked());
    }

    #[test]
    fn ends_of_channel_have_separate_events() {
        let file = sealed_memfd("channel", CHANNEL_LEN).unwrap();
        let page = ChannelPage::map(&file).unwrap();
        let (first, second) = (EndIndex::First, EndIndex::First.peer());
        assert!(page.raise(first) && !page.raise(first));
        let take = |end| page.receive(end, || Ok::<(), core::convert::Infallible>(())).unwrap();
        assert!(!take(second) && take(first) && !take(first));
        assert_eq!(EndIndex::from_wire(second.to_wire()), Some(EndIndex::Second));
        assert_eq!(EndIndex::from_wire(2), None);
    }
}
