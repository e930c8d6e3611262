//! Errors as the commands print them: what failed, and what to do about it.

use std::fmt;
use std::io::Write;

/// Exit code of a failure while running.
pub const FAILED: u8 = 1;
/// Exit code of invalid input: nothing was started.
pub const BAD_INPUT: u8 = 2;

/// Prints a line for the user. Ignores write errors, such as a closed pipe.
#[macro_export]
macro_rules! say {
    ($($what:tt)*) => {
        $crate::failure::line_to(&mut std::io::stdout().lock(), format_args!($($what)*))
    };
}
/// Prints a line on standard error, likewise.
#[macro_export]
macro_rules! say_aside {
    ($($what:tt)*) => {
        $crate::failure::line_to(&mut std::io::stderr().lock(), format_args!($($what)*))
    };
}
pub use crate::{say, say_aside};

#[doc(hidden)]
pub fn line_to(out: &mut impl Write, line: fmt::Arguments<'_>) {
    let _ = writeln!(out, "{line}");
}

/// A failure as it is shown to the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What failed, and why.
    pub what: String,
    /// What to do next; empty if `what` says it.
    pub help: String,
    /// The exit code.
    pub code: u8,
}

impl Failure {
    /// Returns a failure while running.
    pub fn new(what: impl fmt::Display, help: impl fmt::Display) -> Self {
        Self { what: what.to_string(), help: help.to_string(), code: FAILED }
    }

    /// Returns a failure because of an invalid argument.
    pub fn input(what: impl fmt::Display, help: impl fmt::Display) -> Self {
        Self { code: BAD_INPUT, ..Self::new(what, help) }
    }

    /// Splits an error whose text contains the remedy, after a semicolon or within the sentence, as
    /// errors of the devices do.
    pub fn of(error: impl fmt::Display) -> Self {
        let text = error.to_string();
        match text.split_once("; ") {
            Some((what, help)) => Self::new(what, help),
            None => Self::new(text, ""),
        }
    }

    /// Sets the exit code of an invalid argument.
    #[must_use]
    pub fn as_input(self) -> Self {
        Self { code: BAD_INPUT, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pvio: {}", one_line(&self.what))?;
        if !self.help.is_empty() {
            write!(f, "; {}", one_line(&self.help))?;
        }
        Ok(())
    }
}

/// Returns the text with all control characters replaced, such as line breaks and escape sequences.
#[must_use]
pub fn one_line(text: &str) -> String {
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_is_told_apart() {
        let failure = Failure::of("it broke; mend it\x1b[2J\nquickly");
        assert_eq!(failure.to_string(), "pvio: it broke; mend it [2J quickly");
        assert_eq!(Failure::of("it broke").to_string(), "pvio: it broke");
    }
}
