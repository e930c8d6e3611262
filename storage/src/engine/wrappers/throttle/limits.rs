//! Rate limits of a disk, and their token buckets.

use core::time::Duration;

/// Units of a token: nanotokens, so that any time span adds a whole number.
const WHOLE: i128 = 1_000_000_000;

/// Maximum debt, in seconds, from operations that did not wait.
const DEBT: i128 = 5;

/// A rate with a burst.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Tokens per second; at least 1.
    pub per_second: u64,
    /// Capacity of the bucket; at least 1.
    pub burst: u64,
}

/// Limits on operations and bytes. `None` is unlimited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Quota {
    /// Operations; discards and zeroing count as writes.
    pub operations: Option<Rate>,
    /// Bytes read and written.
    pub bytes: Option<Rate>,
}

impl Quota {
    const fn is_limit(&self) -> bool {
        self.operations.is_some() || self.bytes.is_some()
    }
}

/// Rate limits of a disk. An operation is subject to the limits for all operations and to those of
/// its kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ThrottleLimits {
    /// All operations together.
    pub all: Quota,
    /// Reads.
    pub reads: Quota,
    /// Writes, discards and zeroing.
    pub writes: Quota,
}

impl ThrottleLimits {
    /// Creates limits on all operations together.
    #[must_use]
    pub const fn of_all(operations: Option<Rate>, bytes: Option<Rate>) -> Self {
        let none = Quota { operations: None, bytes: None };
        Self { all: Quota { operations, bytes }, reads: none, writes: none }
    }

    /// Returns whether there are any limits.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.all.is_limit() || self.reads.is_limit() || self.writes.is_limit()
    }
}

/// The kinds of operations that queue separately, each in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lane {
    Reads,
    Writes,
}

impl Lane {
    pub(super) const ALL: [Self; 2] = [Self::Reads, Self::Writes];
}

#[derive(Debug, Default)]
struct Bucket {
    rate: Option<Rate>,
    level: i128,
    filled: Duration,
}

impl Bucket {
    fn full(rate: Option<Rate>) -> Self {
        // No clock is available here. It is not needed: a full bucket gains nothing from its first
        // refill.
        Self {
            rate,
            level: rate.map_or(0, |r| i128::from(r.burst) * WHOLE),
            filled: Duration::ZERO,
        }
    }

    /// Refills the bucket. Returns the time until its level is positive.
    fn fill(&mut self, now: Duration) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let nanos = now.saturating_sub(self.filled).as_nanos();
        self.filled = self.filled.max(now);
        let more =
            i128::try_from(nanos).unwrap_or(i128::MAX).saturating_mul(rate.per_second.into());
        let most = i128::from(rate.burst.max(1)) * WHOLE;
        self.level = self.level.saturating_add(more).min(most);
        if self.level > 0 {
            return Duration::ZERO;
        }
        let nanos =
            (1 - self.level + i128::from(rate.per_second) - 1) / i128::from(rate.per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes tokens, which may leave a debt. Returns the time in nanoseconds that refills them.
    fn take(&mut self, tokens: u64) -> u128 {
        self.level -= i128::from(tokens) * if self.rate.is_some() { WHOLE } else { 0 };
        self.cost(tokens)
    }

    /// Like [`take`](Self::take), for operations that did not wait: their debt is bounded.
    fn owe(&mut self, tokens: u64) -> u128 {
        let most = self.rate.map_or(0, |rate| i128::from(rate.per_second) * WHOLE * DEBT);
        let least = self.level.min(-most);
        let cost = self.take(tokens);
        self.level = self.level.max(least);
        cost
    }

    fn cost(&self, tokens: u64) -> u128 {
        let Some(rate) = self.rate else { return 0 };
        u128::from(tokens) * WHOLE.unsigned_abs() / u128::from(rate.per_second.max(1))
    }
}

/// The buckets of one set of limits.
#[derive(Debug, Default)]
pub(super) struct Buckets {
    all: [Bucket; 2],
    reads: [Bucket; 2],
    writes: [Bucket; 2],
}

impl Buckets {
    pub(super) fn full(limits: &ThrottleLimits) -> Self {
        let pair = |q: Quota| [Bucket::full(q.operations), Bucket::full(q.bytes)];
        Self { all: pair(limits.all), reads: pair(limits.reads), writes: pair(limits.writes) }
    }

    fn of(&mut self, lane: Lane) -> impl Iterator<Item = &mut [Bucket; 2]> {
        let own = match lane {
            Lane::Reads => &mut self.reads,
            Lane::Writes => &mut self.writes,
        };
        [&mut self.all, own].into_iter()
    }

    /// Refills the buckets. Returns the time until all buckets of an operation have a positive
    /// level.
    pub(super) fn fill(&mut self, now: Duration, lane: Lane) -> Duration {
        self.of(lane).flatten().map(|bucket| bucket.fill(now)).max().unwrap_or_default()
    }

    /// Takes the cost of an operation. Returns the time in nanoseconds that refills it.
    pub(super) fn take(&mut self, lane: Lane, bytes: usize) -> u128 {
        self.charge(lane, bytes, Bucket::take)
    }

    /// Takes the cost of an operation that does not wait, whatever the level.
    pub(super) fn owe(&mut self, lane: Lane, bytes: usize) -> u128 {
        self.charge(lane, bytes, Bucket::owe)
    }

    /// Returns the cost of an operation without taking it.
    pub(super) fn cost(&mut self, lane: Lane, bytes: usize) -> u128 {
        self.charge(lane, bytes, |bucket, tokens| bucket.cost(tokens))
    }

    fn charge(
        &mut self,
        lane: Lane,
        bytes: usize,
        each: impl Fn(&mut Bucket, u64) -> u128,
    ) -> u128 {
        self.of(lane)
            .map(|[operations, of_bytes]| each(operations, 1).max(each(of_bytes, bytes as u64)))
            .max()
            .unwrap_or_default()
    }
}
