//! Rate limits of a disk, and their token buckets.

use core::time::Duration;
use pvio_runtime::{BucketRate, TokenBucket};

/// Maximum debt, as a time, from operations that did not wait.
const MAX_DEBT: Duration = Duration::from_secs(5);

/// Limits on operations and bytes. `None` is unlimited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Quota {
    /// Operations; discards and zeroing count as writes.
    pub operations: Option<BucketRate>,
    /// Bytes read and written.
    pub bytes: Option<BucketRate>,
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
    pub const fn of_all(operations: Option<BucketRate>, bytes: Option<BucketRate>) -> Self {
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

/// A limit and its bucket.
#[derive(Debug)]
struct Limit {
    rate: BucketRate,
    bucket: TokenBucket,
}

/// The buckets of one set of limits: for operations, and for bytes.
#[derive(Debug, Default)]
pub(super) struct Buckets {
    all: [Option<Limit>; 2],
    reads: [Option<Limit>; 2],
    writes: [Option<Limit>; 2],
}

impl Buckets {
    pub(super) fn full(limits: &ThrottleLimits) -> Self {
        let limit = |rate| Limit { rate, bucket: TokenBucket::new() };
        let pair = |q: Quota| [q.operations.map(limit), q.bytes.map(limit)];
        Self { all: pair(limits.all), reads: pair(limits.reads), writes: pair(limits.writes) }
    }

    /// Returns the limits of an operation, with its units.
    fn of(&self, lane: Lane, bytes: u64) -> impl Iterator<Item = (&Limit, u64)> {
        let own = match lane {
            Lane::Reads => &self.reads,
            Lane::Writes => &self.writes,
        };
        let units = [1, bytes].into_iter().cycle();
        let limits = self.all.iter().chain(own).zip(units);
        limits.filter_map(|(limit, units)| Some((limit.as_ref()?, units)))
    }

    /// Returns the time from now until all buckets of an operation have a positive level.
    pub(super) fn wait(&self, now: Duration, lane: Lane) -> Duration {
        let until =
            self.of(lane, 0).filter_map(|(limit, _)| limit.bucket.empty_until(limit.rate, now));
        until.max().map_or(Duration::ZERO, |until| until.saturating_sub(now))
    }

    /// Takes the cost of an operation. Returns the time that refills it.
    pub(super) fn take(&self, now: Duration, lane: Lane, bytes: usize) -> Duration {
        for (limit, units) in self.of(lane, bytes as u64) {
            limit.bucket.take(limit.rate, units, now);
        }
        self.cost(lane, bytes)
    }

    /// As [`take`](Self::take), for operations that did not wait: their debt is bounded.
    pub(super) fn take_without_wait(&self, now: Duration, lane: Lane, bytes: usize) -> Duration {
        for (limit, units) in self.of(lane, bytes as u64) {
            limit.bucket.take_within(limit.rate, units, now, MAX_DEBT);
        }
        self.cost(lane, bytes)
    }

    /// Returns the time that refills the cost of an operation, without taking it.
    pub(super) fn cost(&self, lane: Lane, bytes: usize) -> Duration {
        let costs = self.of(lane, bytes as u64).map(|(limit, units)| limit.rate.time_of(units));
        costs.max().unwrap_or_default()
    }
}
