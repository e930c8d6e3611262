//! Spinning a little before sleeping.

use std::time::{Duration, Instant};

/// The longest a worker spins before it sleeps. Waking a sleeper on another core costs about half
/// of this, so spinning for longer cannot pay.
const MOST: Duration = Duration::from_micros(50);
const LEAST: Duration = Duration::from_micros(2);

/// Decides how long to look for work before sleeping, from how it went before: spinning that found
/// work is worth repeating, spinning in vain is halved until it is given up, and a sleep that was
/// over at once brings it back. An idle worker does not spin at all.
#[derive(Debug)]
pub struct Spin {
    window: Duration,
    slept: Option<Instant>,
}

impl Default for Spin {
    fn default() -> Self {
        Self { window: MOST, slept: None }
    }
}

impl Spin {
    /// Looks for work again and again, for a while; tells whether `look` found some.
    ///
    /// # Errors
    /// Whatever `look` fails with.
    pub fn until<E>(&mut self, mut look: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if let Some(slept) = self.slept.take()
            && slept.elapsed() < 2 * MOST
        {
            self.window = (self.window * 4).clamp(LEAST, MOST);
        }
        if self.window.is_zero() {
            return Ok(false);
        }
        let begin = Instant::now();
        loop {
            // Reading the clock costs as much as a dozen looks.
            for _ in 0..16 {
                if look()? {
                    self.window = MOST;
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if begin.elapsed() >= self.window {
                self.window = if self.window > LEAST { self.window / 2 } else { Duration::ZERO };
                return Ok(false);
            }
        }
    }

    /// To be called right before sleeping.
    pub fn sleeping(&mut self) {
        self.slept = Some(Instant::now());
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
}
