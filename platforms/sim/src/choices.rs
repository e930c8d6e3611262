//! The random choices of one run, step by step, so that a run can be repeated with some of its choices
//! changed or removed.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::VecDeque;

/// Seed of the choices after the end of a tape.
const BEYOND: u64 = 0x5eed;

/// The choices of one step.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Number of the part of the run ([`Sim::enter`](crate::Sim::enter)) to which the step belongs.
    pub part: u32,
    /// The chosen numbers. Further choices of the step are 0.
    pub values: Vec<u64>,
}

impl Segment {
    /// Removes zeroes at the end, which have no effect.
    pub(crate) fn trim(&mut self) {
        let len = self.values.iter().rposition(|value| *value != 0).map_or(0, |last| last + 1);
        self.values.truncate(len);
    }
}

/// The choices of a run: those before its first step, then those of each step.
pub type Tape = Vec<Segment>;

/// Where choices come from.
enum Source {
    /// A generator, whose choices may be recorded.
    Random(Option<Tape>),
    /// A tape, whose segments are removed from the front.
    Tape { left: VecDeque<Segment>, at: usize, current: Option<Segment> },
}

/// The choices of one run.
pub(crate) struct Choices {
    rng: Pcg64,
    source: Source,
    part: u32,
    hash: u64,
}

impl Choices {
    pub fn seeded(seed: u64, record: bool) -> Self {
        let tape = record.then(|| vec![Segment::default()]);
        let rng = Pcg64::seed_from_u64(seed);
        Self { rng, source: Source::Random(tape), part: 0, hash: 0 }
    }

    pub fn from_tape(tape: &[Segment]) -> Self {
        let mut left: VecDeque<Segment> = tape.iter().cloned().collect();
        let current = left.pop_front();
        let rng = Pcg64::seed_from_u64(BEYOND);
        Self { rng, source: Source::Tape { left, at: 0, current }, part: 0, hash: 0 }
    }

    /// Returns a number below `end`, which is not 0.
    #[inline]
    pub fn below(&mut self, end: u64) -> u64 {
        let value = match &mut self.source {
            Source::Random(tape) => {
                let value = bounded(self.rng.random(), end);
                if let Some(segment) = tape.as_mut().and_then(|tape| tape.last_mut()) {
                    segment.values.push(value);
                }
                value
            }
            Source::Tape { at, current: Some(segment), .. } => {
                let value = segment.values.get(*at).copied().unwrap_or_default();
                *at += 1;
                value.min(end - 1)
            }
            Source::Tape { current: None, .. } => bounded(self.rng.random(), end),
        };
        // FNV-1a over words.
        self.hash = (self.hash ^ value).wrapping_mul(0x0100_0000_01b3);
        value
    }

    /// Starts a part of the run.
    pub fn enter(&mut self) {
        self.part += 1;
    }

    /// Starts a step.
    pub fn step(&mut self) {
        let part = self.part;
        match &mut self.source {
            Source::Random(Some(tape)) => tape.push(Segment { part, values: Vec::new() }),
            Source::Random(None) => {}
            Source::Tape { left, at, current } => {
                // Those of an earlier part were not used up.
                while left.front().is_some_and(|segment| segment.part < part) {
                    left.pop_front();
                }
                (*at, *current) = (0, left.pop_front_if(|segment| segment.part == part));
            }
        }
    }

    /// Returns whether the part has another step, if that is known.
    pub fn has_step(&self) -> Option<bool> {
        match &self.source {
            Source::Random(_) => None,
            Source::Tape { left, .. } => Some(left.iter().any(|segment| segment.part == self.part)),
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn take_tape(&mut self) -> Option<Tape> {
        match &mut self.source {
            Source::Random(tape) => tape.take(),
            Source::Tape { .. } => None,
        }
    }
}

/// Maps a random number to one below `end` (Lemire's method; the bias is below 2⁻³² for the bounds of a
/// simulation).
#[inline]
fn bounded(random: u64, end: u64) -> u64 {
    ((u128::from(random) * u128::from(end)) >> 64) as u64
}
