//! A token bucket that threads share without a lock.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

/// Binary fractions of a nanosecond in which times are kept, so that small packets at high rates are
/// not rounded away.
const FRACTION: u32 = 6;
/// The same, for the cost of one unit.
const COST_FRACTION: u32 = 20;

/// How fast a bucket fills, and how much it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Time for one unit, in 2⁻²⁰ nanoseconds; at least 1.
    pub cost: u64,
    /// Units after a time of rest.
    pub burst: u64,
}

impl Pace {
    /// So many units every so many nanoseconds.
    pub fn new(units: u64, nanos: u64, burst: u64) -> Self {
        let cost = (u128::from(nanos) << COST_FRACTION).checked_div(units.into());
        let cost = cost.and_then(|cost| u64::try_from(cost).ok()).unwrap_or(u64::MAX);
        Self { cost: cost.max(1), burst }
    }

    /// Time for so many units.
    fn span(self, units: u64) -> u64 {
        let span = u128::from(units).saturating_mul(self.cost.into());
        u64::try_from(span >> COST_FRACTION.saturating_sub(FRACTION)).unwrap_or(u64::MAX)
    }
}

/// A token bucket, kept as the time by which everything taken so far is paid for. Times are
/// nanoseconds of one clock.
#[derive(Debug, Default)]
pub struct Bucket {
    paid: AtomicU64,
}

impl Bucket {
    /// Until when there is nothing in it; `None` if there is something.
    pub fn empty_until(&self, pace: Pace, now: u64) -> Option<u64> {
        let paid = self.paid.load(Ordering::Relaxed);
        // Of a rate so low that a burst takes years, less than that is a burst.
        let burst = pace.span(pace.burst).min(u64::MAX / 2);
        let earliest = paid.saturating_sub(burst);
        let empty = earliest > parts(now);
        empty.then(|| (earliest >> FRACTION).saturating_add(1))
    }

    /// Takes out so much, whatever is in it: a debt holds up those who come next.
    pub fn take(&self, pace: Pace, units: u64, now: u64) {
        let (now, span) = (parts(now), pace.span(units));
        let paid = |paid: u64| Some(paid.max(now).saturating_add(span));
        let _ = self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, paid);
    }

    /// Fills it, and forgives every debt.
    pub fn fill(&self) {
        self.paid.store(0, Ordering::Relaxed);
    }
}

fn parts(nanos: u64) -> u64 {
    nanos.saturating_mul(1 << FRACTION)
}
