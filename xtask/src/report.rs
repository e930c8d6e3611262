//! The result of a step of the checks.

use std::fmt;
use std::iter::Sum;
use std::ops::Add;

/// Number of tests by result.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Tests that succeeded.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
    /// Tests that could not run here and reported it.
    pub skipped: usize,
}

impl Counts {
    /// One test that passed.
    pub const PASSED: Self = Self { passed: 1, failed: 0, skipped: 0 };
    /// One test that failed.
    pub const FAILED: Self = Self { passed: 0, failed: 1, skipped: 0 };
    /// One test that was skipped.
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

/// The result of a step.
#[derive(Default)]
pub struct Report {
    /// Results of its tests; a step without individual tests counts as one.
    pub counts: Counts,
    /// Lines that are always printed, mainly `SKIPPED: …`.
    pub notes: Vec<String>,
    /// Error messages, with the captured output.
    pub trouble: String,
}

impl Report {
    /// Returns the result of a successful step without individual tests.
    pub fn passed() -> Self {
        Self { counts: Counts::PASSED, ..Self::default() }
    }

    /// Returns the result of a step that failed as a whole.
    pub fn failed(trouble: impl Into<String>) -> Self {
        Self { counts: Counts::FAILED, trouble: trouble.into(), ..Self::default() }
    }

    /// Returns the result of a step that could not run here; `why` contains the remedy.
    pub fn skipped(why: impl fmt::Display) -> Self {
        let notes = vec![format!("SKIPPED: {why}")];
        Self { counts: Counts::SKIPPED, notes, ..Self::default() }
    }

    /// Combines two results.
    pub fn and(mut self, other: Self) -> Self {
        self.counts = self.counts + other.counts;
        self.notes.extend(other.notes);
        self.trouble += &other.trouble;
        self
    }

    /// Returns the result as one word.
    pub fn verdict(&self) -> &'static str {
        match self.counts {
            Counts { failed: 1.., .. } => "FAILED",
            Counts { passed: 0, .. } => "SKIPPED",
            Counts { skipped: 1.., .. } => "ok, some SKIPPED",
            Counts { .. } => "ok",
        }
    }
}
