//! Rates and latencies of the last minute.

use hdrhistogram::Histogram;
use serde::Serialize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Length of the window in seconds.
pub const WINDOW: usize = 60;
/// Upper bound of recorded latencies, in nanoseconds: a minute.
const MAX_NS: u64 = 60_000_000_000;

/// Counts events, their bytes and their latencies, second by second.
#[derive(Debug)]
pub struct Meter {
    start: Instant,
    slots: Vec<Slot>,
    total: u64,
    total_bytes: u64,
    errors: u64,
}

#[derive(Debug)]
struct Slot {
    second: u64,
    count: u64,
    bytes: u64,
    latency: Histogram<u32>,
}

/// A meter that several threads share.
#[derive(Debug, Clone)]
pub struct Shared(Arc<Mutex<Meter>>);

/// Values of a meter.
#[derive(Debug, Clone, Serialize)]
pub struct Reading {
    /// Number of events since the start.
    pub total: u64,
    /// Number of bytes since the start.
    pub total_bytes: u64,
    /// Number of failures since the start.
    pub errors: u64,
    /// Number of events in the last full second.
    pub per_second: u64,
    /// Number of bytes in the last full second.
    pub bytes_per_second: u64,
    /// Latencies over the last minute.
    pub latency: Latency,
    /// Number of events of each full second, oldest first, [`WINDOW`]` - 1` of them.
    pub history: Vec<u64>,
    /// Number of bytes of each full second, likewise.
    pub history_bytes: Vec<u64>,
}

/// Latencies, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The maximum.
    pub max: f64,
}

impl Default for Shared {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Meter::new())))
    }
}

impl Shared {
    /// Counts an event of `bytes` with a latency of `took`.
    pub fn count(&self, bytes: u64, took: Duration) {
        self.with(|m| m.count(m.start.elapsed(), bytes, took));
    }

    /// Counts a failure.
    pub fn count_error(&self) {
        self.with(|m| m.errors += 1);
    }

    /// Returns the current values.
    #[must_use]
    pub fn read(&self) -> Reading {
        self.with(|m| m.read(m.start.elapsed()))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Meter) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Meter {
    fn new() -> Self {
        let slots = (0..WINDOW).map(|_| Slot {
            second: u64::MAX,
            count: 0,
            bytes: 0,
            latency: histogram(),
        });
        Self { start: Instant::now(), slots: slots.collect(), total: 0, total_bytes: 0, errors: 0 }
    }

    fn count(&mut self, now: Duration, bytes: u64, took: Duration) {
        let second = now.as_secs();
        let slot = &mut self.slots[(second % WINDOW as u64) as usize];
        if slot.second != second {
            (slot.second, slot.count, slot.bytes) = (second, 0, 0);
            slot.latency.reset();
        }
        slot.count += 1;
        slot.bytes += bytes;
        slot.latency.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(MAX_NS).max(1));
        self.total += 1;
        self.total_bytes += bytes;
    }

    fn read(&self, now: Duration) -> Reading {
        let second = now.as_secs();
        let oldest = (second + 1).saturating_sub(WINDOW as u64);
        let mut all = histogram();
        let recent = |slot: &&Slot| slot.second >= oldest && slot.second <= second;
        for slot in self.slots.iter().filter(recent) {
            // The bounds are the same, so this cannot fail.
            let _ = all.add(&slot.latency);
        }
        let us = |ns: u64| ns as f64 / 1000.0;
        let latency = match all.len() {
            0 => Latency::default(),
            _ => Latency {
                p50: us(all.value_at_quantile(0.5)),
                p90: us(all.value_at_quantile(0.9)),
                p99: us(all.value_at_quantile(0.99)),
                max: us(all.max()),
            },
        };
        let past = (1..WINDOW as u64).rev().map(|ago| second.checked_sub(ago));
        let past: Vec<&Slot> = past
            .map(|s| s.and_then(|s| self.slots.iter().find(|slot| slot.second == s)))
            .map(|slot| slot.unwrap_or(&NEVER))
            .collect();
        let history: Vec<u64> = past.iter().map(|s| s.count).collect();
        let history_bytes: Vec<u64> = past.iter().map(|s| s.bytes).collect();
        Reading {
            total: self.total,
            total_bytes: self.total_bytes,
            errors: self.errors,
            per_second: history.last().copied().unwrap_or(0),
            bytes_per_second: history_bytes.last().copied().unwrap_or(0),
            latency,
            history,
            history_bytes,
        }
    }
}

static NEVER: std::sync::LazyLock<Slot> = std::sync::LazyLock::new(|| Slot {
    second: u64::MAX,
    count: 0,
    bytes: 0,
    latency: histogram(),
});

/// Returns a histogram with two significant digits, from a nanosecond to a minute.
fn histogram() -> Histogram<u32> {
    Histogram::new_with_bounds(1, MAX_NS, 2).expect("bounds of a histogram")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meter_rates_cover_last_full_second() {
        let mut meter = Meter::new();
        let at = Duration::from_millis;
        for i in 0..10 {
            meter.count(at(5000 + i), 100, Duration::from_micros(50));
        }
        meter.count(at(6010), 1, Duration::from_micros(900));
        let reading = meter.read(at(6100));
        assert_eq!((reading.per_second, reading.bytes_per_second), (10, 1000));
        assert_eq!((reading.total, reading.total_bytes), (11, 1001));
        assert_eq!(reading.history.len(), WINDOW - 1);
        assert!((49.0..51.0).contains(&reading.latency.p50), "{:?}", reading.latency);
        assert!((890.0..910.0).contains(&reading.latency.max), "{:?}", reading.latency);
    }

    #[test]
    fn meter_after_window_keeps_only_totals() {
        let mut meter = Meter::new();
        meter.count(Duration::from_secs(3), 7, Duration::from_secs(100));
        let reading = meter.read(Duration::from_secs(3 + WINDOW as u64));
        assert_eq!(
            (reading.total, reading.per_second, reading.latency),
            (1, 0, Latency::default())
        );
        assert!(reading.history.iter().all(|n| *n == 0));
    }
}
