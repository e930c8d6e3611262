use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;

use crate::xenstore::XsError;
use pvio_ring::error::Remedy;

/// Why a handshake could not be read or written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HandshakeError {
    /// xenstore failed or rejected the request.
    #[error(transparent)]
    Xenstore(#[from] XsError),
    /// A required key is missing.
    #[error("`{path}` is missing")]
    Missing {
        /// The full path of the key.
        path: Box<str>,
    },
    /// A value is not valid for the key.
    #[error("`{path}` is {value}, expected {expected}")]
    Malformed {
        /// The full path of the key.
        path: Box<str>,
        /// The value found.
        value: EscapedValue,
        /// The valid values.
        expected: &'static str,
    },
    /// A number is out of its bounds.
    #[error("`{path}` is {value}, expected {min} to {max}")]
    OutOfRange {
        /// The full path of the key.
        path: Box<str>,
        /// The value found.
        value: u64,
        /// The minimum.
        min: u64,
        /// The maximum.
        max: u64,
    },
    /// A number that must be unique is used twice.
    #[error("`{path}` is {value}, which is in use for another ring")]
    Duplicate {
        /// The full path of the key.
        path: Box<str>,
        /// The value found.
        value: u64,
    },
    /// The frontend uses a feature that the backend did not advertise.
    #[error("`{path}` uses a feature that was not advertised")]
    NotOffered {
        /// The full path of the key.
        path: Box<str>,
    },
    /// A device with this address exists already.
    #[error("`{path}` exists already")]
    Exists {
        /// The device's path.
        path: Box<str>,
    },
    /// The struct to be written is inconsistent or out of bounds; nothing was written.
    #[error("the keys cannot be written: {0}")]
    Unwritable(&'static str),
}

impl Remedy for HandshakeError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Xenstore(error) => error.remedy(),
            // What a peer or a toolstack wrote is not in the hands of this side's operator.
            Self::Missing { .. }
            | Self::Malformed { .. }
            | Self::OutOfRange { .. }
            | Self::Duplicate { .. }
            | Self::NotOffered { .. }
            | Self::Exists { .. }
            | Self::Unwritable(_) => None,
        }
    }
}

/// A value that a peer wrote, safe to print: at most 64 of its bytes, with unprintable ones
/// escaped.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EscapedValue(Box<str>);

impl EscapedValue {
    /// Converts a value for printing.
    #[must_use]
    pub fn new(value: &[u8]) -> Self {
        let mut text = String::from("\"");
        let shown = value.get(..64).unwrap_or(value);
        text.extend(shown.escape_ascii().map(char::from));
        text.push('"');
        if shown.len() < value.len() {
            text.push('…');
        }
        Self(text.into())
    }
}

impl fmt::Display for EscapedValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for EscapedValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use crate::wire::{Op, XsErrno};
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let path = || Box::from("/a");
        let refused = XsError::Refused { op: Op::Read, path: path(), errno: XsErrno::Acces };
        let none = without_remedy(&[
            &XsError::Closed,
            &XsError::Transport("reset".into()),
            &refused,
            &XsError::Protocol("x"),
            &XsError::TooLong,
            &XsError::Conflict,
            &HandshakeError::Xenstore(XsError::Closed),
            &HandshakeError::Missing { path: path() },
            &HandshakeError::Malformed {
                path: path(),
                value: EscapedValue::new(b"x"),
                expected: "y",
            },
            &HandshakeError::OutOfRange { path: path(), value: 3, min: 1, max: 2 },
            &HandshakeError::Duplicate { path: path(), value: 3 },
            &HandshakeError::NotOffered { path: path() },
            &HandshakeError::Exists { path: path() },
            &HandshakeError::Unwritable("x"),
        ]);
        // Violations of the other side, and bugs: nothing that this side's operator can change.
        let expected = [
            "Refused",
            "Protocol",
            "TooLong",
            "Conflict",
            "Missing",
            "Malformed",
            "OutOfRange",
            "Duplicate",
            "NotOffered",
            "Exists",
            "Unwritable",
        ];
        assert_eq!(none, expected);
    }
}
