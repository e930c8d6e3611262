//! When a run is over.

use std::time::{Duration, Instant};

/// When a run is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// After this long.
    Time(Duration),
    /// After this many requests or packets.
    Count(u64),
}

/// How much was done, in how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    /// Requests or packets.
    pub count: u64,
    /// How long they took.
    pub time: Duration,
}

impl Until {
    /// Whether a run that began then and has done so much is over.
    #[must_use]
    pub fn is_over(self, begin: Instant, count: u64) -> bool {
        match self {
            Self::Time(time) => begin.elapsed() >= time,
            Self::Count(enough) => count >= enough,
        }
    }
}

impl Done {
    /// Requests or packets per second.
    #[must_use]
    pub fn per_second(self) -> f64 {
        self.count as f64 / self.time.as_secs_f64()
    }
}
