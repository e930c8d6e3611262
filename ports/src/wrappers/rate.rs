//! A rate, and the interval at which changes are noticed.
#![forbid(unsafe_code)]

use pvio_netback::bucket::Pace;

/// Rate and burst of a token bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Units per second; at least 1.
    pub per_second: u64,
    /// Units available after an idle period.
    pub burst: u64,
}

impl Rate {
    pub(super) fn pace(self) -> Pace {
        Pace::new(self.per_second, 1_000_000_000, self.burst)
    }
}

/// Largest interval at which a waiting queue checks for changed limits, in nanoseconds.
pub(super) const LOOK: u64 = 100_000_000;
