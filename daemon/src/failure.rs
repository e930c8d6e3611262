//! What went wrong and what to do about it, in one clear line.

use std::fmt;
use std::io::Write;

/// Something went wrong while running.
pub const FAILED: u8 = 1;
/// What was asked for cannot be: nothing was started.
pub const BAD_INPUT: u8 = 2;

/// Prints a line for the user; that nobody reads it (any more) is no reason to end.
#[macro_export]
macro_rules! say {
    ($($what:tt)*) => {
        $crate::failure::line_to(&mut std::io::stdout().lock(), format_args!($($what)*))
    };
}
/// The same, on standard error.
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

/// A failure as the user sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong.
    pub what: String,
    /// What to do; may be empty if the first line says it.
    pub help: String,
    /// The exit code.
    pub code: u8,
}

impl Failure {
    /// A failure while running.
    pub fn new(what: impl fmt::Display, help: impl fmt::Display) -> Self {
        Self { what: what.to_string(), help: help.to_string(), code: FAILED }
    }

    /// A bad argument.
    pub fn input(what: impl fmt::Display, help: impl fmt::Display) -> Self {
        Self { code: BAD_INPUT, ..Self::new(what, help) }
    }

    /// From an error whose text has the remedy behind a semicolon or in it, as those of the
    /// devices do.
    pub fn of(error: impl fmt::Display) -> Self {
        let text = error.to_string();
        match text.split_once("; ") {
            Some((what, help)) => Self::new(what, help),
            None => Self::new(text, ""),
        }
    }

    /// The same, with the exit code of a bad argument.
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

/// Text without anything that breaks the line or moves the cursor.
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
