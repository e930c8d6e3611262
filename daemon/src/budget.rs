//! The budget of one device on the thread that all devices share.

use pvio_runtime::bucket::{BucketRate, TokenBucket};
use std::time::{Duration, Instant};

/// Capacity of the bucket in steps and transitions: enough for several reconnections of a guest
/// that boots through firmware and a boot loader.
const BURST: u64 = 100;
/// Steps and transitions per second.
const PER_SECOND: u64 = 20;

/// A token bucket: a step costs one token, and each transition in it another one.
#[derive(Clone, Debug)]
pub struct Budget {
    bucket: TokenBucket,
    created: Instant,
}

impl Budget {
    /// Returns a full bucket.
    pub const fn new(now: Instant) -> Self {
        Self { bucket: TokenBucket::new(), created: now }
    }

    /// Spends tokens.
    pub fn spend(&self, now: Instant, tokens: u64) {
        self.bucket.take(rate(), tokens.min(BURST), self.time(now));
    }

    /// Returns when the next token is available.
    pub fn next(&self, now: Instant) -> Instant {
        let next = self.bucket.available_at(rate(), 1, self.time(now));
        next.map_or(now, |next| self.created + next)
    }

    /// Returns the number of tokens spent, and the capacity.
    pub fn spent(&self, now: Instant) -> (u64, u64) {
        (self.bucket.taken(rate(), self.time(now)), BURST)
    }

    fn time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.created)
    }
}

fn rate() -> BucketRate {
    BucketRate::per_second(PER_SECOND, BURST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_budget_permits_burst_and_then_fixed_rate() {
        let mut now = Instant::now();
        let budget = Budget::new(now);
        for _ in 0..BURST {
            assert_eq!(budget.next(now), now);
            budget.spend(now, 1);
        }
        for _ in 0..3 {
            let next = budget.next(now);
            assert_eq!(next - now, Duration::from_secs(1) / PER_SECOND as u32);
            now = next;
            budget.spend(now, 1);
        }
        // A step with many transitions causes a longer pause.
        budget.spend(now, 9);
        assert_eq!(budget.next(now) - now, Duration::from_secs(10) / PER_SECOND as u32);
        now += Duration::from_secs(3600);
        assert_eq!(budget.next(now), now);
        budget.spend(now, BURST - 1);
        assert_eq!(budget.next(now), now, "budget is limited to a burst");
        budget.spend(now, 1);
        assert!(budget.next(now) > now);
        assert_eq!(budget.spent(now), (100, 100));
        assert_eq!(budget.spent(now + Duration::from_secs(2)), (60, 100));
    }
}
