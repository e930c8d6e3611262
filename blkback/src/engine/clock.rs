//! Time, given from outside: engines that wait for a moment have a clock handed to them.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

/// Says how late it is.
pub trait Clock {
    /// Time since some moment in the past that never changes.
    fn now(&self) -> Duration;
}

/// The system's clock that is never set. All of a process are the same clock, so that what disks
/// share may be measured by any of theirs.
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

/// A clock that stands until it is moved: for tests and simulations. Its clones are the same clock.
#[derive(Clone, Debug, Default)]
pub struct Manual(Arc<AtomicU64>);

impl Manual {
    /// Moves it on.
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

/// Returns the sooner of two times from now.
#[must_use]
pub fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
