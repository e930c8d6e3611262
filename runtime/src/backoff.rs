//! Pauses between attempts of an operation that failed temporarily.

use std::time::Duration;

/// Number of attempts without a pause: most interruptions are over by then.
const AT_ONCE: u32 = 3;
/// The first pause; each later one is twice as long.
const SHORTEST: Duration = Duration::from_millis(1);
/// The longest pause.
const LONGEST: Duration = Duration::from_millis(128);
/// Limit of attempts, which is reached after about ten seconds.
const ATTEMPTS: u32 = 90;

/// Computes the pause before each further attempt, and when to give up.
///
/// ```
/// use pvio_runtime::Backoff;
///
/// let mut backoff = Backoff::default();
/// assert_eq!(backoff.pause(), Some(std::time::Duration::ZERO));
/// assert!(std::iter::from_fn(|| backoff.pause()).count() < 100);
/// assert_eq!(backoff.pause(), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Returns the pause after a failure; `None` after about ten seconds of failures.
    pub fn pause(&mut self) -> Option<Duration> {
        let pause = self.failures;
        if pause >= ATTEMPTS {
            return None;
        }
        Some(self.pause_for_ever())
    }

    /// Returns the pause after a failure, for operations that are never given up.
    pub fn pause_for_ever(&mut self) -> Duration {
        let pauses = self.failures.checked_sub(AT_ONCE);
        self.failures = self.failures.saturating_add(1);
        pauses.map_or(Duration::ZERO, |pauses| (SHORTEST * (1 << pauses.min(7))).min(LONGEST))
    }

    /// Resets the state after a successful attempt.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_limit_and_ends_after_ten_seconds() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = std::iter::from_fn(|| backoff.pause()).collect();
        assert!(pauses.is_sorted());
        assert_eq!((pauses[2], pauses[3], pauses[89]), (Duration::ZERO, SHORTEST, LONGEST));
        let whole: Duration = pauses.iter().sum();
        assert_eq!(whole.as_secs(), 10);
        assert_eq!((backoff.pause(), backoff.pause_for_ever()), (None, LONGEST));
        backoff.reset();
        assert_eq!(backoff.pause(), Some(Duration::ZERO));
    }
}
