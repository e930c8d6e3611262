//! A rate, and how often its change is noticed.
#![forbid(unsafe_code)]

use pvio_netback::bucket::Pace;

/// How much a second, and how much at once after a time of rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// A second; at least 1.
    pub per_second: u64,
    /// At once.
    pub burst: u64,
}

impl Rate {
    pub(super) fn pace(self) -> Pace {
        Pace::new(self.per_second, 1_000_000_000, self.burst)
    }
}

/// How often, at least, somebody who waits looks whether the limits have changed: nanoseconds.
pub(super) const LOOK: u64 = 100_000_000;
