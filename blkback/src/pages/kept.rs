//! Grants that stay mapped, found by their references; those not used for the longest time make
//! room for others.

use super::Buf;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_grant_table::GrantRef;
use pvio_ring::shm::Either;

/// How long a page that is not used stays mapped, as Linux's backend has it.
pub(crate) const UNUSED: Duration = Duration::from_secs(60);

/// No entry.
const NONE: u32 = u32::MAX;

/// Mapped pages of one frontend. A page in use by a request is shared with it and cannot go.
#[derive(Debug)]
pub(super) struct Kept<M> {
    entries: Vec<Entry<M>>,
    by_gref: BTreeMap<u32, u32>,
    /// Entries without a page.
    vacant: Vec<u32>,
    newest: u32,
    oldest: u32,
    most: usize,
    /// The time, as far as known; from an arbitrary beginning.
    pub now: Duration,
}

#[derive(Debug)]
struct Entry<M> {
    gref: u32,
    page: Option<Arc<M>>,
    used: Duration,
    newer: u32,
    older: u32,
}

impl<M> Kept<M> {
    /// Room for `most` pages.
    pub fn new(most: usize) -> Self {
        Self {
            entries: Vec::with_capacity(most),
            by_gref: BTreeMap::new(),
            vacant: Vec::with_capacity(most),
            newest: NONE,
            oldest: NONE,
            most,
            now: Duration::ZERO,
        }
    }

    /// How many are mapped.
    pub fn len(&self) -> usize {
        self.by_gref.len()
    }

    /// The page of a reference, if it is mapped; it is the one used last now.
    pub fn get(&mut self, gref: GrantRef) -> Option<Arc<M>> {
        let place = *self.by_gref.get(&gref.0)?;
        self.unlink(place);
        self.link(place);
        self.entry(place)?.page.clone()
    }

    /// Takes a page that was just mapped, and gives it to its first user. Not kept if there is no
    /// room, because requests use all there are, or if the reference is here already.
    pub fn insert(&mut self, gref: GrantRef, page: M) -> Buf<M> {
        if self.by_gref.contains_key(&gref.0) || (self.len() >= self.most && !self.evict()) {
            return Either::A(page);
        }
        let page = Arc::new(page);
        let entry = Entry {
            gref: gref.0,
            page: Some(Arc::clone(&page)),
            used: self.now,
            newer: NONE,
            older: NONE,
        };
        let place = match self.vacant.pop() {
            Some(place) => place,
            None => self.entries.len() as u32,
        };
        match self.entries.get_mut(place as usize) {
            Some(vacant) => *vacant = entry,
            None => self.entries.push(entry),
        }
        self.link(place);
        self.by_gref.insert(gref.0, place);
        Either::B(Either::A(page))
    }

    /// Unmaps what nobody has used for [`UNUSED`]; returns how many pages.
    pub fn expire(&mut self) -> usize {
        let Some(before) = self.now.checked_sub(UNUSED) else { return 0 };
        let (mut place, mut gone) = (self.oldest, 0);
        while let Some(entry) = self.entries.get(place as usize).filter(|e| e.used <= before) {
            let next = entry.newer;
            gone += usize::from(self.drop_unused(place));
            place = next;
        }
        gone
    }

    /// Unmaps the page that nobody uses and nobody has used for the longest time.
    fn evict(&mut self) -> bool {
        let mut place = self.oldest;
        while let Some(entry) = self.entries.get(place as usize) {
            let next = entry.newer;
            if self.drop_unused(place) {
                return true;
            }
            place = next;
        }
        false
    }

    fn drop_unused(&mut self, place: u32) -> bool {
        let Some(entry) = self.entries.get_mut(place as usize) else { return false };
        if entry.page.as_ref().is_none_or(|page| Arc::strong_count(page) > 1) {
            return false;
        }
        entry.page = None;
        let gref = entry.gref;
        self.by_gref.remove(&gref);
        self.unlink(place);
        self.vacant.push(place);
        true
    }

    fn entry(&mut self, place: u32) -> Option<&mut Entry<M>> {
        self.entries.get_mut(place as usize)
    }

    /// Takes an entry out of the order.
    fn unlink(&mut self, place: u32) {
        let Some(entry) = self.entry(place) else { return };
        let (newer, older) = (entry.newer, entry.older);
        match self.entry(newer) {
            Some(next) => next.older = older,
            None => self.newest = older,
        }
        match self.entry(older) {
            Some(next) => next.newer = newer,
            None => self.oldest = newer,
        }
    }

    /// Puts an entry in as the one used last.
    fn link(&mut self, place: u32) {
        let (now, last) = (self.now, self.newest);
        let Some(entry) = self.entry(place) else { return };
        (entry.used, entry.newer, entry.older) = (now, NONE, last);
        match self.entry(last) {
            Some(next) => next.newer = place,
            None => self.oldest = place,
        }
        self.newest = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refs(kept: &Kept<u32>) -> Vec<u32> {
        let (mut all, mut place) = (Vec::new(), kept.oldest);
        while let Some(entry) = kept.entries.get(place as usize) {
            assert!(entry.page.is_some());
            all.push(entry.gref);
            place = entry.newer;
        }
        assert_eq!(all.len(), kept.len());
        all
    }

    /// Keeps a page and lets go of it.
    fn put(kept: &mut Kept<u32>, gref: u32) {
        drop(kept.insert(GrantRef(gref), gref));
    }

    #[test]
    fn the_one_not_used_for_the_longest_time_goes_first() {
        let mut kept = Kept::new(3);
        (1..=3).for_each(|gref| put(&mut kept, gref));
        assert_eq!(kept.get(GrantRef(1)).as_deref(), Some(&1));
        put(&mut kept, 4);
        assert_eq!(refs(&kept), [3, 1, 4]);
        assert!(kept.get(GrantRef(2)).is_none());
        for gref in 100..1000 {
            put(&mut kept, gref);
            assert!(kept.entries.len() <= 3 && kept.len() <= 3);
        }
        assert_eq!(refs(&kept), [997, 998, 999]);
    }

    #[test]
    fn what_a_request_uses_stays() {
        let mut kept = Kept::new(2);
        let first = kept.insert(GrantRef(1), 1);
        put(&mut kept, 2);
        put(&mut kept, 3);
        assert_eq!(refs(&kept), [1, 3]);
        let third = kept.get(GrantRef(3)).unwrap();
        // No room: mapped for this request only.
        assert!(matches!(kept.insert(GrantRef(4), 4), Either::A(4)));
        kept.now = UNUSED * 2;
        assert_eq!((kept.expire(), kept.len()), (0, 2));
        drop((first, third));
        assert_eq!((kept.expire(), kept.len()), (2, 0));
        assert_eq!((kept.newest, kept.oldest), (NONE, NONE));
    }

    #[test]
    fn only_what_was_long_unused_expires() {
        let mut kept = Kept::new(8);
        (1..=4).for_each(|gref| put(&mut kept, gref));
        kept.now = UNUSED / 2;
        kept.get(GrantRef(2)).unwrap();
        kept.now = UNUSED;
        assert_eq!(kept.expire(), 3);
        assert_eq!(refs(&kept), [2]);
        put(&mut kept, 9);
        assert_eq!(refs(&kept), [2, 9]);
    }

    #[test]
    fn a_reference_mapped_twice_is_kept_once() {
        let mut kept = Kept::new(8);
        put(&mut kept, 1);
        assert!(matches!(kept.insert(GrantRef(1), 7), Either::A(7)));
        assert_eq!(kept.get(GrantRef(1)).as_deref(), Some(&1));
    }
}
