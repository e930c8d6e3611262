//! One run: its random numbers, its clock, its trace.

use crate::choices::{Choices, Tape};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;

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

/// What a run records of itself. Recording has no influence on the run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// Nothing, for speed.
    Nothing,
    /// Its choices, and this number of the last lines of its trace.
    Lines(usize),
}

/// One run. All randomness comes from its seed, so runs with the same seed are identical. A clone is
/// another handle to the same run, for code that runs inside of a participant's action.
#[derive(Clone)]
pub struct Sim(Rc<RefCell<Run>>);

struct Run {
    seed: u64,
    choices: Choices,
    now: u64,
    /// Largest number of lines; 0 if there is no trace.
    shown: usize,
    trace: VecDeque<(u64, String)>,
}

impl Sim {
    /// Creates a run that has not started and records nothing.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::recorded(seed, Record::Nothing)
    }

    /// Creates a run that has not started.
    #[must_use]
    pub fn recorded(seed: u64, record: Record) -> Self {
        let shown = match record {
            Record::Nothing => 0,
            Record::Lines(lines) => lines,
        };
        Self::with(seed, Choices::seeded(seed, shown > 0), shown)
    }

    /// Creates a run with the choices of `tape`, and with the last `lines` lines of its trace. A step
    /// that is not on the tape has random choices, the same in each run.
    #[must_use]
    pub fn replayed(seed: u64, tape: &[crate::choices::Segment], lines: usize) -> Self {
        Self::with(seed, Choices::from_tape(tape), lines)
    }

    fn with(seed: u64, choices: Choices, shown: usize) -> Self {
        Self(Rc::new(RefCell::new(Run { seed, choices, now: 0, shown, trace: VecDeque::new() })))
    }

    /// Returns the seed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.0.borrow().seed
    }

    /// Returns the time, in steps since the start of the run.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.borrow().now
    }

    /// Starts a part of the run: a storm, a settling.
    pub fn enter(&mut self) {
        self.0.borrow_mut().choices.enter();
    }

    /// Starts a step, and advances the time by one.
    pub fn tick(&mut self) {
        let mut run = self.0.borrow_mut();
        run.now += 1;
        run.choices.step();
    }

    /// Returns whether the part of the run has another step on the tape; `None` if the run has none.
    #[must_use]
    pub fn has_step(&self) -> Option<bool> {
        self.0.borrow().choices.has_step()
    }

    /// Returns a number below `end`; 0 if `end` is 0.
    #[inline]
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.0.borrow_mut().choices.below(end) }
    }

    /// Returns an index into a list of `len` elements.
    ///
    /// # Panics
    /// If the list is empty.
    pub fn index(&mut self, len: usize) -> usize {
        assert!(len > 0, "nothing to choose from");
        self.below(len as u64) as usize
    }

    /// Returns one of the elements.
    ///
    /// # Panics
    /// If there are none.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// Returns true with a probability of 1 in `n`. A choice of 0, the one to which a failure is
    /// reduced, is false, unless `n` is 1.
    pub fn one_in(&mut self, n: u64) -> bool {
        n == 0 || self.below(n) == n - 1
    }

    /// Returns any number.
    pub fn number(&mut self) -> u64 {
        self.below(u64::MAX)
    }

    /// Fills `out` with random bytes.
    pub fn fill(&mut self, out: &mut [u8]) {
        for word in out.chunks_mut(8) {
            word.copy_from_slice(&self.number().to_le_bytes()[..word.len()]);
        }
    }

    /// Returns another handle to this run, for code that has no access to this one (for example an
    /// engine behind a device).
    #[must_use]
    pub fn handle(&self) -> Self {
        self.clone()
    }

    /// Whether lines are appended to the trace.
    #[must_use]
    pub fn is_traced(&self) -> bool {
        self.0.borrow().shown > 0
    }

    /// Appends a line to the trace, if there is one.
    #[inline]
    pub fn note(&self, what: impl fmt::Display) {
        if !self.is_traced() {
            return;
        }
        let line = what.to_string();
        let mut run = self.0.borrow_mut();
        if run.trace.len() == run.shown {
            run.trace.pop_front();
        }
        let now = run.now;
        run.trace.push_back((now, line));
    }

    /// Returns a hash of all choices: two runs with the same hash took the same decisions.
    #[must_use]
    pub fn choices_hash(&self) -> u64 {
        self.0.borrow().choices.hash()
    }

    /// Takes the choices that were recorded.
    #[must_use]
    pub fn take_tape(&self) -> Option<Tape> {
        self.0.borrow_mut().choices.take_tape()
    }
}

/// The last decisions, one per line, each after its time.
impl fmt::Display for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = self.0.borrow();
        writeln!(f, "seed {}, the last {} lines of the trace:", run.seed, run.trace.len())?;
        run.trace.iter().try_for_each(|(at, line)| writeln!(f, "{at:>7}  {line}"))
    }
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = self.0.borrow();
        write!(f, "Sim(seed {}, step {})", run.seed, run.now)
    }
}
