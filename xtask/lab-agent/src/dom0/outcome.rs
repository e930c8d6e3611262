//! What came of a scenario.

use serde_json::Value;

/// Something a scenario needs is not here; the text says what.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// What came of a scenario.
pub enum Outcome {
    /// All it claims was seen; what was measured.
    Passed(Vec<Value>),
    /// It could not run here.
    Skipped(String),
    /// The emulator got in the way: to be run once more.
    Flake(String),
    /// It ran, and did not see what it claims.
    Failed(String),
}

impl Outcome {
    /// One word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Passed(_) => "passed",
            Self::Skipped(_) => "skipped",
            Self::Flake(_) => "flake",
            Self::Failed(_) => "failed",
        }
    }
}
