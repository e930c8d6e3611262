//! Delaying a wake-up so that work accumulates.

use std::time::{Duration, Instant};

/// Longest time that work may wait for more work.
const PAUSE: Duration = Duration::from_micros(100);
/// Number of pieces of work that justify a pause.
const WORTH: usize = 4;
/// Largest factor by which pauses without enough work raise the condition for the next pause.
const DOUBT_MOST: u32 = 256;

/// Decides whether a worker with short sleeps continues to sleep when the first piece of work
/// arrives, as a network card delays its interrupt: a wake-up costs more than many a piece of work.
/// It pauses as long as each pause yields several pieces. It starts after several consecutive short
/// sleeps, and each pause that yields too few doubles the required number.
///
/// A worker that finds work by [spinning](crate::Spin) does not sleep and is not affected. Affected
/// are mostly workers whose producer runs on the same core and would be interrupted for each piece.
#[derive(Debug)]
pub struct Gather {
    /// Start of the last sleep.
    slept: Option<Instant>,
    /// Whether the last sleep was such a pause. The next field counts the work done since.
    gathering: bool,
    done: usize,
    /// Number of consecutive short sleeps. A pause starts at `doubt` times [`WORTH`] of them.
    short: usize,
    doubt: u32,
}

impl Default for Gather {
    fn default() -> Self {
        Self { slept: None, gathering: false, done: 0, short: 0, doubt: 1 }
    }
}

impl Gather {
    /// Counts completed pieces of work.
    pub fn done(&mut self, pieces: usize) {
        self.done = self.done.saturating_add(pieces);
    }

    /// Called before sleeping. Returns the time for which work should accumulate first, if any.
    pub fn before_sleep(&mut self) -> Option<Duration> {
        self.decide(Instant::now())
    }

    fn decide(&mut self, now: Instant) -> Option<Duration> {
        let slept = self.slept.replace(now);
        let done = std::mem::take(&mut self.done);
        if self.gathering {
            self.gathering = done >= WORTH;
            self.doubt = if self.gathering { 1 } else { (2 * self.doubt).min(DOUBT_MOST) };
        } else if done > 0 && slept.is_some_and(|slept| now - slept < PAUSE) {
            self.short += 1;
            self.gathering = self.short >= WORTH * self.doubt as usize;
        } else {
            self.short = 0;
        }
        if self.gathering {
            self.short = 0;
        }
        self.gathering.then_some(PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates sleeps of this length, each followed by one piece of work. Returns the number of
    /// sleeps until a pause.
    fn until_a_pause(gather: &mut Gather, now: &mut Instant, sleep: Duration) -> Option<usize> {
        (1..10_000).find(|_| {
            *now += sleep;
            gather.done(1);
            gather.decide(*now).is_some()
        })
    }

    #[test]
    fn gather_pauses_after_short_sleeps_while_pauses_are_worthwhile() {
        let (mut gather, mut now) = (Gather::default(), Instant::now());
        assert_eq!(gather.decide(now), None);
        assert_eq!(until_a_pause(&mut gather, &mut now, PAUSE / 2), Some(WORTH));
        for _ in 0..100 {
            now += PAUSE;
            gather.done(WORTH);
            assert_eq!(gather.decide(now), Some(PAUSE));
        }
        now += PAUSE;
        gather.done(WORTH - 1);
        assert_eq!(gather.decide(now), None);
    }

    #[test]
    fn gather_pauses_that_gain_nothing_become_rare() {
        let (mut gather, mut now) = (Gather::default(), Instant::now());
        gather.decide(now);
        let mut sleeps = WORTH;
        for _ in 0..20 {
            assert_eq!(until_a_pause(&mut gather, &mut now, PAUSE / 2), Some(sleeps));
            now += PAUSE;
            gather.done(1);
            assert_eq!(gather.decide(now), None);
            sleeps = (2 * sleeps).min(WORTH * DOUBT_MOST as usize);
        }
    }

    #[test]
    fn gather_never_pauses_after_long_or_unrelated_sleeps() {
        let (mut gather, mut now) = (Gather::default(), Instant::now());
        assert_eq!(until_a_pause(&mut gather, &mut now, PAUSE), None);
        for _ in 0..10_000 {
            now += PAUSE / 2;
            assert_eq!(gather.decide(now), None, "sleep ended by another event");
        }
    }
}
