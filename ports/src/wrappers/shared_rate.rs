//! A rate that several vifs share equally.
//!
//! All vifs take from one bucket, and each counts the bytes that it took. A vif may be ahead of the
//! slowest vif that is waiting by at most [`QUANTUM`]. A vif that has nothing to send does not
//! delay the others and does not accumulate credit. The counters are atomic: a queue reads those of
//! the other vifs once per round, and no lock is taken.
#![forbid(unsafe_code)]

use super::rate::{LOOK, Rate};
use crate::setting::{Seen, Setting};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use pvio_netback::bucket::Bucket;

/// Number of bytes by which a vif may be ahead: two of the largest packets.
const QUANTUM: u64 = 128 * 1024;
/// Time in nanoseconds for which a vif still counts as waiting after the time at which it was to
/// retry, since it may wake up late.
const WAITING: u64 = 20_000_000;

/// Rate that vifs share, separately for each direction.
#[derive(Debug)]
pub struct SharedRate {
    rate: Rate,
    ways: [Arc<Way>; 2],
}

impl SharedRate {
    /// Creates a shared rate, which applies to the sum of all vifs, separately for each direction.
    #[must_use]
    pub fn new(rate: Rate) -> Arc<Self> {
        Arc::new(Self { rate, ways: [Way::new(rate), Way::new(rate)] })
    }

    /// Returns the rate.
    #[must_use]
    pub const fn rate(&self) -> Rate {
        self.rate
    }

    /// Adds a vif, until the returned memberships are dropped. Returns one for each direction.
    pub(super) fn join(&self) -> [Membership; 2] {
        self.ways.each_ref().map(Way::join)
    }
}

#[derive(Debug)]
struct Way {
    rate: Rate,
    bucket: Bucket,
    members: Arc<Setting<Vec<Arc<Member>>>>,
}

#[derive(Debug, Default)]
struct Member {
    /// Number of bytes taken, plus those forfeited while the vif had nothing to send.
    taken: AtomicU64,
    /// Time until which the vif counts as waiting, set when it was last refused.
    waiting: AtomicU64,
}

impl Member {
    fn waits(&self, now: u64) -> bool {
        self.waiting.load(Ordering::Relaxed) > now
    }
}

impl Way {
    fn new(rate: Rate) -> Arc<Self> {
        Arc::new(Self { rate, bucket: Bucket::default(), members: Setting::new(Vec::new()) })
    }

    fn join(self: &Arc<Self>) -> Membership {
        let member = Arc::new(Member::default());
        self.members.update(|all| all.iter().chain([&member]).map(Arc::clone).collect());
        Membership { way: Arc::clone(self), member }
    }
}

/// Membership of a vif in one direction, shared by its queues.
#[derive(Debug)]
pub(super) struct Membership {
    way: Arc<Way>,
    member: Arc<Member>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        let others = |all: &Vec<Arc<Member>>| {
            let others = all.iter().filter(|one| !Arc::ptr_eq(one, &self.member));
            others.map(Arc::clone).collect()
        };
        self.way.members.update(others);
    }
}

/// View of one queue on the membership.
#[derive(Debug)]
pub(super) struct Part {
    membership: Arc<Membership>,
    members: Seen<Vec<Arc<Member>>>,
    /// Largest number of bytes that the vif may have taken, as of the last update.
    most: u64,
}

impl Part {
    pub fn of(membership: &Arc<Membership>) -> Self {
        let members = Seen::of(Arc::clone(&membership.way.members));
        Self { membership: Arc::clone(membership), members, most: u64::MAX }
    }

    /// Updates the bound from the counters of the other vifs.
    pub fn look(&mut self, now: u64) {
        self.members.look();
        let own = &self.membership.member;
        let others = self.members.get().iter().filter(|one| !Arc::ptr_eq(one, own));
        let least =
            others.filter(|one| one.waits(now)).map(|one| one.taken.load(Ordering::Relaxed));
        let Some(least) = least.min() else { return self.most = u64::MAX };
        if !own.waits(now) {
            // The vif had nothing to send; it forfeits the bytes that it did not take in that time.
            own.taken.fetch_max(least, Ordering::Relaxed);
        }
        self.most = least.saturating_add(QUANTUM);
    }

    /// Returns the time until which nothing may be taken, or `None` if bytes may be taken.
    pub fn refused_until(&self, now: u64) -> Option<u64> {
        let Membership { way, member } = &*self.membership;
        let ahead = member.taken.load(Ordering::Relaxed) > self.most;
        // The other vifs may advance at any time, so retry soon.
        let turn = ahead.then(|| now.saturating_add(500_000));
        let until = way.bucket.empty_until(way.rate.pace(), now).max(turn)?;
        // Bounded, so that a vif that sends earlier still sees this one as waiting.
        let until = until.min(now.saturating_add(LOOK));
        member.waiting.store(until.saturating_add(WAITING), Ordering::Relaxed);
        Some(until)
    }

    pub fn take(&self, bytes: u64, now: u64) {
        let Membership { way, member } = &*self.membership;
        way.bucket.take(way.rate.pace(), bytes, now);
        member.taken.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the bytes that each of two vifs has sent after some seconds at 600 kB/s, in packets
    /// of 64 KB. Both sleep until their time to retry, and the first always wakes up first.
    fn taken(seconds: u64) -> [u64; 2] {
        let share = SharedRate::new(Rate { per_second: 600_000, burst: QUANTUM });
        let parts = [share.join(), share.join()].map(|[tx, _]| Arc::new(tx));
        let mut parts = parts.each_ref().map(Part::of);
        let (mut now, mut taken, mut asks) = (1, [0; 2], [1; 2]);
        while now < seconds * 1_000_000_000 {
            for ((part, taken), asks) in parts.iter_mut().zip(&mut taken).zip(&mut asks) {
                if *asks > now {
                    continue;
                }
                part.look(now);
                match part.refused_until(now) {
                    Some(until) => *asks = until,
                    None => {
                        part.take(64_000, now);
                        *taken += 64_000;
                    }
                }
            }
            now = asks.iter().copied().min().unwrap_or_default().max(now);
        }
        taken
    }

    #[test]
    fn who_wakes_up_first_has_no_more_than_others() {
        let [first, second] = taken(20);
        assert!((11_900_000..12_300_000).contains(&(first + second)), "{first} {second}");
        assert!(first.abs_diff(second) <= QUANTUM + 64_000, "{first} {second}");
    }
}
