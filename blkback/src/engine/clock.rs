//! Clocks. Engines that wait for a point in time use a clock that their creator passes in.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

/// A source of time.
pub trait Clock {
    /// Returns the time since a fixed, arbitrary point in the past.
    fn now(&self) -> Duration;
}

/// The system's monotonic clock. All instances in a process have the same origin, so that disks
/// with a shared limit can measure it with any of their clocks.
#[cfg(feature = "std")]
#[derive(Clone, Copy, Debug)]
pub struct Monotonic(std::time::Instant);

#[cfg(feature = "std")]
impl Default for Monotonic {
    fn default() -> Self {
        static BEGIN: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        Self(*BEGIN.get_or_init(std::time::Instant::now))
    }
}

#[cfg(feature = "std")]
impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A clock that changes only when it is advanced, for tests and simulations. Clones share the same
/// time.
#[derive(Clone, Debug, Default)]
pub struct Manual(Arc<AtomicU64>);

impl Manual {
    /// Advances the clock.
    pub fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_add(by, Ordering::SeqCst);
    }
}

impl Clock for Manual {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
}

/// Returns the earlier of two times from now.
#[must_use]
pub fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
