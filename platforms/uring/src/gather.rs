//! Letting work gather before waking up for it.

use std::time::{Duration, Instant};

/// How long work may wait for more of it.
const PAUSE: Duration = Duration::from_micros(100);
/// Pieces of work that make a pause worth its while.
const WORTH: usize = 4;
/// The most that a pause that was not worth it raises, again and again, what it takes to try another.
const DOUBT_MOST: u32 = 256;

/// Decides whether a worker that sleeps only for moments sleeps on when the first piece of work comes,
/// as a network card holds its interrupt back: being woken costs more than many a piece of work. It
/// does so as long as each such pause brings several pieces. It begins after some sleeps in a row that
/// were over at once, and after the more of them the more often that was not worth it.
///
/// Whoever finds work by [spinning](crate::Spin) does not come here. What does is mostly a producer on
/// the worker's own core, which would be interrupted for each piece.
#[derive(Debug)]
pub struct Gather {
    /// When the last sleep began.
    slept: Option<Instant>,
    /// Whether that was one for work to gather, and what was done since.
    gathering: bool,
    done: usize,
    /// Short sleeps in a row, and how many times [`WORTH`] begin it.
    short: usize,
    doubt: u32,
}

impl Default for Gather {
    fn default() -> Self {
        Self { slept: None, gathering: false, done: 0, short: 0, doubt: 1 }
    }
}

impl Gather {
    /// Takes note of pieces of work that were done.
    pub fn done(&mut self, pieces: usize) {
        self.done = self.done.saturating_add(pieces);
    }

    /// To be called right before sleeping: for how long work is to gather first, if at all.
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

    /// Sleeps of so long, after each of which so much is done; how many until one is a pause.
    fn until_a_pause(gather: &mut Gather, now: &mut Instant, sleep: Duration) -> Option<usize> {
        (1..10_000).find(|_| {
            *now += sleep;
            gather.done(1);
            gather.decide(*now).is_some()
        })
    }

    #[test]
    fn short_sleeps_begin_a_pause_and_what_it_brings_keeps_it() {
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
    fn pauses_that_bring_nothing_become_rare() {
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
    fn whoever_sleeps_long_or_for_nothing_never_pauses() {
        let (mut gather, mut now) = (Gather::default(), Instant::now());
        assert_eq!(until_a_pause(&mut gather, &mut now, PAUSE), None);
        for _ in 0..10_000 {
            now += PAUSE / 2;
            assert_eq!(gather.decide(now), None, "woken by something else");
        }
    }
}
