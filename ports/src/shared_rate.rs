//! A rate that several vifs have together, each as much of it as any other.
//!
//! Whoever sends takes from one bucket, and keeps count of what it took. It may be ahead of the
//! slowest of those who want to send at the moment by [`QUANTUM`] and no more; who wants nothing
//! holds nobody up, and does not save anything for later. All of that is atomic counters: a queue
//! looks at those of the others once a round, and nobody waits for a lock.
#![forbid(unsafe_code)]

use super::rate::{LOOK, Rate};
use super::setting::{Seen, Setting};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use pvio_netback::bucket::Bucket;

/// Bytes by which one may be ahead: two of the largest packets.
const QUANTUM: u64 = 128 * 1024;
/// Nanoseconds for which somebody who was refused counts as waiting after it was to ask again: it may
/// wake up late.
const WAITING: u64 = 20_000_000;

/// A rate that vifs share, each way by itself.
#[derive(Debug)]
pub struct SharedRate {
    rate: Rate,
    ways: [Arc<Way>; 2],
}

impl SharedRate {
    /// So many bytes a second, from all guests that share it, and to all of them.
    #[must_use]
    pub fn new(rate: Rate) -> Arc<Self> {
        Arc::new(Self { rate, ways: [Way::new(rate), Way::new(rate)] })
    }

    /// The rate.
    #[must_use]
    pub const fn rate(&self) -> Rate {
        self.rate
    }

    /// A vif joins, for as long as it keeps what it is given.
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
    /// Bytes taken, and given up by not wanting any.
    taken: AtomicU64,
    /// Until when it counts as waiting, since it was last refused.
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

/// A vif's part, in one direction; for all its queues.
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

/// A queue's view of it.
#[derive(Debug)]
pub(super) struct Part {
    membership: Arc<Membership>,
    members: Seen<Vec<Arc<Member>>>,
    /// How much the vif may have taken at most, as of the last look at the others.
    most: u64,
}

impl Part {
    pub fn of(membership: &Arc<Membership>) -> Self {
        let members = Seen::of(Arc::clone(&membership.way.members));
        Self { membership: Arc::clone(membership), members, most: u64::MAX }
    }

    /// Looks how far the others are.
    pub fn look(&mut self, now: u64) {
        self.members.look();
        let own = &self.membership.member;
        let others = self.members.get().iter().filter(|one| !Arc::ptr_eq(one, own));
        let least =
            others.filter(|one| one.waits(now)).map(|one| one.taken.load(Ordering::Relaxed));
        let Some(least) = least.min() else { return self.most = u64::MAX };
        if !own.waits(now) {
            // It wanted nothing for a while, which it cannot make up for now.
            own.taken.fetch_max(least, Ordering::Relaxed);
        }
        self.most = least.saturating_add(QUANTUM);
    }

    /// Until when nothing may be taken; `None` if something may.
    pub fn refused_until(&self, now: u64) -> Option<u64> {
        let Membership { way, member } = &*self.membership;
        let ahead = member.taken.load(Ordering::Relaxed) > self.most;
        // The others move on at any time.
        let turn = ahead.then(|| now.saturating_add(500_000));
        let until = way.bucket.empty_until(way.rate.pace(), now).max(turn)?;
        // Whoever sends sooner must not take it for one that wants nothing.
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

    /// Bytes that each of two has after so many seconds at 600 kB/s, by packets of 64 KB, if both
    /// sleep until they may ask again, and the first is always the first to wake up.
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
