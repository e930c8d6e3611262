//! Rate limit of log lines that a peer can cause: a guest, an image, a server, a packet.
#![forbid(unsafe_code)]

use crate::bucket::{BucketRate, TokenBucket};
use crate::clock::monotonic;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Lines that may be written consecutively after an idle period.
const BURST: u32 = 10;
/// Time after which one more line may be written.
const INTERVAL: Duration = Duration::from_secs(10);

/// Rate limit of the log lines for one kind of event of one device. It also counts the events.
#[derive(Debug, Default)]
pub struct LogLimit {
    seen: AtomicU64,
    /// Number of events since the last logged one.
    unlogged: AtomicU64,
    lines: TokenBucket,
}

impl LogLimit {
    /// Returns a limit without events.
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new() -> Self {
        Self { seen: AtomicU64::new(0), unlogged: AtomicU64::new(0), lines: TokenBucket::new() }
    }

    /// Returns a limit without events.
    #[cfg(loom)]
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts an event. If it may be logged, returns the number of events before it that were not.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(monotonic())
    }

    fn admit_at(&self, now: Duration) -> Option<u64> {
        self.seen.fetch_add(1, Ordering::Relaxed);
        let rate = BucketRate::per_interval(1, INTERVAL, BURST.into());
        if self.lines.try_take(rate, 1, now) {
            return Some(self.unlogged.swap(0, Ordering::Relaxed));
        }
        self.unlogged.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// Returns the number of events, logged or not.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_limit_admits_burst_and_counts_suppressed_lines() {
        let (limit, mut now) = (LogLimit::new(), monotonic());
        let flood = |now| (0..1000).filter_map(|_| limit.admit_at(now)).collect::<Vec<_>>();
        assert_eq!(flood(now), [0; BURST as usize]);
        now += INTERVAL;
        assert_eq!(flood(now), [1000 - u64::from(BURST)], "number of suppressed lines is reported");
        now += INTERVAL / 2;
        assert_eq!(flood(now), []);
        now += INTERVAL / 2;
        assert_eq!(flood(now), [999 + 1000]);
        now += INTERVAL * 3600;
        assert_eq!(flood(now).len(), BURST as usize, "unused lines are not accumulated");
        assert_eq!(limit.seen(), 5000);
    }
}
