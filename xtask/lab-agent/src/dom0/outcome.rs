//! The result of a scenario.

use serde_json::Value;

/// A requirement of a scenario is missing; the text says which.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The result of a scenario.
pub enum Outcome {
    /// It passed; with its measurements.
    Passed(Vec<Value>),
    /// It cannot run here.
    Skipped(String),
    /// The emulator failed; it has to run again.
    Flake(String),
    /// It failed.
    Failed(String),
}

impl Outcome {
    /// Returns the result as one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Passed(_) => "passed",
            Self::Skipped(_) => "skipped",
            Self::Flake(_) => "flake",
            Self::Failed(_) => "failed",
        }
    }
}
