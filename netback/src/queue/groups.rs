//! Which multicast groups a guest wants to hear.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Groups that a guest may name (Linux: `XEN_NETBK_MCAST_MAX`).
pub const GROUPS_MAX: usize = 64;

/// The groups of a vif, for all its queues.
#[derive(Debug)]
pub struct Groups {
    chosen: AtomicBool,
    /// Addresses, behind a bit that tells them from a free place.
    places: [AtomicU64; GROUPS_MAX],
    /// How often that changed.
    changes: AtomicU32,
}

const TAKEN: u64 = 1 << 63;

impl Default for Groups {
    fn default() -> Self {
        let places = core::array::from_fn(|_| AtomicU64::new(0));
        Self { chosen: AtomicBool::new(false), places, changes: AtomicU32::new(0) }
    }
}

impl Groups {
    /// Whether the guest has chosen to hear only the groups that it names
    /// (`request-multicast-control`); at first it has not, and hears all.
    pub fn choose(&self, chosen: bool) {
        self.chosen.store(chosen, Ordering::Relaxed);
    }

    /// The groups that the guest has named, in any order.
    #[must_use]
    pub fn named(&self) -> Vec<[u8; 6]> {
        let places = self.places.iter().map(|place| place.load(Ordering::Relaxed));
        let group = |word: u64| {
            let [_, _, a, b, c, d, e, f] = word.to_be_bytes();
            (word & TAKEN != 0).then_some([a, b, c, d, e, f])
        };
        places.filter_map(group).collect()
    }

    /// Adds a group, as the guest does; tells whether there was place for it. One that is there stays.
    pub fn add(&self, group: [u8; 6]) -> bool {
        let word = word(group);
        if self.has(word) {
            return true;
        }
        let added = self.places.iter().any(|place| {
            place.compare_exchange(0, word, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        });
        self.changes.fetch_add(added.into(), Ordering::Release);
        added
    }

    /// Removes a group, if it is there.
    pub(super) fn remove(&self, group: [u8; 6]) {
        let word = word(group);
        for place in &self.places {
            // Two queues may have added it at once, in two places.
            let taken = place.compare_exchange(word, 0, Ordering::Relaxed, Ordering::Relaxed);
            if taken.is_ok() {
                self.changes.fetch_add(1, Ordering::Release);
            }
        }
    }

    pub(super) fn changes(&self) -> u32 {
        self.changes.load(Ordering::Acquire)
    }

    /// Whether the guest wants a frame. Only groups are chosen: broadcast is for all.
    pub(super) fn wants(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else { return true };
        let group = to[0] & 1 == 1 && *to != [0xff; 6];
        !group || !self.chosen.load(Ordering::Relaxed) || self.has(word(*to))
    }

    fn has(&self, word: u64) -> bool {
        self.places.iter().any(|place| place.load(Ordering::Relaxed) == word)
    }
}

fn word([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | TAKEN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(n: u8) -> [u8; 6] {
        [1, 0, 0x5e, 0, 0, n]
    }

    #[test]
    fn what_is_wanted() {
        let groups = Groups::default();
        assert!(groups.wants(&group(1)), "nothing was chosen");
        groups.choose(true);
        assert!(!groups.wants(&group(1)));
        assert!(groups.add(group(1)) && groups.wants(&group(1)) && !groups.wants(&group(2)));
        for always in [[0xff; 6], [2, 0, 0, 0, 0, 1], [0; 6]] {
            assert!(groups.wants(&always));
        }
        groups.remove(group(1));
        groups.remove(group(2));
        assert!(!groups.wants(&group(1)));
    }

    #[test]
    fn no_more_than_there_is_place_for() {
        let groups = Groups::default();
        assert!((0..64).all(|n| groups.add(group(n))));
        assert!(!groups.add(group(64)) && groups.add(group(63)), "one that is there stays");
        groups.remove(group(7));
        assert!(groups.add(group(64)) && !groups.add(group(65)));
        let mut named = groups.named();
        named.sort_unstable();
        assert!(named.iter().copied().eq((0..65).filter(|n| *n != 7).map(group)));
        assert_eq!(groups.changes(), 66, "what changes nothing counts for nothing");
    }
}
