use crate::{DomId, GrantRef};
use alloc::vec::Vec;
use core::fmt;

/// No entry.
const NONE: u32 = u32::MAX;
/// 2³² divided by the golden ratio: distributes consecutive references evenly, whatever their
/// stride.
const SPREAD: u32 = 0x9E37_79B9;

/// A cache of bounded size for data about other domains' pages. The key is the granting domain and
/// the reference; each entry has the time of its last use. All memory is allocated at creation.
///
/// A peer chooses its references, and can choose some with the same hash. The worst case is a scan
/// of the whole cache, in the thread that serves that peer.
pub struct GrantCache<T> {
    /// First entry of the chain of each hash; the number of chains is a power of two.
    heads: Vec<u32>,
    entries: Vec<Entry<T>>,
    most: usize,
    /// The entry that `retire` checks next.
    hand: usize,
    now: u32,
}

struct Entry<T> {
    peer: DomId,
    gref: GrantRef,
    /// Next entry of the chain.
    next: u32,
    used: u32,
    value: T,
}

impl<T> GrantCache<T> {
    /// Creates a cache of at most `most` entries.
    ///
    /// # Panics
    /// If `most` does not fit into 31 bits.
    #[must_use]
    pub fn new(most: usize) -> Self {
        assert!(most <= i32::MAX as usize, "more than anybody has grants");
        let heads = if most == 0 { 0 } else { most.next_power_of_two() };
        let entries = Vec::with_capacity(most);
        Self { heads: core::iter::repeat_n(NONE, heads).collect(), entries, most, hand: 0, now: 0 }
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns whether the maximum number of entries is reached.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.entries.len() >= self.most
    }

    /// Returns the current time, in units chosen by the caller; it is the time of use of entries
    /// accessed now.
    #[must_use]
    pub fn now(&self) -> u32 {
        self.now
    }

    /// Sets the current time, which never decreases.
    pub fn set_now(&mut self, now: u32) {
        self.now = self.now.max(now);
    }

    /// Returns the entry of a page, and marks it as used now.
    #[inline]
    pub fn get(&mut self, peer: DomId, gref: GrantRef) -> Option<&mut T> {
        let at = self.find(peer, gref)?;
        let entry = self.entries.get_mut(at as usize)?;
        entry.used = self.now;
        Some(&mut entry.value)
    }

    /// Adds an entry for a page, and marks it as used now.
    ///
    /// # Errors
    /// Returns `value` if the cache is full, or if the page has an entry.
    pub fn insert(&mut self, peer: DomId, gref: GrantRef, value: T) -> Result<(), T> {
        if self.is_full() || self.find(peer, gref).is_some() {
            return Err(value);
        }
        let at = self.entries.len() as u32;
        let hash = self.hash(peer, gref);
        let Some(head) = self.heads.get_mut(hash) else { return Err(value) };
        let next = core::mem::replace(head, at);
        self.entries.push(Entry { peer, gref, next, used: self.now, value });
        Ok(())
    }

    /// Removes the entry of a page.
    pub fn remove(&mut self, peer: DomId, gref: GrantRef) -> Option<T> {
        let at = self.find(peer, gref)?;
        self.take(at)
    }

    /// Removes up to `count` entries that were last used at `before` or earlier and for which `may`
    /// returns `true`; returns their number. Each entry is checked at most once, starting where the
    /// previous call stopped.
    pub fn retire(&mut self, before: u32, count: usize, mut may: impl FnMut(&T) -> bool) -> usize {
        let mut removed = 0_usize;
        for _ in 0..self.entries.len() {
            if removed >= count {
                break;
            }
            if self.hand >= self.entries.len() {
                self.hand = 0;
            }
            let Some(entry) = self.entries.get(self.hand) else { break };
            if entry.used <= before && may(&entry.value) {
                // The last entry moves to this position, and is checked next.
                drop(self.take(self.hand as u32));
                removed = removed.saturating_add(1);
            } else {
                self.hand = self.hand.saturating_add(1);
            }
        }
        removed
    }

    #[inline]
    fn hash(&self, peer: DomId, gref: GrantRef) -> usize {
        let spread = (gref.0 ^ u32::from(peer.0).rotate_left(16)).wrapping_mul(SPREAD);
        // The upper bits are the best mixed ones.
        let bits = self.heads.len().trailing_zeros();
        spread.checked_shr(32_u32.saturating_sub(bits)).unwrap_or(0) as usize
    }

    #[inline]
    fn find(&self, peer: DomId, gref: GrantRef) -> Option<u32> {
        let mut at = *self.heads.get(self.hash(peer, gref))?;
        loop {
            let entry = self.entries.get(at as usize)?;
            if entry.gref == gref && entry.peer == peer {
                return Some(at);
            }
            at = entry.next;
        }
    }

    /// Removes an entry; the last one moves to its position.
    fn take(&mut self, at: u32) -> Option<T> {
        let next = self.entries.get(at as usize)?.next;
        *self.link_to(at)? = next;
        let last = self.entries.len().saturating_sub(1) as u32;
        if at != last {
            *self.link_to(last)? = at;
        }
        Some(self.entries.swap_remove(at as usize).value)
    }

    /// Returns the link to an entry: the head of its chain, or the `next` of the entry before it.
    fn link_to(&mut self, place: u32) -> Option<&mut u32> {
        let entry = self.entries.get(place as usize)?;
        let hash = self.hash(entry.peer, entry.gref);
        let mut at = *self.heads.get(hash)?;
        if at == place {
            return self.heads.get_mut(hash);
        }
        loop {
            let next = self.entries.get(at as usize)?.next;
            if next == place {
                return self.entries.get_mut(at as usize).map(|entry| &mut entry.next);
            }
            at = next;
        }
    }
}

impl<T> fmt::Debug for GrantCache<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantCache").field("len", &self.len()).field("most", &self.most).finish()
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, reason = "tests")]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;

    const PEER: DomId = DomId(7);

    fn put(keep: &mut GrantCache<u32>, gref: u32) -> Result<(), u32> {
        keep.insert(PEER, GrantRef(gref), gref)
    }

    fn get(keep: &mut GrantCache<u32>, gref: u32) -> Option<u32> {
        keep.get(PEER, GrantRef(gref)).copied()
    }

    #[test]
    fn table_behaves_as_bounded_map() {
        let mut seed = 1_u32;
        let mut random = |below: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % below
        };
        for most in [1, 2, 3, 64, 100] {
            let (mut keep, mut map) = (GrantCache::new(most), BTreeMap::new());
            for turn in 0..20_000 {
                // References of two domains, some far apart.
                let peer = DomId(random(2) as u16);
                let gref = GrantRef(random(150) << (random(2) * 24));
                match random(4) {
                    0 => assert_eq!(keep.remove(peer, gref), map.remove(&(peer.0, gref))),
                    1 => {
                        let room = map.len() < most && !map.contains_key(&(peer.0, gref));
                        assert_eq!(keep.insert(peer, gref, turn).is_ok(), room);
                        if room {
                            map.insert((peer.0, gref), turn);
                        }
                    }
                    _ => {
                        assert_eq!(keep.get(peer, gref).copied(), map.get(&(peer.0, gref)).copied())
                    }
                }
                assert_eq!((keep.len(), keep.is_full()), (map.len(), map.len() == most));
            }
            for ((peer, gref), value) in map {
                assert_eq!(keep.remove(DomId(peer), gref), Some(value));
            }
            assert!(keep.is_empty() && keep.heads.iter().all(|head| *head == NONE));
        }
    }

    #[test]
    fn retire_removes_only_entries_unused_since_and_at_most_limit() {
        let mut keep = GrantCache::new(8);
        (0..8).for_each(|gref| put(&mut keep, gref).unwrap());
        assert_eq!(put(&mut keep, 8), Err(8), "no room");
        keep.set_now(5);
        assert_eq!([2, 3].map(|gref| get(&mut keep, gref)), [Some(2), Some(3)]);
        keep.set_now(4);
        assert_eq!(keep.now(), 5, "clock is monotonic");
        assert_eq!(keep.retire(4, 2, |_| true), 2);
        assert_eq!((keep.len(), keep.is_full()), (6, false));
        // Removes 0, and 7, which moved to its position; then those of 1, 4, 5 and 6 that may be
        // removed.
        assert_eq!(keep.retire(4, 8, |gref| *gref > 4), 2);
        assert_eq!(keep.retire(4, 8, |_| true), 2);
        assert_eq!([2, 3].map(|gref| get(&mut keep, gref)), [Some(2), Some(3)]);
        assert_eq!((keep.retire(5, 8, |_| true), keep.len()), (2, 0));
    }

    #[test]
    fn table_hash_chains_stay_short_for_strided_references() {
        for stride in [1, 2, 3, 8, 11, 64, 512, 4096] {
            let mut keep = GrantCache::new(1024);
            (0..1024).for_each(|n| put(&mut keep, 8 + n * stride).unwrap());
            let mut longest = 0;
            for head in &keep.heads {
                let (mut at, mut length) = (*head, 0);
                while let Some(entry) = keep.entries.get(at as usize) {
                    (at, length) = (entry.next, length + 1);
                }
                longest = longest.max(length);
            }
            assert!(longest <= 4, "stride {stride}: {longest}");
        }
    }

    #[test]
    fn table_of_capacity_0_rejects_insert() {
        let mut keep = GrantCache::new(0);
        assert_eq!((put(&mut keep, 1), get(&mut keep, 1)), (Err(1), None));
        assert_eq!(keep.retire(9, 9, |_| true), 0);
    }
}
