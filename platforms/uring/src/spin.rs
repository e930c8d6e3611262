//! Spinning a little before sleeping.

use std::time::{Duration, Instant};

/// The longest a worker spins before it sleeps. Waking a sleeper on another core costs about half
/// of this, so spinning for longer cannot pay.
const MOST: Duration = Duration::from_micros(50);
const LEAST: Duration = Duration::from_micros(2);
/// Sleeps that spinning could have spared, before it is tried again though that was in vain time and
/// again.
const DOUBT_MOST: u32 = 256;

/// Decides how long to look for work before sleeping, from how it went before. Spinning that found
/// work is worth repeating; spinning in vain is halved until it is given up. A sleep brings it back
/// if work came so soon that spinning would have found it, but the more reluctantly the more often
/// that turned out wrong: who waits for somebody on its own core keeps him, by spinning, from
/// bringing the work, and sees that come at once when it sleeps. An idle worker does not spin at all.
#[derive(Debug)]
pub struct Spin {
    window: Duration,
    /// Since when there has been no work, while asleep.
    waiting: Option<Instant>,
    /// Short sleeps since spinning was given up, and how many bring it back.
    short: u32,
    doubt: u32,
    /// Whether it was brought back, and has found nothing since.
    on_trial: bool,
}

impl Default for Spin {
    fn default() -> Self {
        Self { window: MOST, waiting: None, short: 0, doubt: 1, on_trial: false }
    }
}

impl Spin {
    /// Looks for work again and again, for a while; tells whether `look` found some.
    ///
    /// # Errors
    /// Whatever `look` fails with.
    pub fn until<E>(&mut self, mut look: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if let Some(waiting) = self.waiting.take() {
            self.slept(waiting.elapsed());
        }
        if self.window.is_zero() {
            return Ok(false);
        }
        let begin = Instant::now();
        loop {
            // Reading the clock costs as much as a dozen looks.
            for _ in 0..16 {
                if look()? {
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

    /// To be called right before sleeping.
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
    fn spinning_in_vain_is_given_up_and_comes_back() {
        let mut spin = Spin::default();
        let mut looks = 0;
        for _ in 0..20 {
            assert_eq!(spin.until(|| Ok::<_, ()>(false)), Ok(false));
        }
        spin.until(|| {
            looks += 1;
            Ok::<_, ()>(false)
        })
        .unwrap();
        assert_eq!(looks, 0, "given up");
        spin.sleeping();
        assert_eq!(spin.until(|| Ok::<_, ()>(true)), Ok(true), "a short sleep brings it back");
    }

    #[test]
    fn what_look_fails_with_is_passed_on() {
        assert_eq!(Spin::default().until(|| Err("gone")), Err("gone"));
    }

    #[test]
    fn spinning_that_short_sleeps_bring_back_in_vain_becomes_rare() {
        let mut spin = Spin::default();
        let mut spun = 0;
        for _ in 0..10_000 {
            let mut looks = 0;
            let look = || {
                looks += 1;
                Ok::<_, ()>(false)
            };
            assert_eq!(spin.until(look), Ok(false));
            spun += u32::from(looks > 0);
            // Who is waited for can do its work only now.
            spin.sleeping();
        }
        // Each time some windows, the next half as long: at once, after 1, 2, 4 ... 256 sleeps, and after
        // every 256 from then on.
        assert!((12..1000).contains(&spun), "{spun}");
        let mut looks = 0;
        for _ in 0..=DOUBT_MOST {
            let look = || {
                looks += 1;
                Ok::<_, ()>(true)
            };
            if spin.until(look).unwrap() {
                break;
            }
            spin.sleeping();
        }
        assert_eq!(looks, 1, "it is tried again, however rarely");
        assert_eq!(spin.doubt, 1);
    }
}
