//! Pages of our own, and whose data each holds.
//!
//! A request's pages lie one behind the other where that can be had: then they are one piece for
//! the kernel, however many they are.

use super::REGISTERED_MOST;
use alloc::vec::Vec;
use pvio_grant_table::GrantRef;
use pvio_ring::shm::{PoolMemory, PrivatePage};

/// Pages for each word of the map.
const WORD: usize = u64::BITS as usize;
/// Runs of free pages that are looked at for one that is long enough.
const LOOKS: usize = 16;

/// The private pages of one queue.
#[derive(Debug, Default)]
pub(super) struct PagePool {
    /// By number; `None` while in use.
    pages: Vec<Option<PrivatePage>>,
    /// A bit for each page that is free.
    free: Vec<u64>,
    /// By a page's number: which page of the guest's it stands for.
    grefs: Vec<GrantRef>,
    /// Where the first pages are, until that was asked for.
    unknown: Option<PoolMemory>,
    /// A page was used.
    used: bool,
}

impl PagePool {
    /// Makes as many pages, if there are none yet.
    pub fn fill(&mut self, count: usize) {
        if self.is_empty() {
            *self = Self::new(count);
        }
    }

    /// Whether there are no pages, free or in use.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// As many pages, all free. The system gives memory only for those that are used.
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
        let known = first.and_then(|page| page.stretch(count.min(REGISTERED_MOST)));
        Self { pages, free, grefs, unknown: known, used: false }
    }

    /// The memory of the first pages, which are used before others; once, when one was used: what
    /// nobody uses takes no memory.
    pub fn first_used(&mut self) -> Option<PoolMemory> {
        if self.used { self.unknown.take() } else { None }
    }

    /// The number of a free page that so many free ones begin with; or, if there are not so many
    /// together, of one that begins many.
    pub fn place_for(&self, count: usize) -> Option<usize> {
        let (mut best, mut most) = (None, 0);
        let mut from = 0;
        for _ in 0..LOOKS {
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

    /// Takes a page to stand for one of the guest's, if it is free.
    pub fn take(&mut self, number: usize, gref: GrantRef) -> Option<PrivatePage> {
        let page = self.pages.get_mut(number)?.take()?;
        *self.free.get_mut(number / WORD)? &= !(1 << (number % WORD));
        *self.grefs.get_mut(number)? = gref;
        self.used = true;
        Some(page)
    }

    /// Which page of the guest's a page stands for.
    pub fn gref(&self, page: &PrivatePage) -> GrantRef {
        self.grefs.get(page.number()).copied().unwrap_or_default()
    }

    pub fn give_back(&mut self, page: PrivatePage) {
        let number = page.number();
        let (Some(place), Some(word)) =
            (self.pages.get_mut(number), self.free.get_mut(number / WORD))
        else {
            return;
        };
        *place = Some(page);
        *word |= 1 << (number % WORD);
    }

    /// The first free pages that lie together, from a number on: the first of them, and how many;
    /// no more than `enough` are counted.
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

    /// Takes pages for a request of so many, as is done for copies; their numbers.
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
    fn a_request_has_pages_that_lie_together() {
        let mut pool = PagePool::new(200);
        let [a, b, c] = [64, 70, 11].map(|count| take(&mut pool, count));
        let ranges = [0..64, 64..134, 134..145];
        assert_eq!([&a, &b, &c].map(|pages| numbers(pages)), ranges.map(|r| r.collect::<Vec<_>>()));
        b.into_iter().for_each(|page| pool.give_back(page));
        let d = take(&mut pool, 60);
        assert_eq!(numbers(&d), (64..124).collect::<Vec<_>>());
        // Ten are free there, and it needs more.
        assert_eq!(numbers(&take(&mut pool, 12)), (145..157).collect::<Vec<_>>());
        assert_eq!(numbers(&take(&mut pool, 10)), (124..134).collect::<Vec<_>>());
        assert_eq!(
            (pool.place_for(1), pool.place_for(43), pool.place_for(44)),
            (Some(157), Some(157), Some(157))
        );
    }

    #[test]
    fn pages_that_lie_apart_are_all_had() {
        let mut pool = PagePool::new(130);
        let all = take(&mut pool, 130);
        assert_eq!(pool.place_for(1), None);
        let mut held = Vec::new();
        for page in all {
            if page.number() % 2 == 0 { held.push(page) } else { pool.give_back(page) }
        }
        let odd = take(&mut pool, 65);
        assert_eq!(numbers(&odd), (0..65).map(|n| 2 * n + 1).collect::<Vec<_>>());
        assert!(odd.iter().zip(0..).all(|(page, n)| pool.gref(page) == GrantRef(n)));
        assert_eq!(pool.place_for(1), None);
        held.into_iter().chain(odd).for_each(|page| pool.give_back(page));
        assert_eq!(numbers(&take(&mut pool, 130)), (0..130).collect::<Vec<_>>());
    }

    #[test]
    fn no_pages_at_all() {
        let mut pool = PagePool::new(0);
        assert!(pool.place_for(1).is_none() && pool.take(0, GrantRef(1)).is_none());
        assert!(pool.first_used().is_none());
    }

    #[test]
    fn its_first_pages_are_told_of_once_and_only_if_they_are_used() {
        for (count, told) in [(3, 3), (REGISTERED_MOST + 1, REGISTERED_MOST)] {
            let mut pool = PagePool::new(count);
            assert!(pool.first_used().is_none());
            let pages = take(&mut pool, 1);
            let memory = pool.first_used().unwrap();
            let base = pvio_ring::shm::SharedMemory::base(&pages[0]).as_ptr();
            assert_eq!((memory.base(), memory.len()), (base, told * 4096));
            assert!(pool.first_used().is_none());
        }
    }
}
