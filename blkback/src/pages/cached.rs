//! The cache of persistent grants' mappings. When the cache is full, mappings that are in use stay,
//! further pages are mapped or copied for their request only, and mappings that have been idle for
//! long are evicted gradually.

use super::Buf;
use alloc::sync::Arc;
use core::time::Duration;
use pvio_grant_table::policy::{GrantCache, MappingBudget, MappingPermit};
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
    pages: GrantCache<Cached<M>>,
    budget: Arc<MappingBudget>,
    /// Maximum number of pages to evict in one pass to make room.
    step: usize,
    /// Whether a page could not be cached for want of room since the last pass that made room.
    lacked_room: bool,
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
    /// Creates a cache of at most `most` pages, also limited by the rest of the budget.
    pub fn new(most: usize, budget: Arc<MappingBudget>) -> Self {
        Self {
            pages: GrantCache::new(most),
            budget,
            step: most.div_ceil(PART),
            lacked_room: false,
            most,
        }
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
        self.lacked_room |= room.is_none();
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
            && core::mem::take(&mut self.lacked_room)
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
    fn full_cache_evicts_a_twentieth_of_idle_pages_at_a_time() {
        let mut cache = CachedPages::new(100, MappingBudget::unlimited());
        assert!((0..100).all(|gref| cache.put(gref)));
        // No room was wanted: nothing is evicted.
        assert_eq!((cache.tick(intervals(5)), cache.len()), (0, 100));
        for now in 6..50 {
            // The first fifty stay in use.
            assert!((0..50).all(|gref| cache.has(gref)), "{now}");
            let before = cache.len();
            let room = cache.put(1000 + now);
            assert_eq!(room, before < 100);
            // While there is room, nothing more is evicted.
            let gone = cache.tick(intervals(now));
            assert_eq!((gone, cache.len()), if room { (0, before + 1) } else { (5, 95) }, "{now}");
        }
        assert!((0..50).all(|gref| cache.has(gref)) && (1040..1049).any(|gref| cache.has(gref)));
    }

    #[test]
    fn pages_in_use_are_not_evicted_for_others() {
        let mut cache = CachedPages::new(3, MappingBudget::unlimited());
        assert!((1..=3).all(|gref| cache.put(gref)));
        for now in 1..100 {
            assert!(!cache.put(4));
            assert_eq!(cache.tick(intervals(now * 7)), 0, "{now}");
            assert!((1..=3).all(|gref| cache.has(gref)), "{now}");
        }
    }

    #[test]
    fn pages_idle_for_longest_are_evicted_first() {
        let (mut cache, mut ages) = (CachedPages::new(40, MappingBudget::unlimited()), Vec::new());
        // Number of intervals before the end at which each page is last used. Two pages are evicted
        // at a time.
        for (age, gref) in [5, 50, 250, 50, 5, 250].into_iter().zip(0..) {
            ages.push((age, gref));
        }
        ages.sort_by_key(|(age, _)| core::cmp::Reverse(*age));
        for (age, gref) in ages {
            cache.tick(intervals(300 - age));
            assert!(cache.put(gref));
        }
        assert!((100..134).all(|gref| cache.put(gref)) && !cache.put(200));
        assert_eq!(cache.tick(intervals(300)), 2);
        let left: Vec<u32> = (0..6).filter(|gref| cache.has(*gref)).collect();
        assert_eq!(left, [0, 1, 3, 4]);
    }

    #[test]
    fn used_up_budget_is_as_no_room_and_eviction_releases_it() {
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
    fn page_of_a_request_is_not_evicted() {
        let mut cache = CachedPages::new(2, MappingBudget::unlimited());
        let room = cache.room().unwrap();
        let first = cache.insert(FRONT, GrantRef(1), 1, room);
        assert!(cache.put(2) && !cache.put(3));
        assert_eq!(cache.tick(intervals(UNUSED * 2)), 1);
        assert!(cache.has(1) && !cache.has(2));
        drop(first);
        assert_eq!(cache.tick(intervals(UNUSED * 4)), 1);
        assert_eq!(cache.len(), 0);
    }

    #[test]
    fn only_pages_unused_for_long_expire() {
        let mut cache = CachedPages::new(8, MappingBudget::unlimited());
        assert!((1..=4).all(|gref| cache.put(gref)));
        cache.tick(intervals(UNUSED / 2));
        assert!(cache.has(2));
        assert_eq!(cache.tick(intervals(UNUSED - 1)), 0);
        assert_eq!(cache.tick(intervals(UNUSED)), 3);
        let left: Vec<u32> = (1..=4).filter(|gref| cache.has(*gref)).collect();
        assert_eq!(left, [2]);
    }
}
