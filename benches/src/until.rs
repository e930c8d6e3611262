//! Length of a run, and its result.

use std::time::{Duration, Instant};

/// When a run ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// After this time.
    Time(Duration),
    /// After this many requests or packets.
    Count(u64),
}

/// Number of operations of a run, and its duration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    /// Requests or packets.
    pub count: u64,
    /// The duration.
    pub time: Duration,
}

impl Until {
    /// Returns whether a run with this start and number of completed operations is over.
    #[must_use]
    pub fn is_over(self, begin: Instant, count: u64) -> bool {
        match self {
            Self::Time(time) => begin.elapsed() >= time,
            Self::Count(enough) => count >= enough,
        }
    }
}

impl Done {
    /// Returns the number of requests or packets per second.
    #[must_use]
    pub fn per_second(self) -> f64 {
        self.count as f64 / self.time.as_secs_f64()
    }
}
