//! What came of a step of the checks.

use std::fmt;
use std::iter::Sum;
use std::ops::Add;

/// How many tests went which way.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Ran, and found what they should.
    pub passed: usize,
    /// Ran, and did not.
    pub failed: usize,
    /// Could not run here, and said so.
    pub skipped: usize,
}

impl Counts {
    /// One that passed.
    pub const PASSED: Self = Self { passed: 1, failed: 0, skipped: 0 };
    /// One that failed.
    pub const FAILED: Self = Self { passed: 0, failed: 1, skipped: 0 };
    /// One that was skipped.
    pub const SKIPPED: Self = Self { passed: 0, failed: 0, skipped: 1 };
}

impl Add for Counts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// What came of one step.
#[derive(Default)]
pub struct Report {
    /// Its tests; a step without tests of its own counts as one.
    pub counts: Counts,
    /// Lines to be read whatever happened: `SKIPPED: …` above all.
    pub notes: Vec<String>,
    /// What went wrong, with the captured output.
    pub trouble: String,
}

impl Report {
    /// A step without tests of its own that went well.
    pub fn passed() -> Self {
        Self { counts: Counts::PASSED, ..Self::default() }
    }

    /// A step that failed as a whole.
    pub fn failed(trouble: impl Into<String>) -> Self {
        Self { counts: Counts::FAILED, trouble: trouble.into(), ..Self::default() }
    }

    /// A step that could not run here; `why` says what to do about it.
    pub fn skipped(why: impl fmt::Display) -> Self {
        let notes = vec![format!("SKIPPED: {why}")];
        Self { counts: Counts::SKIPPED, notes, ..Self::default() }
    }

    /// Both.
    pub fn and(mut self, other: Self) -> Self {
        self.counts = self.counts + other.counts;
        self.notes.extend(other.notes);
        self.trouble += &other.trouble;
        self
    }

    /// In a word.
    pub fn verdict(&self) -> &'static str {
        match self.counts {
            Counts { failed: 1.., .. } => "FAILED",
            Counts { passed: 0, .. } => "SKIPPED",
            Counts { skipped: 1.., .. } => "ok, some SKIPPED",
            Counts { .. } => "ok",
        }
    }
}
