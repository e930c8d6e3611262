//! A rate that several vifs share equally.
//!
//! All vifs take from one bucket, and each counts the bytes that it took. A vif may be ahead of the
//! slowest vif that is waiting by at most [`QUANTUM`]. A vif that has nothing to send does not
//! delay the others and does not accumulate credit. The counters are atomic: a queue reads those of
//! the other vifs once per round, and no lock is taken.
#![forbid(unsafe_code)]

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use pvio_runtime::{BucketRate, Setting, SettingReader, TokenBucket};

/// Largest interval at which a waiting queue checks for changed limits.
pub(super) const LIMIT_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Number of bytes by which a vif may be ahead: two of the largest packets.
const QUANTUM: u64 = 128 * 1024;
/// Time for which a vif still counts as waiting after the time at which it was to
/// retry, since it may wake up late.
const WAITING: Duration = Duration::from_millis(20);
/// Interval at which a vif that is ahead checks the others.
const CHECK_INTERVAL: Duration = Duration::from_micros(500);

/// Rate that vifs share, separately for each direction.
#[derive(Debug)]
pub struct SharedRate {
    rate: BucketRate,
    directions: [Arc<SharedDirection>; 2],
}

impl SharedRate {
    /// Creates a shared rate, which applies to the sum of all vifs, separately for each direction.
    #[must_use]
    pub fn new(rate: BucketRate) -> Arc<Self> {
        Arc::new(Self {
            rate,
            directions: [SharedDirection::new(rate), SharedDirection::new(rate)],
        })
    }

    /// Returns the rate.
    #[must_use]
    pub const fn rate(&self) -> BucketRate {
        self.rate
    }

    /// Adds a vif, until the returned memberships are dropped. Returns one for each direction.
    pub(super) fn join(&self) -> [Membership; 2] {
        self.directions.each_ref().map(SharedDirection::join)
    }
}

#[derive(Debug)]
struct SharedDirection {
    rate: BucketRate,
    bucket: TokenBucket,
    members: Arc<Setting<Vec<Arc<Member>>>>,
}

#[derive(Debug, Default)]
struct Member {
    /// Number of bytes taken, plus those forfeited while the vif had nothing to send.
    taken: AtomicU64,
    /// Time in nanoseconds until which the vif counts as waiting, set when it was last refused.
    waiting: AtomicU64,
}

impl Member {
    fn waits(&self, now: Duration) -> bool {
        self.waiting.load(Ordering::Relaxed) > nanos(now)
    }
}

impl SharedDirection {
    fn new(rate: BucketRate) -> Arc<Self> {
        Arc::new(Self { rate, bucket: TokenBucket::new(), members: Setting::new(Vec::new()) })
    }

    fn join(self: &Arc<Self>) -> Membership {
        let member = Arc::new(Member::default());
        self.members.update(|all| all.iter().chain([&member]).map(Arc::clone).collect());
        Membership { direction: Arc::clone(self), member }
    }
}

/// Membership of a vif in one direction, shared by its queues.
#[derive(Debug)]
pub(super) struct Membership {
    direction: Arc<SharedDirection>,
    member: Arc<Member>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        let others = |all: &Vec<Arc<Member>>| {
            let others = all.iter().filter(|one| !Arc::ptr_eq(one, &self.member));
            others.map(Arc::clone).collect()
        };
        self.direction.members.update(others);
    }
}

/// View of one queue on the membership.
#[derive(Debug)]
pub(super) struct Part {
    membership: Arc<Membership>,
    members: SettingReader<Vec<Arc<Member>>>,
    /// Largest number of bytes that the vif may have taken, as of the last update.
    most: u64,
}

impl Part {
    pub fn of(membership: &Arc<Membership>) -> Self {
        let members = SettingReader::new(&membership.direction.members);
        Self { membership: Arc::clone(membership), members, most: u64::MAX }
    }

    /// Updates the bound from the counters of the other vifs.
    pub fn update(&mut self, now: Duration) {
        self.members.refresh();
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
    pub fn refused_until(&self, now: Duration) -> Option<Duration> {
        let Membership { direction, member } = &*self.membership;
        let ahead = member.taken.load(Ordering::Relaxed) > self.most;
        // The other vifs may advance at any time, so retry soon.
        let retry = ahead.then(|| now.saturating_add(CHECK_INTERVAL));
        let until = direction.bucket.in_debt_until(direction.rate, now).max(retry)?;
        // Bounded, so that a vif that sends earlier still sees this one as waiting.
        let until = until.min(now.saturating_add(LIMIT_CHECK_INTERVAL));
        member.waiting.store(nanos(until.saturating_add(WAITING)), Ordering::Relaxed);
        Some(until)
    }

    pub fn take(&self, bytes: u64, now: Duration) {
        let Membership { direction, member } = &*self.membership;
        direction.bucket.take(direction.rate, bytes, now);
        member.taken.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the bytes that each of two vifs has sent after some seconds at 600 kB/s, in packets
    /// of 64 KB. Both sleep until their time to retry, and the first always wakes up first.
    fn taken(seconds: u64) -> [u64; 2] {
        let share = SharedRate::new(BucketRate::per_second(600_000, QUANTUM));
        let parts = [share.join(), share.join()].map(|[tx, _]| Arc::new(tx));
        let mut parts = parts.each_ref().map(Part::of);
        let first = Duration::from_nanos(1);
        let (mut now, mut taken, mut asks) = (first, [0; 2], [first; 2]);
        while now < Duration::from_secs(seconds) {
            for ((part, taken), asks) in parts.iter_mut().zip(&mut taken).zip(&mut asks) {
                if *asks > now {
                    continue;
                }
                part.update(now);
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
    fn shared_rate_gives_equal_parts_whichever_wakes_first() {
        let [first, second] = taken(20);
        assert!((11_900_000..12_300_000).contains(&(first + second)), "{first} {second}");
        assert!(first.abs_diff(second) <= QUANTUM + 64_000, "{first} {second}");
    }
}
