//! What an operation is made of while the kernel has it: its segments, and their addresses.
#![allow(unsafe_code)]

use crate::buf::{IoBuf, address};
use pvio_ring::IoSeg;

/// Segments for which every slot has room.
const SMALL: usize = 16;
/// Segments for which there is room in all the spare lists together.
const MOST_SPARE: usize = 8192;
/// Stretches of memory the kernel takes in one operation (`UIO_MAXIOV`).
const MOST_VECTORS: usize = 1024;

/// `struct iovec`.
#[repr(C)]
pub(crate) struct Vector {
    pub(crate) base: *mut u8,
    pub(crate) len: usize,
}

/// The segments of one operation, and where they are in memory. The kernel may read the addresses
/// until the operation is over, so nothing changes them meanwhile.
pub(crate) struct Lists<B> {
    segments: Vec<IoSeg<B>>,
    vectors: Vec<Vector>,
}

// SAFETY: the addresses in `vectors` belong to buffers that are `Send` and owned beside them.
unsafe impl<B: IoBuf> Send for Lists<B> {}

impl<B: IoBuf> Lists<B> {
    pub(crate) fn small() -> Self {
        Self { segments: Vec::with_capacity(SMALL), vectors: Vec::with_capacity(SMALL) }
    }

    /// Takes an operation's segments and returns the addresses of all but their first `skip` bytes.
    /// What is more than the kernel takes at once is left out: the transfer will be short.
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
            // A segment that lies outside its buffer becomes a null address, which the kernel
            // refuses with EFAULT.
            let (base, len) = match address(seg, write) {
                Some(base) => (base.wrapping_add(gone), seg.len - gone),
                None => (std::ptr::null_mut(), seg.len.max(1)),
            };
            let count = self.vectors.len();
            match self.vectors.last_mut() {
                // Neighbours in memory are one piece of work for the kernel.
                Some(last) if last.base.wrapping_add(last.len) == base => last.len += len,
                _ if count == MOST_VECTORS => break,
                _ => self.vectors.push(Vector { base, len }),
            }
        }
        &self.vectors
    }

    /// The segments, to be given back.
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

/// Lists not in use. Large operations share a few large lists, so that a ring of many slots costs
/// little and a large operation allocates nothing once there was another.
pub(crate) struct Spare<B> {
    large: Vec<Lists<B>>,
    /// Of slots that have a large one meanwhile.
    small: Vec<Lists<B>>,
    /// Room of all in `large`.
    room: usize,
}

impl<B> Default for Spare<B> {
    fn default() -> Self {
        Self { large: Vec::new(), small: Vec::new(), room: 0 }
    }
}

impl<B: IoBuf> Spare<B> {
    /// Sees to it that a slot's lists have room for `count` segments.
    #[inline]
    pub(crate) fn fit(&mut self, lists: &mut Lists<B>, count: usize) {
        if count > SMALL {
            self.enlarge(lists, count);
        }
    }

    /// Empties a slot's lists; large ones are put by.
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
        // Those put by first are the least likely to be in the cache still.
        while self.room > MOST_SPARE {
            self.room -= self.large.remove(0).room();
        }
    }

    #[cold]
    fn enlarge(&mut self, lists: &mut Lists<B>, count: usize) {
        // One that is much too large would be more than the operation is worth: what is under way
        // takes memory for what it moves, not for what was moved before.
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
    fn lists_under_way_are_not_much_larger_than_what_they_hold() {
        let mut spare = Spare::<PrivateBuf>::default();
        let mut slots: Vec<_> = (0..64).map(|_| Lists::small()).collect();
        for slot in &mut slots {
            // A very large operation comes and goes; a smaller one stays.
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
    fn a_large_list_is_used_again() {
        let mut spare = Spare::<PrivateBuf>::default();
        let mut slot = Lists::small();
        spare.fit(&mut slot, 256);
        let at = slot.segments.as_ptr().addr();
        spare.reclaim(&mut slot);
        spare.fit(&mut slot, 200);
        assert_eq!(slot.segments.as_ptr().addr(), at);
    }
}
