//! Multicast groups whose packets a guest receives.

use core::sync::atomic::{AtomicBool, Ordering};
use pvio_ring::shm::{HeapMemory, Region, SharedMemory};

/// Largest number of groups that a guest may select (Linux: `XEN_NETBK_MCAST_MAX`).
pub const GROUPS_MAX: usize = 64;

/// Multicast groups of a vif, shared by its queues. They are stored in the in-flight record, so that
/// each change is recorded before its response is published.
#[derive(Debug)]
pub struct Groups<R = HeapMemory> {
    chosen: AtomicBool,
    /// Addresses, each with a flag bit that distinguishes it from an unused entry.
    places: R,
}

const TAKEN: u64 = 1 << 63;

impl Default for Groups {
    /// Returns an empty list in private memory, which is lost when the process ends.
    fn default() -> Self {
        Self::new(HeapMemory::pages(1))
    }
}

impl<R: SharedMemory> Groups<R> {
    /// Size of the section of the in-flight record, in bytes.
    pub const SECTION_LEN: usize = GROUPS_MAX * 8;

    /// Returns the groups stored in a section. A section of zeros holds none.
    #[must_use]
    pub fn new(section: R) -> Self {
        Self { chosen: AtomicBool::new(false), places: section }
    }

    /// Sets whether the guest receives only the multicast groups that it selected
    /// (`request-multicast-control`). Initially it receives all.
    pub fn set_filter(&self, chosen: bool) {
        self.chosen.store(chosen, Ordering::Relaxed);
    }

    /// Adds a group. Returns whether there was space for it. A group that is present already is not
    /// added again.
    pub fn add(&self, group: [u8; 6]) -> bool {
        let word = word(group);
        self.has(word)
            || places().any(|place| self.places.compare_exchange_u64(place, 0, word) == Some(Ok(0)))
    }

    /// Removes a group, if it is present.
    pub(super) fn remove(&self, group: [u8; 6]) {
        let word = word(group);
        for place in places() {
            // Two queues may have added it concurrently, in two entries.
            let _ = self.places.compare_exchange_u64(place, word, 0);
        }
    }

    /// Whether the guest receives a frame. The selection applies to multicast only; broadcast is always
    /// received.
    pub(super) fn wants(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else { return true };
        let group = to[0] & 1 == 1 && *to != [0xff; 6];
        !group || !self.chosen.load(Ordering::Relaxed) || self.has(word(*to))
    }

    fn has(&self, word: u64) -> bool {
        places().any(|place| self.places.load_u64(place, Ordering::Relaxed) == Some(word))
    }
}

/// Returns the offset of each entry.
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
    fn group_filter_when_enabled_passes_added_groups_broadcast_and_unicast() {
        let groups = Groups::default();
        assert!(groups.wants(&group(1)), "filter is disabled");
        groups.set_filter(true);
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
    fn group_filter_rejects_65th_group_and_persists_in_its_section() {
        let section = HeapMemory::pages(1);
        let groups = Groups::new(section.clone());
        assert!((0..64).all(|n| groups.add(group(n))));
        assert!(
            !groups.add(group(64)) && groups.add(group(63)),
            "group that is already present is accepted"
        );
        groups.remove(group(7));
        assert!(groups.add(group(64)) && !groups.add(group(65)));
        groups.set_filter(true);
        assert!((0..66).filter(|n| groups.wants(&group(*n))).eq((0..65).filter(|n| *n != 7)));
        let others = Groups::new(section);
        others.set_filter(true);
        assert!(
            others.wants(&group(64)) && !others.wants(&group(7)),
            "groups are restored from their section"
        );
    }
}
