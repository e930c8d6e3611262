//! The clock that all threads of a process share.
#![forbid(unsafe_code)]

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Returns the time of the system's monotonic clock since a fixed point in the life of this process.
/// Threads that share a [`TokenBucket`](crate::TokenBucket) use the same clock.
#[must_use]
pub fn monotonic() -> Duration {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGIN.elapsed()
}
