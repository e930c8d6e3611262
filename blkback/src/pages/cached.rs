//! The cache of persistent grants' mappings. When the cache is full, mappings that are in use stay,
//! further pages are mapped or copied for their request only, and mappings that have been idle for
//! long are evicted gradually.

use super::Buf;
use alloc::sync::Arc;
use core::time::Duration;
use pvio_grant_table::policy::{Keep, MappingBudget, MappingPermit};
use pvio_grant_table::{DomId, GrantRef};
use pvio_ring::shm::Either;

/// Interval between eviction passes, as in Linux's backend; also the resolution of the cache's
/// time.
const INTERVAL: Duration = Duration::from_millis(100);
/// Intervals after which an unused page is unmapped: 60 s, as in Linux's backend.
const UNUSED: u32 = 600;
/// Minimum idle times, in intervals, of pages that are evicted when the cache was full, longest
/// first. Pages used since the last pass are never evicted.
const IDLE: [u32; 3] = [100, 10, 1];
/// Divisor for the share of the cache that one pass evicts: 5 %, as in Linux's backend.
const PART: usize = 20;

/// Mapped pages of one frontend. A page that a request uses is shared with the request and is not
/// evicted.
#[derive(Debug)]
pub(super) struct CachedPages<M> {
    pages: Keep<Cached<M>>,
    budget: Arc<MappingBudget>,
    /// Maximum number of pages to evict in one pass to make room.
    step: usize,
    /// Whether a page could not be cached for want of room since the last pass that made room.
    wanted: bool,
    most: usize,
}

/// A cached mapping.
#[derive(Debug)]
struct Cached<M> {
    page: Arc<M>,
    /// Returned to the budget after the page is unmapped.
    _permit: MappingPermit,
}

impl<M> CachedPages<M> {
    /// Creates a cache of at most `most` pages, also limited by what is left of the budget.
    pub fn new(most: usize, budget: Arc<MappingBudget>) -> Self {
        Self { pages: Keep::new(most), budget, step: most.div_ceil(PART), wanted: false, most }
    }

    /// Returns the maximum number of cached mappings.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Returns the number of cached mappings.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Returns the page of a grant reference, if it is mapped.
    #[inline]
    pub fn get(&mut self, frontend: DomId, gref: GrantRef) -> Option<Arc<M>> {
        self.pages.get(frontend, gref).map(|cached| Arc::clone(&cached.page))
    }

    /// Reserves room for one more page in the cache and in the budget. Records if there was none.
    #[inline]
    pub fn room(&mut self) -> Option<MappingPermit> {
        let room = if self.pages.is_full() { None } else { self.budget.take() };
        self.wanted |= room.is_none();
        room
    }

    /// Inserts a newly mapped page for which room was reserved, and returns it for its first user.
    pub fn insert(
        &mut self,
        frontend: DomId,
        gref: GrantRef,
        page: M,
        room: MappingPermit,
    ) -> Buf<M> {
        let page = Arc::new(page);
        let cached = Cached { page: Arc::clone(&page), _permit: room };
        // If the insertion failed, the page would be unmapped when its user releases it.
        let _ = self.pages.insert(frontend, gref, cached);
        Either::B(Either::A(page))
    }

    /// Sets the current time, from an arbitrary origin. Once an [`INTERVAL`], unmaps pages that
    /// were unused for 60 s and, if room was wanted, some pages that were idle recently. Returns
    /// the number of pages unmapped.
    pub fn tick(&mut self, now: Duration) -> usize {
        let before = self.pages.now();
        let now = u32::try_from(now.as_millis() / INTERVAL.as_millis()).unwrap_or(u32::MAX);
        self.pages.set_now(now);
        let now = self.pages.now();
        if now == before {
            return 0;
        }
        let idle = |cached: &Cached<M>| Arc::strong_count(&cached.page) == 1;
        let mut gone = match now.checked_sub(UNUSED) {
            Some(long_ago) => self.pages.retire(long_ago, usize::MAX, idle),
            None => 0,
        };
        // Pages used since the last pass carry the time that was set then.
        if let Some(last) = before.checked_sub(1)
            && core::mem::take(&mut self.wanted)
        {
            for age in IDLE {
                let Some(since) = now.checked_sub(age) else { continue };
                gone += self.pages.retire(since.min(last), self.step.saturating_sub(gone), idle);
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const FRONT: DomId = DomId(2);

    impl CachedPages<u32> {
        /// Inserts a page and releases it, if there is room. Returns whether there was.
        fn put(&mut self, gref: u32) -> bool {
            let room = self.room();
            room.map(|room| drop(self.insert(FRONT, GrantRef(gref), gref, room))).is_some()
        }

        fn has(&mut self, gref: u32) -> bool {
            self.get(FRONT, GrantRef(gref)).is_some_and(|page| *page == gref)
        }
    }

    fn intervals(n: u32) -> Duration {
        INTERVAL * n
    }

    #[test]
    fn what_is_used_stays_and_what_is_not_makes_room_a_twentieth_at_a_time() {
        let mut kept = CachedPages::new(100, MappingBudget::unlimited());
        assert!((0..100).all(|gref| kept.put(gref)));
        // No room was wanted: nothing is evicted.
        assert_eq!((kept.tick(intervals(5)), kept.len()), (0, 100));
        for now in 6..50 {
            // The first fifty stay in use.
            assert!((0..50).all(|gref| kept.has(gref)), "{now}");
            let before = kept.len();
            let room = kept.put(1000 + now);
            assert_eq!(room, before < 100);
            // While there is room, nothing more is evicted.
            let gone = kept.tick(intervals(now));
            assert_eq!((gone, kept.len()), if room { (0, before + 1) } else { (5, 95) }, "{now}");
        }
        assert!((0..50).all(|gref| kept.has(gref)) && (1040..1049).any(|gref| kept.has(gref)));
    }

    #[test]
    fn where_all_is_used_nothing_goes() {
        let mut kept = CachedPages::new(3, MappingBudget::unlimited());
        assert!((1..=3).all(|gref| kept.put(gref)));
        for now in 1..100 {
            assert!(!kept.put(4));
            assert_eq!(kept.tick(intervals(now * 7)), 0, "{now}");
            assert!((1..=3).all(|gref| kept.has(gref)), "{now}");
        }
    }

    #[test]
    fn those_not_used_for_longest_go_first() {
        let (mut kept, mut ages) = (CachedPages::new(40, MappingBudget::unlimited()), Vec::new());
        // Number of intervals before the end at which each page is last used. Two pages are evicted
        // at a time.
        for (age, gref) in [5, 50, 250, 50, 5, 250].into_iter().zip(0..) {
            ages.push((age, gref));
        }
        ages.sort_by_key(|(age, _)| core::cmp::Reverse(*age));
        for (age, gref) in ages {
            kept.tick(intervals(300 - age));
            assert!(kept.put(gref));
        }
        assert!((100..134).all(|gref| kept.put(gref)) && !kept.put(200));
        assert_eq!(kept.tick(intervals(300)), 2);
        let left: Vec<u32> = (0..6).filter(|gref| kept.has(*gref)).collect();
        assert_eq!(left, [0, 1, 3, 4]);
    }

    #[test]
    fn budget_that_is_spent_is_as_no_room_and_what_goes_is_given_back() {
        let budget = MappingBudget::new(3);
        let [mut one, mut other] = [(); 2].map(|()| CachedPages::new(40, Arc::clone(&budget)));
        one.tick(intervals(1));
        assert!(one.put(1) && one.put(2) && other.put(3));
        one.tick(intervals(2));
        assert!(!one.put(4) && !other.put(5));
        // Eviction of idle pages makes room.
        assert_eq!((one.tick(intervals(300)), one.len(), budget.used()), (2, 0, 1));
        assert!(other.put(5));
        drop(other);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_a_request_uses_stays() {
        let mut kept = CachedPages::new(2, MappingBudget::unlimited());
        let room = kept.room().unwrap();
        let first = kept.insert(FRONT, GrantRef(1), 1, room);
        assert!(kept.put(2) && !kept.put(3));
        assert_eq!(kept.tick(intervals(UNUSED * 2)), 1);
        assert!(kept.has(1) && !kept.has(2));
        drop(first);
        assert_eq!(kept.tick(intervals(UNUSED * 4)), 1);
        assert_eq!(kept.len(), 0);
    }

    #[test]
    fn only_what_was_long_unused_expires() {
        let mut kept = CachedPages::new(8, MappingBudget::unlimited());
        assert!((1..=4).all(|gref| kept.put(gref)));
        kept.tick(intervals(UNUSED / 2));
        assert!(kept.has(2));
        assert_eq!(kept.tick(intervals(UNUSED - 1)), 0);
        assert_eq!(kept.tick(intervals(UNUSED)), 3);
        let left: Vec<u32> = (1..=4).filter(|gref| kept.has(*gref)).collect();
        assert_eq!(left, [2]);
    }
}
