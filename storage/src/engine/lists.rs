//! Free list of segment lists, so that no operation allocates one.

use super::Segments;
use alloc::vec::Vec;

/// Capacity of a small list, in segments.
const SMALL: usize = 16;
/// Maximum total capacity of all large lists in the free list, in segments.
const MOST: usize = 4096;

/// Unused lists. Their memory is bounded, independent of the operations: a small list for each
/// operation that was in flight, and a few large ones. The capacity of an operation's list is at
/// most four times its segments, or 16.
pub(super) struct SpareLists<B> {
    small: Vec<Segments<B>>,
    large: Vec<Segments<B>>,
    /// Total capacity of the lists in `large`.
    room: usize,
}

impl<B> Default for SpareLists<B> {
    fn default() -> Self {
        Self { small: Vec::new(), large: Vec::new(), room: 0 }
    }
}

impl<B> SpareLists<B> {
    /// Moves an operation's segments into a list from the free list.
    pub fn list(&mut self, segments: &mut Segments<B>) -> Segments<B> {
        let mut list = self.take(segments.len());
        list.append(segments);
        list
    }

    fn take(&mut self, count: usize) -> Segments<B> {
        if count <= SMALL {
            return self.small.pop().unwrap_or_else(|| Vec::with_capacity(SMALL));
        }
        let fits =
            |list: &Segments<B>| (count..=count.saturating_mul(4)).contains(&list.capacity());
        match self.large.iter().rposition(fits) {
            Some(place) => {
                let list = self.large.remove(place);
                self.room = self.room.saturating_sub(list.capacity());
                list
            }
            None => Vec::with_capacity(count),
        }
    }

    /// Clears a list and returns it to the free list, if there is room.
    pub fn keep(&mut self, mut list: Segments<B>) {
        list.clear();
        let room = list.capacity();
        if room == SMALL {
            self.small.push(list);
        } else if room > SMALL && room <= MOST {
            self.room += room;
            self.large.push(list);
        }
        while self.room > MOST {
            // The lists that were returned first are the least likely to be in the CPU cache.
            self.room = self.room.saturating_sub(self.large.remove(0).capacity());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_ring::IoSeg;

    fn segments(count: usize) -> Segments<()> {
        (0..count).map(|_| IoSeg { buf: (), offset: 0, len: 0 }).collect()
    }

    #[test]
    fn spare_lists_are_bounded_by_operation_size_and_reused() {
        let mut spare = SpareLists::default();
        for count in [4096, 1000, 17, 1, 300] {
            let lists: Vec<_> = (0..64).map(|_| spare.list(&mut segments(count))).collect();
            for list in &lists {
                assert_eq!(list.len(), count);
                assert!(list.capacity() <= (4 * count).max(SMALL), "{count}: {}", list.capacity());
            }
            lists.into_iter().for_each(|list| spare.keep(list));
            let kept: usize = spare.large.iter().map(Vec::capacity).sum();
            assert!(kept == spare.room && kept <= MOST, "{count}: {kept}");
            assert!(spare.small.len() <= 64);
        }
        let kept = spare.large.len();
        let list = spare.list(&mut segments(300));
        assert_eq!(spare.large.len(), kept - 1, "spare list is reused");
        drop(list);
    }
}
