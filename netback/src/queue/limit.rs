//! How fast a guest may send.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use pvio_xenbus::handshake::vif::Rate;

/// What a guest may save up, in bytes, however little it is granted at a time.
const BURST_LEAST: u64 = 128 * 1024;
/// A changed limit is seen after this long, though what was granted before is used up for longer.
const LOOK: Duration = Duration::from_millis(100);

/// The limit of a queue, which anybody may change while it runs.
#[derive(Debug, Default)]
pub struct RateLimit {
    /// Bytes in each interval; 0 for no limit.
    bytes: AtomicU64,
    usec: AtomicU64,
}

impl RateLimit {
    /// Limits the queue to this from now on; `None` to no limit.
    pub fn set(&self, rate: Option<Rate>) {
        let (bytes, usec) = rate.map_or((0, 0), |rate| (rate.bytes, rate.usec.into()));
        self.usec.store(usec, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    fn bytes(&self) -> Option<u64> {
        Some(self.bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0)
    }
}

/// What is left of what was granted. A packet may take more than there is, which the next ones
/// have to wait for: so packets of any size pass, and the rate is what it should be.
#[derive(Debug, Default)]
pub(super) struct Credit {
    left: i64,
    /// When more is granted.
    refill: Duration,
}

impl Credit {
    /// Whether a packet may be sent now; if not, when to ask again.
    pub fn check(&mut self, limit: &RateLimit, now: Duration) -> Result<(), Duration> {
        let Some(bytes) = limit.bytes() else {
            // Whatever limit comes, it begins with a burst.
            *self = Self { left: i64::MAX, refill: Duration::ZERO };
            return Ok(());
        };
        if now >= self.refill {
            let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
            let burst = signed(bytes.max(BURST_LEAST));
            let usec = limit.usec.load(Ordering::Relaxed);
            // Whoever asks late gets what was granted meanwhile: a machine that is slow to wake up
            // would make a lower rate of it.
            let late =
                u64::try_from(now.saturating_sub(self.refill).as_micros()).unwrap_or(u64::MAX);
            let missed = late.checked_div(usec).unwrap_or_default();
            let granted = bytes.saturating_mul(missed.saturating_add(1));
            self.left = self.left.saturating_add(signed(granted)).min(burst);
            let into = Duration::from_micros(late.checked_rem(usec).unwrap_or_default());
            self.refill = now.saturating_add(Duration::from_micros(usec)).saturating_sub(into);
        }
        if self.left > 0 { Ok(()) } else { Err(self.refill.min(now.saturating_add(LOOK))) }
    }

    pub fn take(&mut self, bytes: usize) {
        self.left = self.left.saturating_sub_unsigned(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    /// Bytes sent in so long, by packets of this size, whenever that is allowed.
    fn sent(limit: &RateLimit, credit: &mut Credit, from: Duration, time: Duration) -> usize {
        let (mut now, mut sent) = (from, 0);
        while now < from + time {
            while sent < 1 << 30 && credit.check(limit, now).is_ok() {
                credit.take(1500);
                sent += 1500;
            }
            now += STEP;
        }
        sent
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let (limit, mut credit) = (RateLimit::default(), Credit::default());
        limit.set(Some(Rate { bytes: 50_000, usec: 50_000 }));
        let all = sent(&limit, &mut credit, STEP, Duration::from_secs(10));
        // A megabyte a second, and less than a burst and a packet more.
        assert!((9_950_000..10_200_000).contains(&all), "{all}");
        // Who did not send for long has no more than a burst (as in Linux, far less).
        let all = sent(&limit, &mut credit, Duration::from_secs(99), STEP);
        assert!((45_000..=131_072 + 1500).contains(&all), "{all}");
    }

    #[test]
    fn who_asks_late_gets_the_rate_all_the_same() {
        let (limit, mut credit) = (RateLimit::default(), Credit::default());
        limit.set(Some(Rate { bytes: 50_000, usec: 50_000 }));
        let (mut now, mut sent) = (STEP, 0_u64);
        while now < Duration::from_secs(10) {
            now = match credit.check(&limit, now) {
                Ok(()) => {
                    credit.take(1500);
                    sent += 1500;
                    continue;
                }
                // Woken up after most of the next interval, or more than one.
                Err(later) if sent % 7000 == 0 => later + STEP * 60,
                Err(later) => later + STEP * 40,
            };
        }
        assert!((9_950_000..10_200_000).contains(&sent), "{sent}");
    }

    #[test]
    fn what_is_granted_at_once_may_be_more_than_the_least_burst_or_less_than_a_packet() {
        let (limit, mut credit) = (RateLimit::default(), Credit::default());
        limit.set(Some(Rate { bytes: 1 << 20, usec: 1_000_000 }));
        assert!(sent(&limit, &mut credit, STEP, STEP) >= 1 << 20);
        limit.set(Some(Rate { bytes: 10, usec: 1000 }));
        let later = Duration::from_secs(50);
        let all = sent(&limit, &mut credit, later, Duration::from_secs(1500));
        assert!((14_000_000..16_000_000).contains(&all), "{all}");
    }

    #[test]
    fn a_limit_comes_and_goes() {
        let (limit, mut credit) = (RateLimit::default(), Credit::default());
        assert_eq!(credit.check(&limit, STEP), Ok(()));
        limit.set(Some(Rate { bytes: 1, usec: u32::MAX }));
        while credit.check(&limit, STEP).is_ok() {
            credit.take(65_535);
        }
        // It is looked at again soon, though nothing is granted for more than an hour.
        assert_eq!(credit.check(&limit, STEP), Err(STEP + LOOK));
        limit.set(None);
        assert_eq!(credit.check(&limit, STEP), Ok(()));
        limit.set(Some(Rate { bytes: u64::MAX, usec: 1 }));
        assert_eq!(credit.check(&limit, STEP), Ok(()));
    }
}
