//! The address table: the member of each station, learned from source addresses, with a lifetime.
//!
//! A guest may send with any source address, so the table has a fixed size. A guest may use at most
//! [`SHARE`] of the [`WAYS`] entries that an address can be stored in, so that it cannot evict all
//! other stations. Packets to unknown addresses are sent to all members.
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const SETS: usize = 256;
const WAYS: usize = 8;
const SHARE: usize = 2;
/// Lifetime of an entry in seconds, since its last packet (as in Linux's bridge).
const AGE: u32 = 300;

#[derive(Debug, Default)]
struct Place {
    /// Address in the upper 48 bits, member in the lower 16; 0 means unused.
    word: AtomicU64,
    /// Time of the last packet, in seconds.
    heard: AtomicU32,
}

#[derive(Debug)]
pub(super) struct Table(Box<[[Place; WAYS]]>);

impl Default for Table {
    fn default() -> Self {
        Self(core::iter::repeat_with(Default::default).take(SETS).collect())
    }
}

impl Table {
    /// Stores that `member`, which is not 0, has sent a packet from this address.
    pub fn learn(&self, mac: [u8; 6], member: u16, now: u32) {
        let word = word(mac) | u64::from(member);
        let Some(set) = self.set(mac) else { return };
        let mut own = (0_usize, None);
        let (mut oldest, mut age) = (None, 0);
        for place in set {
            let found = place.word.load(Ordering::Relaxed);
            let heard = place.heard.load(Ordering::Relaxed);
            if found >> 16 == word >> 16 {
                // The station is known; it may have moved to another member.
                if found != word {
                    place.word.store(word, Ordering::Relaxed);
                }
                if heard != now {
                    place.heard.store(now, Ordering::Relaxed);
                }
                return;
            }
            let forgotten = found == 0 || heard.saturating_add(AGE) < now;
            let old = if forgotten { u32::MAX } else { now.saturating_sub(heard) };
            if !forgotten && found & 0xffff == u64::from(member) {
                own = (own.0.saturating_add(1), Some(place));
            }
            if oldest.is_none() || old > age {
                (oldest, age) = (Some(place), old);
            }
        }
        let at = if own.0 >= SHARE { own.1 } else { oldest };
        if let Some(place) = at {
            place.word.store(word, Ordering::Relaxed);
            place.heard.store(now, Ordering::Relaxed);
        }
    }

    /// Returns the member of an address, if it is known.
    pub fn find(&self, mac: [u8; 6], now: u32) -> Option<u16> {
        let word = word(mac);
        let known = |place: &&Place| place.word.load(Ordering::Relaxed) >> 16 == word >> 16;
        let place = self.set(mac)?.iter().find(known)?;
        let fresh = place.heard.load(Ordering::Relaxed).saturating_add(AGE) >= now;
        fresh.then_some(place.word.load(Ordering::Relaxed) as u16)
    }

    fn set(&self, mac: [u8; 6]) -> Option<&[Place; WAYS]> {
        // Many addresses have the same vendor part, so they are hashed with a multiplication
        // (Fibonacci hashing).
        let hash = word(mac).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        self.0.get(usize::try_from(hash).ok()?)
    }
}

fn word([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_be_bytes([a, b, c, d, e, f, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn station(n: u32) -> [u8; 6] {
        let [a, b, c, d] = n.to_be_bytes();
        [2, 0, a, b, c, d]
    }

    #[test]
    fn mac_table_learns_moves_and_expires_stations() {
        let table = Table::default();
        assert_eq!(table.find(station(1), 5), None);
        table.learn(station(1), 7, 5);
        table.learn(station(2), 9, 5);
        assert_eq!((table.find(station(1), 5), table.find(station(2), 5)), (Some(7), Some(9)));
        table.learn(station(1), 8, 6);
        assert_eq!((table.find(station(1), 306), table.find(station(2), 306)), (Some(8), None));
        assert_eq!(table.find(station(1), 307), None);
    }

    #[test]
    fn mac_table_flooded_by_one_member_keeps_other_stations() {
        let table = Table::default();
        (0..100).for_each(|n| table.learn(station(n), 3, 10));
        (1000..1_000_000).for_each(|n| table.learn(station(n), 4, 11));
        let known = (0..100).filter(|n| table.find(station(*n), 12) == Some(3)).count();
        assert!(known >= 90, "{known}");
    }
}
