//! One run: its chance, its clock, its trace.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::VecDeque;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

/// How many of the last decisions are kept to be shown.
const SHOWN: usize = 120;

/// One run. Everything random in it comes from its seed, so the same seed is the same run.
pub struct Sim {
    seed: u64,
    rng: Pcg64,
    now: u64,
    trace: VecDeque<(u64, String)>,
    hash: DefaultHasher,
}

impl Sim {
    /// A run that has not begun.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            rng: Pcg64::seed_from_u64(seed),
            now: 0,
            trace: VecDeque::with_capacity(SHOWN),
            hash: DefaultHasher::new(),
        }
    }

    /// What the run comes from.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The time, in steps since the run began.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Time goes on by one step.
    pub fn tick(&mut self) {
        self.now += 1;
    }

    /// A number below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.rng.random_range(0..end) }
    }

    /// A place in a list of `len` things.
    ///
    /// # Panics
    /// When there is nothing to choose from.
    pub fn index(&mut self, len: usize) -> usize {
        assert!(len > 0, "nothing to choose from");
        self.rng.random_range(0..len)
    }

    /// One of several.
    ///
    /// # Panics
    /// When there is nothing to choose from.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.rng.random()
    }

    /// Random bytes.
    pub fn fill(&mut self, out: &mut [u8]) {
        self.rng.fill(out);
    }

    /// A chance of its own for something that acts where no [`Sim`] can be handed to it (an engine
    /// behind a device, say). It comes from the seed too.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self::new(self.number())
    }

    /// Writes a decision into the trace.
    pub fn note(&mut self, what: impl fmt::Display) {
        let line = what.to_string();
        (self.now, &line).hash(&mut self.hash);
        if self.trace.len() == SHOWN {
            self.trace.pop_front();
        }
        self.trace.push_back((self.now, line));
    }

    /// A number that stands for the whole trace: two runs with the same one took the same
    /// decisions.
    #[must_use]
    pub fn trace_hash(&self) -> u64 {
        self.hash.finish()
    }
}

/// The last decisions, one a line, each after its time.
impl fmt::Display for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, the last {} of the trace:", self.seed, self.trace.len())?;
        self.trace.iter().try_for_each(|(at, line)| writeln!(f, "{at:>7}  {line}"))
    }
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sim(seed {}, step {})", self.seed, self.now)
    }
}
