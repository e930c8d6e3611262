//! A token bucket that threads share without a lock.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

/// Number of fractional bits of a nanosecond in stored times. Without them, the cost of small packets
/// at high rates would round to 0.
const FRACTION: u32 = 6;
/// Number of fractional bits of a nanosecond in the cost of one unit.
const COST_FRACTION: u32 = 20;

/// Fill rate and capacity of a bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Time for one unit, in 2⁻²⁰ nanoseconds; at least 1.
    pub cost: u64,
    /// Capacity: units that are available after an idle period.
    pub burst: u64,
}

impl Pace {
    /// Returns a pace of `units` per `nanos` nanoseconds, with the given capacity.
    pub fn new(units: u64, nanos: u64, burst: u64) -> Self {
        let cost = (u128::from(nanos) << COST_FRACTION).checked_div(units.into());
        let cost = cost.and_then(|cost| u64::try_from(cost).ok()).unwrap_or(u64::MAX);
        Self { cost: cost.max(1), burst }
    }

    /// Returns the time in which `units` are added, in 2⁻⁶ nanoseconds.
    fn span(self, units: u64) -> u64 {
        let span = u128::from(units).saturating_mul(self.cost.into());
        u64::try_from(span >> COST_FRACTION.saturating_sub(FRACTION)).unwrap_or(u64::MAX)
    }
}

/// Token bucket, stored as the time at which everything taken so far is paid for. Times are nanoseconds
/// of one monotonic clock.
#[derive(Debug, Default)]
pub struct Bucket {
    paid: AtomicU64,
}

impl Bucket {
    /// Returns the time at which the bucket stops being empty, or `None` if it is not empty.
    pub fn empty_until(&self, pace: Pace, now: u64) -> Option<u64> {
        let paid = self.paid.load(Ordering::Relaxed);
        // At a very low rate a burst can span years; limiting the span avoids overflow.
        let burst = pace.span(pace.burst).min(u64::MAX / 2);
        let earliest = paid.saturating_sub(burst);
        let empty = earliest > parts(now);
        empty.then(|| (earliest >> FRACTION).saturating_add(1))
    }

    /// Takes `units`, whatever the level is. The level may become negative, which delays later callers.
    pub fn take(&self, pace: Pace, units: u64, now: u64) {
        let (now, span) = (parts(now), pace.span(units));
        let paid = |paid: u64| Some(paid.max(now).saturating_add(span));
        let _ = self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, paid);
    }

    /// Fills the bucket and clears any debt.
    pub fn fill(&self) {
        self.paid.store(0, Ordering::Relaxed);
    }
}

fn parts(nanos: u64) -> u64 {
    nanos.saturating_mul(1 << FRACTION)
}
