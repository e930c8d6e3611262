//! The budget of one device on the thread that all devices share.

use std::time::{Duration, Instant};

/// Capacity of the bucket in steps and transitions: enough for several reconnections of a guest
/// that boots through firmware and a boot loader.
const BURST: i64 = 100;
/// Steps and transitions per second.
const PER_SECOND: i64 = 20;
const NANOS: i64 = 1_000_000_000;

/// A token bucket: a step costs one token, and each transition in it another one.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// In billionths of a token; negative if more was spent than there was.
    level: i64,
    filled: Instant,
}

impl Budget {
    /// Returns a full bucket.
    pub const fn new(now: Instant) -> Self {
        Self { level: BURST * NANOS, filled: now }
    }

    /// Spends tokens.
    pub fn spend(&mut self, now: Instant, tokens: u64) {
        self.fill(now);
        let tokens = i64::try_from(tokens).unwrap_or(BURST).min(BURST);
        self.level -= tokens * NANOS;
    }

    /// Returns when the next token is available.
    pub fn next(&mut self, now: Instant) -> Instant {
        self.fill(now);
        let lacks = (NANOS - self.level).max(0);
        now + Duration::from_nanos(u64::try_from(lacks / PER_SECOND).unwrap_or_default())
    }

    /// Returns the number of tokens spent, and the capacity.
    pub fn spent(mut self, now: Instant) -> (u64, u64) {
        self.fill(now);
        let spent = (BURST * NANOS - self.level).div_euclid(NANOS);
        (u64::try_from(spent).unwrap_or_default(), BURST.unsigned_abs())
    }

    fn fill(&mut self, now: Instant) {
        let past = now.saturating_duration_since(self.filled).as_nanos();
        let more = i64::try_from(past).unwrap_or(i64::MAX).saturating_mul(PER_SECOND);
        self.level = self.level.saturating_add(more).min(BURST * NANOS);
        self.filled = self.filled.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_and_then_it_is_so_many_a_second() {
        let mut now = Instant::now();
        let mut budget = Budget::new(now);
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
        budget.spend(now, BURST as u64 - 1);
        assert_eq!(budget.next(now), now, "it holds no more than a burst");
        budget.spend(now, 1);
        assert!(budget.next(now) > now);
        assert_eq!(budget.spent(now), (100, 100));
        assert_eq!(budget.spent(now + Duration::from_secs(2)), (60, 100));
    }
}
