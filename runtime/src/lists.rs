//! The data of an operation while it is in flight: its segments, and their addresses.
#![allow(unsafe_code)]

use crate::buf::{IoBuf, address};
use pvio_ring::IoSeg;

/// Number of segments for which every slot has capacity.
const SMALL: usize = 16;
/// Limit of the total capacity, in segments, of all spare large lists.
const MOST_SPARE: usize = 8192;
/// Largest number of memory ranges of one operation (`UIO_MAXIOV`).
const MOST_VECTORS: usize = 1024;

/// `struct iovec`.
#[repr(C)]
pub(crate) struct Vector {
    pub(crate) base: *mut u8,
    pub(crate) len: usize,
}

/// Segments of one operation, and their memory ranges. The kernel may read the ranges until the
/// operation completes, so they are not changed before.
pub(crate) struct Lists<B> {
    segments: Vec<IoSeg<B>>,
    vectors: Vec<Vector>,
}

// SAFETY: the addresses in `vectors` belong to buffers that are `Send` and owned in `segments`.
unsafe impl<B: IoBuf> Send for Lists<B> {}

impl<B: IoBuf> Lists<B> {
    pub(crate) fn small() -> Self {
        Self { segments: Vec::with_capacity(SMALL), vectors: Vec::with_capacity(SMALL) }
    }

    /// Stores an operation's segments and returns the memory ranges of all but their first `skip`
    /// bytes. Ranges beyond the kernel's limit are omitted, which leads to a short transfer.
    pub(crate) fn fill(
        &mut self,
        segments: impl Iterator<Item = IoSeg<B>>,
        skip: usize,
        write: bool,
    ) -> &[Vector] {
        self.segments.extend(segments);
        let mut skip = skip;
        for seg in &self.segments {
            let gone = skip.min(seg.len);
            skip -= gone;
            if gone == seg.len && gone > 0 {
                continue;
            }
            // A segment outside its buffer becomes a null address, which the kernel rejects with
            // EFAULT.
            let (base, len) = match address(seg, write) {
                Some(base) => (base.wrapping_add(gone), seg.len - gone),
                None => (std::ptr::null_mut(), seg.len.max(1)),
            };
            let count = self.vectors.len();
            match self.vectors.last_mut() {
                // Adjacent memory becomes one range.
                Some(last) if last.base.wrapping_add(last.len) == base => last.len += len,
                _ if count == MOST_VECTORS => break,
                _ => self.vectors.push(Vector { base, len }),
            }
        }
        &self.vectors
    }

    /// Returns the segments, so that they can be returned to the caller.
    pub(crate) fn segments(&mut self) -> &mut Vec<IoSeg<B>> {
        &mut self.segments
    }

    fn room(&self) -> usize {
        self.segments.capacity().max(self.vectors.capacity())
    }

    fn clear(&mut self) {
        self.segments.clear();
        self.vectors.clear();
    }
}

/// Unused lists. Large operations share a few large lists, so that a ring with many slots needs
/// little memory, and large operations do not allocate after the first ones.
pub(crate) struct Spare<B> {
    large: Vec<Lists<B>>,
    /// Small lists of the slots that currently have a large one.
    small: Vec<Lists<B>>,
    /// Total capacity of the lists in `large`.
    room: usize,
}

impl<B> Default for Spare<B> {
    fn default() -> Self {
        Self { large: Vec::new(), small: Vec::new(), room: 0 }
    }
}

impl<B: IoBuf> Spare<B> {
    /// Ensures that a slot's lists have capacity for `count` segments.
    #[inline]
    pub(crate) fn fit(&mut self, lists: &mut Lists<B>, count: usize) {
        if count > SMALL {
            self.enlarge(lists, count);
        }
    }

    /// Empties a slot's lists; large ones become spare.
    #[inline]
    pub(crate) fn reclaim(&mut self, lists: &mut Lists<B>) {
        lists.clear();
        if lists.room() > SMALL {
            let small = self.small.pop().unwrap_or_else(Lists::small);
            self.put_by(std::mem::replace(lists, small));
        }
    }

    fn put_by(&mut self, large: Lists<B>) {
        self.room += large.room();
        self.large.push(large);
        // The oldest lists are the least likely to be in the cache.
        while self.room > MOST_SPARE {
            self.room -= self.large.remove(0).room();
        }
    }

    #[cold]
    fn enlarge(&mut self, lists: &mut Lists<B>, count: usize) {
        // A list that is much too large is not used, so that the memory of operations in flight
        // stays proportional to their size.
        let fits = |spare: &Lists<B>| (count..=4 * count).contains(&spare.room());
        let large = match self.large.iter().rposition(fits) {
            Some(place) => {
                let spare = self.large.remove(place);
                self.room -= spare.room();
                spare
            }
            None => Lists {
                segments: Vec::with_capacity(count),
                vectors: Vec::with_capacity(count.min(MOST_VECTORS)),
            },
        };
        self.small.push(std::mem::replace(lists, large));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::PrivateBuf;

    #[test]
    fn lists_in_flight_have_capacity_near_their_length() {
        let mut spare = Spare::<PrivateBuf>::default();
        let mut slots: Vec<_> = (0..64).map(|_| Lists::small()).collect();
        for slot in &mut slots {
            // A very large operation completes; a smaller one stays in flight.
            let mut other = Lists::small();
            spare.fit(&mut other, 4096);
            assert!(other.room() >= 4096);
            spare.reclaim(&mut other);
            spare.fit(slot, 20);
            assert!((20..=80).contains(&slot.room()), "{}", slot.room());
        }
        for slot in &mut slots {
            spare.reclaim(slot);
            assert_eq!(slot.room(), SMALL);
        }
        assert!(spare.room <= MOST_SPARE);
        assert_eq!(spare.room, spare.large.iter().map(Lists::room).sum::<usize>());
    }

    #[test]
    fn large_spare_list_is_reused() {
        let mut spare = Spare::<PrivateBuf>::default();
        let mut slot = Lists::small();
        spare.fit(&mut slot, 256);
        let at = slot.segments.as_ptr().addr();
        spare.reclaim(&mut slot);
        spare.fit(&mut slot, 200);
        assert_eq!(slot.segments.as_ptr().addr(), at);
    }
}
