//! One run: its random numbers, its clock, its trace.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::VecDeque;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

/// The state of a participant that may wait; each step is a separate action of the scheduler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WaitState {
    /// Awake.
    Polling,
    /// No work was found: about to request notifications and to check once more.
    Checking,
    /// Only an event can wake it.
    Asleep,
}

/// Number of the last decisions that are stored for display.
const SHOWN: usize = 120;

/// One run. All randomness comes from its seed, so runs with the same seed are identical.
pub struct Sim {
    seed: u64,
    rng: Pcg64,
    now: u64,
    trace: VecDeque<(u64, String)>,
    hash: DefaultHasher,
}

impl Sim {
    /// Creates a run that has not started.
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

    /// Returns the seed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Returns the time, in steps since the start of the run.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Advances the time by one step.
    pub fn tick(&mut self) {
        self.now += 1;
    }

    /// Returns a number below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.rng.random_range(0..end) }
    }

    /// Returns an index into a list of `len` elements.
    ///
    /// # Panics
    /// If the list is empty.
    pub fn index(&mut self, len: usize) -> usize {
        assert!(len > 0, "nothing to choose from");
        self.rng.random_range(0..len)
    }

    /// Returns one of the elements.
    ///
    /// # Panics
    /// If there are none.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// Returns true with a probability of 1 in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Returns any number.
    pub fn number(&mut self) -> u64 {
        self.rng.random()
    }

    /// Fills `out` with random bytes.
    pub fn fill(&mut self, out: &mut [u8]) {
        self.rng.fill(out);
    }

    /// Returns a separate source of random numbers, for code that has no access to this [`Sim`]
    /// (for example an engine behind a device). Its seed is derived from this one.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self::new(self.number())
    }

    /// Appends a decision to the trace.
    pub fn note(&mut self, what: impl fmt::Display) {
        let line = what.to_string();
        (self.now, &line).hash(&mut self.hash);
        if self.trace.len() == SHOWN {
            self.trace.pop_front();
        }
        self.trace.push_back((self.now, line));
    }

    /// Returns a hash of the whole trace: two runs with the same hash took the same decisions.
    #[must_use]
    pub fn trace_hash(&self) -> u64 {
        self.hash.finish()
    }
}

/// The last decisions, one per line, each after its time.
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
