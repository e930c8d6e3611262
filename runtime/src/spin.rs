//! Polling for a short time before sleeping.

use std::time::{Duration, Instant};

/// Longest time for which a worker spins before it sleeps. Waking a thread on another core costs
/// about half of this, so longer spinning cannot pay off.
const MOST: Duration = Duration::from_micros(50);
const LEAST: Duration = Duration::from_micros(2);
/// Largest number of short sleeps that are required before spinning is tried again after repeated
/// failures.
const DOUBT_MOST: u32 = 256;

/// Decides how long a worker polls for work before it sleeps, from earlier results. Spinning that
/// found work is repeated. Spinning without a result is halved until it is disabled. A sleep so
/// short that spinning would have found the work enables it again, but each trial without a result
/// doubles the required number of such sleeps. A worker whose producer runs on the same core delays
/// the work by spinning, and the work arrives as soon as it sleeps. An idle worker does not spin at
/// all.
#[derive(Debug)]
pub struct Spin {
    window: Duration,
    /// Start of the current sleep, since which there has been no work.
    waiting: Option<Instant>,
    /// Number of short sleeps since spinning was disabled. At `doubt` of them it is enabled again.
    short: u32,
    doubt: u32,
    /// Whether spinning was enabled again and has found nothing since.
    on_trial: bool,
}

impl Default for Spin {
    fn default() -> Self {
        Self { window: MOST, waiting: None, short: 0, doubt: 1, on_trial: false }
    }
}

impl Spin {
    /// Polls for work for a limited time. Returns whether
    /// `has_work` found some.
    ///
    /// # Errors
    /// The error of `has_work`.
    pub fn until<E>(&mut self, mut has_work: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if let Some(waiting) = self.waiting.take() {
            self.slept(waiting.elapsed());
        }
        if self.window.is_zero() {
            return Ok(false);
        }
        let begin = Instant::now();
        loop {
            // Reading the clock costs as much as a dozen calls of `has_work`.
            for _ in 0..16 {
                if has_work()? {
                    (self.window, self.doubt, self.on_trial) = (MOST, 1, false);
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if begin.elapsed() >= self.window {
                self.found_nothing();
                return Ok(false);
            }
        }
    }

    /// Called before sleeping.
    pub fn sleeping(&mut self) {
        self.waiting = Some(Instant::now());
    }

    fn found_nothing(&mut self) {
        if self.window > LEAST {
            self.window /= 2;
        } else {
            (self.window, self.short) = (Duration::ZERO, 0);
            if self.on_trial {
                self.doubt = (2 * self.doubt).min(DOUBT_MOST);
            }
        }
    }

    fn slept(&mut self, time: Duration) {
        if self.window.is_zero() && time < 2 * MOST {
            self.short += 1;
            if self.short >= self.doubt {
                (self.window, self.on_trial) = (MOST, true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spin_without_success_stops_and_restarts_after_short_sleep() {
        let mut spin = Spin::default();
        let mut polls = 0;
        for _ in 0..20 {
            assert_eq!(spin.until(|| Ok::<_, ()>(false)), Ok(false));
        }
        spin.until(|| {
            polls += 1;
            Ok::<_, ()>(false)
        })
        .unwrap();
        assert_eq!(polls, 0, "spinning was stopped");
        spin.sleeping();
        assert_eq!(spin.until(|| Ok::<_, ()>(true)), Ok(true), "short sleep restarts spinning");
    }

    #[test]
    fn error_of_the_poll_is_passed_on() {
        assert_eq!(Spin::default().until(|| Err("gone")), Err("gone"));
    }

    #[test]
    fn spin_restarted_without_success_becomes_rare() {
        let mut spin = Spin::default();
        let mut spun = 0;
        for _ in 0..10_000 {
            let mut polls = 0;
            let has_work = || {
                polls += 1;
                Ok::<_, ()>(false)
            };
            assert_eq!(spin.until(has_work), Ok(false));
            spun += u32::from(polls > 0);
            // The producer can work only now, since it runs on the same core.
            spin.sleeping();
        }
        // Each trial has some windows, each half as long as the one before. A trial takes place at
        // the start, after 1, 2, 4 ... 256 sleeps, and then after every 256.
        assert!((12..1000).contains(&spun), "{spun}");
        let mut polls = 0;
        for _ in 0..=DOUBT_MOST {
            let has_work = || {
                polls += 1;
                Ok::<_, ()>(true)
            };
            if spin.until(has_work).unwrap() {
                break;
            }
            spin.sleeping();
        }
        assert_eq!(polls, 1, "spinning is still tried rarely");
        assert_eq!(spin.doubt, 1);
    }
}
