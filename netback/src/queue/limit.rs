//! Limit of a guest's transmit rate.

use core::time::Duration;
use pvio_runtime::bucket::{BucketRate, TokenBucket};
use pvio_runtime::sync::atomic::{AtomicU64, Ordering, fence};
use pvio_xenbus::handshake::vif::VifRate;

/// Smallest burst in bytes, independent of the rate.
const BURST_LEAST: u64 = 128 * 1024;
/// Longest time after which a waiting queue applies a changed limit.
const LIMIT_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Transmit rate limit of all queues of a vif. Any thread may change it at any time. A packet may take
/// more than the bucket holds, and later packets then wait. So packets of any size pass, and the
/// average rate is correct.
#[derive(Debug, Default)]
pub struct RateLimit {
    /// Cost as in [`BucketRate`]; 0 means no limit.
    cost: AtomicU64,
    burst: AtomicU64,
    bucket: TokenBucket,
}

impl RateLimit {
    /// Sets the limit; `None` means no limit. If the rate changes, the bucket is filled.
    pub fn set(&self, rate: Option<VifRate>) {
        let rate = rate.filter(|rate| rate.bytes > 0).map(|rate| {
            let interval = Duration::from_micros(rate.usec.into());
            BucketRate::per_interval(rate.bytes, interval, rate.bytes.max(BURST_LEAST))
        });
        let (cost, burst) = rate.map_or((0, 0), |rate| (rate.cost(), rate.burst()));
        self.burst.store(burst, Ordering::Relaxed);
        if self.cost.swap(cost, Ordering::Relaxed) != cost {
            // Pairs with the fence of `take`.
            fence(Ordering::Release);
            self.bucket.fill();
        }
    }

    fn rate(&self) -> Option<BucketRate> {
        let cost = self.cost.load(Ordering::Relaxed);
        let burst = self.burst.load(Ordering::Relaxed);
        (cost != 0).then(|| BucketRate::with_cost(cost, burst))
    }

    /// Returns `Ok` if a packet may be sent now, or the time at which to check again. All queues use
    /// one clock.
    pub(super) fn check(&self, now: Duration) -> Result<(), Duration> {
        let empty = self.rate().and_then(|rate| self.bucket.in_debt_until(rate, now));
        let Some(until) = empty else { return Ok(()) };
        Err(until.min(now.saturating_add(LIMIT_CHECK_INTERVAL)))
    }

    /// Takes the bytes that a queue sends.
    pub(super) fn take(&self, bytes: u64, now: Duration) {
        let Some(rate) = self.rate() else { return };
        self.bucket.take(rate, bytes, now);
        // Pairs with the fence of `set`: if the bucket was filled before the bytes were taken, the
        // new rate is visible here. Bytes that were charged at the old rate could be a debt of
        // hours.
        fence(Ordering::Acquire);
        if self.cost.load(Ordering::Relaxed) != rate.cost() {
            self.bucket.fill();
        }
    }
}

#[cfg(all(loom, test))]
mod model {
    use super::*;
    use alloc::sync::Arc;

    const NOW: Duration = Duration::from_secs(1);

    #[test]
    fn queue_that_sends_while_the_rate_changes_leaves_no_debt_of_the_old_rate() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let limit = Arc::new(RateLimit::default());
            limit.set(Some(VifRate { bytes: 1, usec: u32::MAX }));
            let queue = {
                let limit = Arc::clone(&limit);
                loom::thread::spawn(move || limit.take(65_535, NOW))
            };
            limit.set(Some(VifRate { bytes: 1_000_000, usec: 1_000_000 }));
            queue.join().unwrap();
            assert_eq!(limit.check(NOW), Ok(()), "the guest waits for hours");
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    /// Returns the bytes sent within a time, in packets of one size, if every permitted packet is sent.
    fn sent(limit: &RateLimit, from: Duration, time: Duration) -> usize {
        let (mut now, mut sent) = (from, 0);
        while now < from + time {
            while sent < 1 << 30 && limit.check(now).is_ok() {
                limit.take(1500, now);
                sent += 1500;
            }
            now += STEP;
        }
        sent
    }

    #[test]
    fn rate_limit_permits_one_burst_and_then_the_rate() {
        let limit = RateLimit::default();
        limit.set(Some(VifRate { bytes: 50_000, usec: 50_000 }));
        let all = sent(&limit, STEP, Duration::from_secs(10));
        // One megabyte per second, plus at most one burst and one packet.
        assert!((9_950_000..10_200_000).contains(&all), "{all}");
        // After an idle period only one burst is available (as in Linux, not much more).
        let all = sent(&limit, Duration::from_secs(99), STEP);
        assert!((45_000..=131_072 + 1500).contains(&all), "{all}");
    }

    #[test]
    fn rate_limit_checked_late_still_reaches_rate() {
        let limit = RateLimit::default();
        limit.set(Some(VifRate { bytes: 50_000, usec: 50_000 }));
        let (mut now, mut sent) = (STEP, 0_u64);
        while now < Duration::from_secs(10) {
            now = match limit.check(now) {
                Ok(()) => {
                    limit.take(1500, now);
                    sent += 1500;
                    continue;
                }
                // The wake-up comes after most of the next interval, or after more than one interval.
                Err(later) if sent % 7000 == 0 => later + STEP * 60,
                Err(later) => later + STEP * 40,
            };
        }
        assert!((9_950_000..10_200_000).contains(&sent), "{sent}");
    }

    #[test]
    fn rate_limit_with_credit_above_burst_or_below_packet_keeps_rate() {
        let limit = RateLimit::default();
        limit.set(Some(VifRate { bytes: 1 << 20, usec: 1_000_000 }));
        assert!(sent(&limit, STEP, STEP) >= 1 << 20);
        limit.set(Some(VifRate { bytes: 10, usec: 1000 }));
        let later = Duration::from_secs(50);
        let all = sent(&limit, later, Duration::from_secs(1500));
        assert!((14_000_000..16_000_000).contains(&all), "{all}");
    }

    #[test]
    fn rate_limit_of_several_queues_holds_in_total_and_new_rate_clears_debt() {
        let limit = RateLimit::default();
        let rate = VifRate { bytes: 50_000, usec: 50_000 };
        limit.set(Some(rate));
        let (mut now, mut sent) = (STEP, [0_u64; 8]);
        while now < Duration::from_secs(10) {
            for sent in &mut sent {
                if limit.check(now).is_ok() {
                    limit.take(1500, now);
                    *sent += 1500;
                }
            }
            now += Duration::from_micros(100);
        }
        let all: u64 = sent.iter().sum();
        assert!((9_950_000..10_200_000).contains(&all), "{sent:?}");
        // Setting the same rate again does not fill the bucket.
        limit.take(10_000_000, now);
        limit.set(Some(rate));
        assert!(limit.check(now + 5 * Duration::from_secs(1)).is_err());
        limit.set(Some(VifRate { bytes: 100_000, usec: 50_000 }));
        assert_eq!(limit.check(now), Ok(()));
    }

    #[test]
    fn rate_limit_set_or_removed_takes_effect_immediately() {
        let limit = RateLimit::default();
        assert_eq!(limit.check(STEP), Ok(()));
        limit.set(Some(VifRate { bytes: 1, usec: u32::MAX }));
        while limit.check(STEP).is_ok() {
            limit.take(65_535, STEP);
        }
        // The limit is checked again soon, although the next packet is permitted only in more than an
        // hour.
        assert_eq!(limit.check(STEP), Err(STEP + LIMIT_CHECK_INTERVAL));
        limit.set(None);
        assert_eq!(limit.check(STEP), Ok(()));
        limit.set(Some(VifRate { bytes: u64::MAX, usec: 1 }));
        assert_eq!(limit.check(STEP), Ok(()));
    }
}
