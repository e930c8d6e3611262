//! The deaths of the processes of one session, and the delays that they cause.

use pvio_runtime::{BucketRate, TokenBucket};
use std::time::{Duration, Instant};

/// Delays before a process is replaced that did not serve: the first, and the longest.
const FIRST_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_secs(5);
/// Maximum number of processes in a row that die before they serve.
const MAX_EARLY: u32 = 8;
/// Maximum number of processes that die without a pause after they have served, and the interval at
/// which another one may.
const MAX_DEATHS: u64 = 60;
const DEATH_INTERVAL: Duration = Duration::from_secs(1);

/// The processes that died, and the delay that they cause.
#[derive(Debug)]
pub struct Deaths {
    /// Those in a row that died before they served.
    early: u32,
    /// Those that had served, over time.
    served: TokenBucket,
    since: Instant,
}

impl Default for Deaths {
    fn default() -> Self {
        Self::new()
    }
}

impl Deaths {
    /// Returns none.
    #[must_use]
    pub fn new() -> Self {
        Self { early: 0, served: TokenBucket::new(), since: Instant::now() }
    }

    /// Returns the delay before the next process; `None` if there have been too many. A request
    /// that kills each process that takes it is answered with an error after the second one, so
    /// that the deaths that it causes end.
    pub fn next(&mut self, had_served: bool) -> Option<Duration> {
        if had_served {
            self.early = 0;
            let rate = BucketRate::per_interval(1, DEATH_INTERVAL, MAX_DEATHS);
            let admitted = self.served.try_take(rate, 1, self.since.elapsed());
            return admitted.then_some(Duration::ZERO);
        }
        self.early += 1;
        let delay = FIRST_DELAY.saturating_mul(1 << self.early.min(MAX_EARLY)).min(MAX_DELAY);
        match self.early {
            1 => Some(Duration::ZERO),
            early if early <= MAX_EARLY => Some(delay),
            _ => None,
        }
    }
}
