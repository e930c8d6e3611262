//! A token bucket that threads share without a lock.
//!
//! This module needs neither `std` nor an allocator, because a backend core limits its peer's rate
//! without them. It is in this crate and not in a core, because storage, ports and the daemon limit
//! rates as well.
#![forbid(unsafe_code)]

use crate::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// Number of fractional bits of a nanosecond in stored times. Without them, the cost of small units
/// at high rates would round to 0.
const FRACTION: u32 = 6;
/// Number of fractional bits of a nanosecond in the cost of one unit.
const COST_FRACTION: u32 = 20;

/// Fill rate and capacity of a [`TokenBucket`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BucketRate {
    /// The rate as it was configured: `units` per `nanos` nanoseconds.
    units: u64,
    nanos: u64,
    /// Time for one unit, in 2⁻²⁰ nanoseconds; at least 1. Computed once, because the division
    /// costs more than everything else that is done for a packet.
    cost: u64,
    burst: u64,
}

impl BucketRate {
    /// Creates a rate of `units` per second. `burst` is the capacity of the bucket: the number of
    /// units that are available after an idle period.
    #[must_use]
    pub fn per_second(units: u64, burst: u64) -> Self {
        Self::per_nanos(units, NANOS_PER_SECOND, burst)
    }

    /// Creates a rate of `units` per `interval`.
    #[must_use]
    pub fn per_interval(units: u64, interval: Duration, burst: u64) -> Self {
        Self::per_nanos(units, u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX), burst)
    }

    /// Creates a rate from the [cost](Self::cost) of one unit. Makes no division, so that a rate can
    /// be stored as two atomic integers.
    #[must_use]
    pub const fn with_cost(cost: u64, burst: u64) -> Self {
        let cost = if cost == 0 { 1 } else { cost };
        Self { units: 1 << COST_FRACTION, nanos: cost, cost, burst }
    }

    fn per_nanos(units: u64, nanos: u64, burst: u64) -> Self {
        let cost = (u128::from(nanos) << COST_FRACTION).checked_div(units.into());
        let cost = cost.and_then(|cost| u64::try_from(cost).ok()).unwrap_or(u64::MAX);
        Self { units, nanos, cost: cost.max(1), burst }
    }

    /// Returns the number of units per second, rounded down.
    #[must_use]
    pub fn units_per_second(self) -> u64 {
        let units = u128::from(self.units).saturating_mul(NANOS_PER_SECOND.into());
        let rate = units.checked_div(self.nanos.into()).unwrap_or(u128::MAX);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    /// Returns the capacity of the bucket in units.
    #[must_use]
    pub const fn burst(self) -> u64 {
        self.burst
    }

    /// Returns the time for one unit, in 2⁻²⁰ nanoseconds; at least 1.
    #[must_use]
    pub const fn cost(self) -> u64 {
        self.cost
    }

    /// Returns the time in which `units` are added.
    #[must_use]
    pub fn time_of(self, units: u64) -> Duration {
        Duration::from_nanos(self.span(units) >> FRACTION)
    }

    /// Returns the time in which `units` are added, in 2⁻⁶ nanoseconds.
    fn span(self, units: u64) -> u64 {
        let span = u128::from(units).saturating_mul(self.cost.into());
        u64::try_from(span >> COST_FRACTION.saturating_sub(FRACTION)).unwrap_or(u64::MAX)
    }

    /// Returns the time that fills an empty bucket, in 2⁻⁶ nanoseconds. At a very low rate it can
    /// be years; it is limited, to avoid an overflow.
    fn burst_span(self) -> u64 {
        self.span(self.burst).min(u64::MAX / 2)
    }
}

/// Token bucket, stored as the time at which everything taken so far is refilled (the generic cell
/// rate algorithm, GCRA). A new bucket is full. Times are since the origin of one monotonic clock,
/// which all users of the bucket share.
///
/// ```
/// use pvio_runtime::bucket::{BucketRate, TokenBucket};
/// use std::time::Duration;
///
/// let (bucket, rate) = (TokenBucket::new(), BucketRate::per_second(1000, 10));
/// let now = Duration::from_secs(1);
/// assert_eq!(bucket.empty_until(rate, now), None);
/// // A large packet passes, and delays the next one.
/// bucket.take(rate, 60, now);
/// let until = bucket.empty_until(rate, now).expect("the bucket is in debt");
/// assert_eq!((until - now).as_millis(), 50);
/// ```
#[derive(Debug, Default)]
pub struct TokenBucket {
    /// In 2⁻⁶ nanoseconds.
    refilled: AtomicU64,
}

impl TokenBucket {
    /// Creates a full bucket.
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new() -> Self {
        Self { refilled: AtomicU64::new(0) }
    }

    /// Creates a full bucket.
    #[cfg(loom)]
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the time at which the bucket stops being empty, or `None` if it is not empty. It is
    /// empty while its level is zero or negative.
    pub fn empty_until(&self, rate: BucketRate, now: Duration) -> Option<Duration> {
        self.below_until(rate, now, |earliest, now| earliest >= now)
    }

    /// Returns the time at which the level stops being negative, or `None` if it is not negative. So
    /// one more operation passes at a level of zero than with [`empty_until`](Self::empty_until).
    pub fn in_debt_until(&self, rate: BucketRate, now: Duration) -> Option<Duration> {
        self.below_until(rate, now, |earliest, now| earliest > now)
    }

    fn below_until(
        &self,
        rate: BucketRate,
        now: Duration,
        is_below: impl FnOnce(u64, u64) -> bool,
    ) -> Option<Duration> {
        let earliest = self.refilled.load(Ordering::Relaxed).checked_sub(rate.burst_span())?;
        let below = is_below(earliest, ticks(now));
        below.then(|| Duration::from_nanos((earliest >> FRACTION).saturating_add(1)))
    }

    /// Returns the time at which the bucket has at least this number of units, or `None` if it has
    /// them. More than the capacity is never available; then it is the time of a full bucket.
    pub fn available_at(&self, rate: BucketRate, units: u64, now: Duration) -> Option<Duration> {
        let debt = self.refilled.load(Ordering::Relaxed).max(ticks(now));
        let full = debt.saturating_add(rate.span(units.min(rate.burst)));
        let earliest = full.saturating_sub(rate.burst_span());
        let nanos = earliest.div_ceil(1 << FRACTION);
        (earliest > ticks(now)).then(|| Duration::from_nanos(nanos))
    }

    /// Takes `units`, whatever the level is. The level may become negative, which delays later
    /// callers.
    pub fn take(&self, rate: BucketRate, units: u64, now: Duration) {
        let (now, span) = (ticks(now), rate.span(units));
        let refilled = |refilled: u64| Some(refilled.max(now).saturating_add(span));
        let _ = self.refilled.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refilled);
    }

    /// Takes `units` if the bucket has as many. Returns whether it had.
    pub fn try_take(&self, rate: BucketRate, units: u64, now: Duration) -> bool {
        let (now, span) = (ticks(now), rate.span(units));
        let most = now.saturating_add(rate.burst_span());
        let refilled = |refilled: u64| {
            let refilled = refilled.max(now).saturating_add(span);
            (refilled <= most).then_some(refilled)
        };
        self.refilled.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refilled).is_ok()
    }

    /// Takes `units`, whatever the level is, but leaves a debt of at most the units of the time
    /// `debt`, or the debt that there was. For operations that cannot wait.
    pub fn take_within(&self, rate: BucketRate, units: u64, now: Duration, debt: Duration) {
        let (now, span) = (ticks(now), rate.span(units));
        let most = now.saturating_add(rate.burst_span()).saturating_add(ticks(debt));
        let refilled = |refilled: u64| {
            let before = refilled.max(now);
            Some(before.saturating_add(span).min(most.max(before)))
        };
        let _ = self.refilled.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refilled);
    }

    /// Returns the number of units that were taken and are not refilled, rounded down.
    pub fn taken(&self, rate: BucketRate, now: Duration) -> u64 {
        let span = self.refilled.load(Ordering::Relaxed).saturating_sub(ticks(now));
        let units = (u128::from(span) << COST_FRACTION.saturating_sub(FRACTION))
            .checked_div(rate.cost.into());
        units.and_then(|units| u64::try_from(units).ok()).unwrap_or(u64::MAX)
    }

    /// Fills the bucket and clears any debt.
    pub fn fill(&self) {
        self.refilled.store(0, Ordering::Relaxed);
    }
}

/// A bucket with the same level.
impl Clone for TokenBucket {
    fn clone(&self) -> Self {
        Self { refilled: AtomicU64::new(self.refilled.load(Ordering::Relaxed)) }
    }
}

/// Returns a time in 2⁻⁶ nanoseconds.
fn ticks(time: Duration) -> u64 {
    let seconds = time.as_secs().saturating_mul(NANOS_PER_SECOND);
    let nanos = seconds.saturating_add(u64::from(time.subsec_nanos()));
    nanos.saturating_mul(1 << FRACTION)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1);

    fn millis(millis: u64) -> Duration {
        NOW + Duration::from_millis(millis)
    }

    #[test]
    fn new_bucket_has_one_burst_and_then_the_rate() {
        let (bucket, rate) = (TokenBucket::new(), BucketRate::per_second(1000, 5));
        for _ in 0..5 {
            assert_eq!(bucket.empty_until(rate, NOW), None);
            bucket.take(rate, 1, NOW);
        }
        let until = bucket.empty_until(rate, NOW).unwrap();
        assert_eq!(until, NOW + Duration::from_nanos(1), "empty at a level of zero");
        assert_eq!(bucket.in_debt_until(rate, NOW), None, "not in debt at a level of zero");
        bucket.take(rate, 1, until);
        assert_eq!(bucket.empty_until(rate, until), bucket.in_debt_until(rate, until));
        let until = bucket.empty_until(rate, until).unwrap();
        assert_eq!(until, millis(1) + Duration::from_nanos(1));
    }

    #[test]
    fn idle_bucket_holds_no_more_than_a_burst() {
        let (bucket, rate) = (TokenBucket::new(), BucketRate::per_second(1000, 5));
        bucket.take(rate, 100, NOW);
        let later = NOW + Duration::from_secs(3600);
        assert_eq!(bucket.taken(rate, later), 0);
        assert_eq!((0..10).filter(|_| bucket.try_take(rate, 1, later)).count(), 5);
        assert_eq!(bucket.taken(rate, later), 5);
    }

    #[test]
    fn units_are_available_when_the_bucket_has_all_of_them() {
        let (bucket, rate) = (TokenBucket::new(), BucketRate::per_second(10, 100));
        assert_eq!(bucket.available_at(rate, 100, NOW), None);
        bucket.take(rate, 100, NOW);
        assert_eq!(bucket.available_at(rate, 1, NOW), Some(millis(100)));
        assert_eq!(bucket.available_at(rate, 1, millis(100)), None);
        assert_eq!(bucket.available_at(rate, 1000, NOW), Some(NOW + Duration::from_secs(10)));
        assert!(!bucket.try_take(rate, 2, millis(100)), "one is there");
        assert!(bucket.try_take(rate, 1, millis(100)));
    }

    #[test]
    fn debt_of_operations_that_do_not_wait_is_bounded() {
        let (bucket, rate) = (TokenBucket::new(), BucketRate::per_second(1000, 10));
        let debt = Duration::from_secs(5);
        for _ in 0..100 {
            bucket.take_within(rate, 1000, NOW, debt);
        }
        assert_eq!(bucket.empty_until(rate, NOW).unwrap().as_secs(), 6);
        // A larger debt from before does not change.
        bucket.take(rate, 5000, NOW);
        bucket.take_within(rate, 1, NOW, debt);
        assert_eq!(bucket.empty_until(rate, NOW).unwrap().as_secs(), 11);
        bucket.fill();
        assert_eq!(bucket.empty_until(rate, NOW), None);
    }

    #[test]
    fn small_units_at_a_high_rate_cost_time() {
        let (bucket, rate) = (TokenBucket::new(), BucketRate::per_second(10_000_000_000, 0));
        (0..1_000_000).for_each(|_| bucket.take(rate, 1, NOW));
        let until = bucket.empty_until(rate, NOW).unwrap() - NOW;
        assert!((93..=100).contains(&until.as_micros()), "{until:?}");
    }

    #[test]
    fn extreme_rates_do_not_overflow() {
        for (units, burst) in [(0, 0), (0, u64::MAX), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            let (bucket, rate) = (TokenBucket::new(), BucketRate::per_second(units, burst));
            for now in [Duration::ZERO, NOW, Duration::MAX] {
                bucket.take(rate, u64::MAX, now);
                bucket.take_within(rate, u64::MAX, now, Duration::MAX);
                let _ = bucket.try_take(rate, u64::MAX, now);
                let _ = bucket.empty_until(rate, now);
                let _ = bucket.in_debt_until(rate, now);
                let _ = bucket.available_at(rate, u64::MAX, now);
                let _ = bucket.taken(rate, now);
            }
        }
    }

    #[test]
    fn rate_keeps_what_was_configured() {
        let rate = BucketRate::per_second(123_456_789, 7);
        assert_eq!((rate.units_per_second(), rate.burst()), (123_456_789, 7));
        let rate = BucketRate::per_interval(50_000, Duration::from_millis(50), 1);
        assert_eq!(rate.units_per_second(), 1_000_000);
        let again = BucketRate::with_cost(rate.cost(), rate.burst());
        assert_eq!(again.time_of(1000), rate.time_of(1000));
        assert_eq!(rate.time_of(1000), Duration::from_millis(1));
    }
}
