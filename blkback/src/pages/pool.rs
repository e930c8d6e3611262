//! The pool of bounce buffers, and the grant reference that each stands for.
//!
//! The pages of a request are contiguous if possible: the kernel then sees a single buffer, however
//! many pages it has.

use super::REGISTERED_MOST;
use alloc::vec::Vec;
use pvio_grant_table::GrantRef;
use pvio_ring::shm::{PoolMemory, PrivatePage};

/// Pages for each word of the bitmap.
const WORD: usize = u64::BITS as usize;
/// Maximum number of free runs to examine for one that is long enough.
const RUNS_EXAMINED: usize = 16;

/// The bounce buffers of one queue.
#[derive(Debug, Default)]
pub(super) struct PagePool {
    /// Pages by number; `None` while in use.
    pages: Vec<Option<PrivatePage>>,
    /// Bitmap of free pages.
    free: Vec<u64>,
    /// By page number: the grant reference of the guest page that it stands for.
    grefs: Vec<GrantRef>,
    /// Memory of the first pages, until it was returned for registration.
    unregistered: Option<PoolMemory>,
    /// Whether a page was used.
    used: bool,
}

impl PagePool {
    /// Allocates `count` pages, unless the pool has pages already.
    pub fn fill(&mut self, count: usize) {
        if self.is_empty() {
            *self = Self::new(count);
        }
    }

    /// Returns whether the pool has no pages, free or in use.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Creates a pool of `count` free pages. The system allocates memory only for pages that are
    /// used.
    pub fn new(count: usize) -> Self {
        if count == 0 {
            return Self::default();
        }
        let mut free: Vec<u64> = (0..count.div_ceil(WORD)).map(|_| u64::MAX).collect();
        if let Some(last) = free.last_mut()
            && !count.is_multiple_of(WORD)
        {
            *last = (1 << (count % WORD)) - 1;
        }
        let pages: Vec<_> = PrivatePage::pool(count).map(Some).collect();
        let grefs = (0..count).map(|_| GrantRef::default()).collect();
        let first = pages.first().and_then(Option::as_ref);
        let unregistered = first.and_then(|page| page.stretch(count.min(REGISTERED_MOST)));
        Self { pages, free, grefs, unregistered, used: false }
    }

    /// Returns the memory of the first pages, which are used before others; once, after the first
    /// use, because registration would pin memory of a pool that is not used.
    pub fn first_used(&mut self) -> Option<PoolMemory> {
        if self.used { self.unregistered.take() } else { None }
    }

    /// Returns the number of the first page of a free run of `count` pages or, if there is none, of
    /// the longest free run examined.
    pub fn place_for(&self, count: usize) -> Option<usize> {
        let (mut best, mut most) = (None, 0);
        let mut from = 0;
        for _ in 0..RUNS_EXAMINED {
            let Some((first, length)) = self.run(from, count) else { break };
            if length > most {
                (best, most) = (Some(first), length);
            }
            if length >= count {
                break;
            }
            from = first + length;
        }
        best
    }

    /// Takes a page, if it is free, to stand for a guest page.
    pub fn take(&mut self, number: usize, gref: GrantRef) -> Option<PrivatePage> {
        let page = self.pages.get_mut(number)?.take()?;
        *self.free.get_mut(number / WORD)? &= !(1 << (number % WORD));
        *self.grefs.get_mut(number)? = gref;
        self.used = true;
        Some(page)
    }

    /// Returns the grant reference of the guest page that a page stands for.
    pub fn gref(&self, page: &PrivatePage) -> GrantRef {
        self.grefs.get(page.number()).copied().unwrap_or_default()
    }

    pub fn release(&mut self, page: PrivatePage) {
        let number = page.number();
        let (Some(place), Some(word)) =
            (self.pages.get_mut(number), self.free.get_mut(number / WORD))
        else {
            return;
        };
        *place = Some(page);
        *word |= 1 << (number % WORD);
    }

    /// Returns the first free run at or after a page number: its first page and its length, counted
    /// up to `enough`.
    fn run(&self, from: usize, enough: usize) -> Option<(usize, usize)> {
        let mut at = from / WORD;
        let mut word = self.free.get(at)? & (u64::MAX << (from % WORD));
        while word == 0 {
            at += 1;
            word = *self.free.get(at)?;
        }
        let bit = word.trailing_zeros() as usize;
        let first = at * WORD + bit;
        let mut length = (word >> bit).trailing_ones() as usize;
        while length < enough && (first + length).is_multiple_of(WORD) {
            at += 1;
            let more = self.free.get(at).map_or(0, |word| word.trailing_ones() as usize);
            length += more;
            if more == 0 {
                break;
            }
        }
        Some((first, length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes pages for a request of `count` pages, as for copies.
    fn take(pool: &mut PagePool, count: usize) -> Vec<PrivatePage> {
        let mut next = pool.place_for(count).unwrap();
        (0..count)
            .map(|n| {
                let page = pool.take(next, GrantRef(n as u32)).or_else(|| {
                    next = pool.place_for(count - n)?;
                    pool.take(next, GrantRef(n as u32))
                });
                next += 1;
                page.unwrap()
            })
            .collect()
    }

    fn numbers(pages: &[PrivatePage]) -> Vec<usize> {
        pages.iter().map(PrivatePage::number).collect()
    }

    #[test]
    fn request_gets_contiguous_pages() {
        let mut pool = PagePool::new(200);
        let [a, b, c] = [64, 70, 11].map(|count| take(&mut pool, count));
        let ranges = [0..64, 64..134, 134..145];
        assert_eq!([&a, &b, &c].map(|pages| numbers(pages)), ranges.map(|r| r.collect::<Vec<_>>()));
        b.into_iter().for_each(|page| pool.release(page));
        let d = take(&mut pool, 60);
        assert_eq!(numbers(&d), (64..124).collect::<Vec<_>>());
        // The request needs more than the ten pages that are free there.
        assert_eq!(numbers(&take(&mut pool, 12)), (145..157).collect::<Vec<_>>());
        assert_eq!(numbers(&take(&mut pool, 10)), (124..134).collect::<Vec<_>>());
        assert_eq!(
            (pool.place_for(1), pool.place_for(43), pool.place_for(44)),
            (Some(157), Some(157), Some(157))
        );
    }

    #[test]
    fn scattered_pages_are_all_taken() {
        let mut pool = PagePool::new(130);
        let all = take(&mut pool, 130);
        assert_eq!(pool.place_for(1), None);
        let mut even = Vec::new();
        for page in all {
            if page.number() % 2 == 0 { even.push(page) } else { pool.release(page) }
        }
        let odd = take(&mut pool, 65);
        assert_eq!(numbers(&odd), (0..65).map(|n| 2 * n + 1).collect::<Vec<_>>());
        assert!(odd.iter().zip(0..).all(|(page, n)| pool.gref(page) == GrantRef(n)));
        assert_eq!(pool.place_for(1), None);
        even.into_iter().chain(odd).for_each(|page| pool.release(page));
        assert_eq!(numbers(&take(&mut pool, 130)), (0..130).collect::<Vec<_>>());
    }

    #[test]
    fn empty_pool_has_no_page() {
        let mut pool = PagePool::new(0);
        assert!(pool.place_for(1).is_none() && pool.take(0, GrantRef(1)).is_none());
        assert!(pool.first_used().is_none());
    }

    #[test]
    fn first_pages_are_returned_once_and_only_after_a_use() {
        for (count, returned) in [(3, 3), (REGISTERED_MOST + 1, REGISTERED_MOST)] {
            let mut pool = PagePool::new(count);
            assert!(pool.first_used().is_none());
            let pages = take(&mut pool, 1);
            let memory = pool.first_used().unwrap();
            let base = pvio_ring::shm::SharedMemory::base(&pages[0]).as_ptr();
            assert_eq!((memory.base(), memory.len()), (base, returned * 4096));
            assert!(pool.first_used().is_none());
        }
    }
}
