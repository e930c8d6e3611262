//! Errors as the commands print them: what failed, and what to do about it.

use pvio_ring::error::{Remedy, Report};
use std::error::Error;
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

/// A failure in the form shown to the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What failed, and why.
    pub what: String,
    /// What to do next; empty if nothing is known.
    pub remedy: String,
    /// The exit code.
    pub code: u8,
}

impl Failure {
    /// Returns a failure while running.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into(), code: FAILED }
    }

    /// Returns a failure because of an invalid argument.
    pub fn input(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code: BAD_INPUT, ..Self::new(what, remedy) }
    }

    /// Returns the failure for an error of pvio, with its causes and its remedy.
    pub fn of(error: impl Remedy) -> Self {
        Self::new(Report(&error).to_string(), error.remedy().unwrap_or_default())
    }

    /// Returns the failure for an error of another library, with its causes. It has no remedy.
    pub fn foreign(error: impl Error) -> Self {
        Self::new(Report(&error).to_string(), "")
    }

    /// Sets the exit code of an invalid argument.
    #[must_use]
    pub fn as_input(self) -> Self {
        Self { code: BAD_INPUT, ..self }
    }

    /// Adds the operation that failed: the text so far is its cause.
    #[must_use]
    pub fn context(self, what: &str) -> Self {
        Self { what: format!("{what}: {}", self.what), ..self }
    }

    /// Returns the failure on one line, for xenstore: `pvio: what; remedy`.
    #[must_use]
    pub fn line(&self) -> String {
        let what = one_line(&self.what);
        match self.remedy.is_empty() {
            true => format!("pvio: {what}"),
            false => format!("pvio: {what}; {}", one_line(&self.remedy)),
        }
    }
}

/// Formats the failure for a terminal: `pvio: what`, and on a second line `help: remedy`.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pvio: {}", one_line(&self.what))?;
        if !self.remedy.is_empty() {
            write!(f, "\nhelp: {}", one_line(&self.remedy))?;
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
    use pvio_storage::image::ImageError;

    #[test]
    fn failure_prints_its_remedy_on_a_line_of_its_own() {
        let failure = Failure::new("it broke; badly", "mend it\x1b[2J\nquickly");
        assert_eq!(failure.to_string(), "pvio: it broke; badly\nhelp: mend it [2J quickly");
        assert_eq!(failure.line(), "pvio: it broke; badly; mend it [2J quickly");
        assert_eq!(Failure::new("it broke", "").to_string(), "pvio: it broke");
        assert_eq!(Failure::new("it broke", "").line(), "pvio: it broke");
    }

    #[test]
    fn failure_of_an_error_has_its_causes_and_remedy() {
        let (path, error) = ("/t".into(), std::io::Error::other("no space"));
        let failure = Failure::of(ImageError::Trace { path, error }).context("disk a");
        assert_eq!(failure.what, "disk a: the trace /t cannot be created: no space");
        assert_eq!(failure.remedy, "name a new file, or a directory");
        assert_eq!(Failure::foreign(std::fmt::Error).remedy, "");
    }
}
