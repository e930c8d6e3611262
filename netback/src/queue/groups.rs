//! Which multicast groups a guest wants to hear.

use core::sync::atomic::{AtomicBool, Ordering};
use pvio_ring::shm::{HeapMemory, Region, SharedMemory};

/// Groups that a guest may name (Linux: `XEN_NETBK_MCAST_MAX`).
pub const GROUPS_MAX: usize = 64;

/// The groups of a vif, for all its queues. They stand in the in-flight record, so that each change is
/// recorded before its response is published.
#[derive(Debug)]
pub struct Groups<R = HeapMemory> {
    chosen: AtomicBool,
    /// Addresses, behind a bit that tells them from a free place.
    places: R,
}

const TAKEN: u64 = 1 << 63;

impl Default for Groups {
    /// Groups that do not outlive the process.
    fn default() -> Self {
        Self::new(HeapMemory::pages(1))
    }
}

impl<R: SharedMemory> Groups<R> {
    /// Bytes of the section that they stand in.
    pub const SECTION_LEN: usize = GROUPS_MAX * 8;

    /// The groups in a section: none, if it is full of zeros.
    #[must_use]
    pub fn new(section: R) -> Self {
        Self { chosen: AtomicBool::new(false), places: section }
    }

    /// Whether the guest has chosen to hear only the groups that it names
    /// (`request-multicast-control`); at first it has not, and hears all.
    pub fn choose(&self, chosen: bool) {
        self.chosen.store(chosen, Ordering::Relaxed);
    }

    /// Adds a group, as the guest does; tells whether there was place for it. One that is there stays.
    pub fn add(&self, group: [u8; 6]) -> bool {
        let word = word(group);
        self.has(word)
            || places().any(|place| self.places.compare_exchange_u64(place, 0, word) == Some(Ok(0)))
    }

    /// Removes a group, if it is there.
    pub(super) fn remove(&self, group: [u8; 6]) {
        let word = word(group);
        for place in places() {
            // Two queues may have added it at once, in two places.
            let _ = self.places.compare_exchange_u64(place, word, 0);
        }
    }

    /// Whether the guest wants a frame. Only groups are chosen: broadcast is for all.
    pub(super) fn wants(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else { return true };
        let group = to[0] & 1 == 1 && *to != [0xff; 6];
        !group || !self.chosen.load(Ordering::Relaxed) || self.has(word(*to))
    }

    fn has(&self, word: u64) -> bool {
        places().any(|place| self.places.load_u64(place, Ordering::Relaxed) == Some(word))
    }
}

/// Where each is.
fn places() -> impl Iterator<Item = usize> {
    (0..GROUPS_MAX).map(|place| place.saturating_mul(8))
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
        let section = HeapMemory::pages(1);
        let groups = Groups::new(section.clone());
        assert!((0..64).all(|n| groups.add(group(n))));
        assert!(!groups.add(group(64)) && groups.add(group(63)), "one that is there stays");
        groups.remove(group(7));
        assert!(groups.add(group(64)) && !groups.add(group(65)));
        groups.choose(true);
        assert!((0..66).filter(|n| groups.wants(&group(*n))).eq((0..65).filter(|n| *n != 7)));
        let others = Groups::new(section);
        others.choose(true);
        assert!(others.wants(&group(64)) && !others.wants(&group(7)), "they stay in their section");
    }
}
