use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;

use crate::xenstore::XsError;

/// Why a handshake could not be read or written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HandshakeError {
    /// xenstore failed or refused.
    #[error(transparent)]
    Xenstore(#[from] XsError),
    /// A key that must be there is not.
    #[error("`{path}` is missing")]
    Missing {
        /// The key's whole path.
        path: Box<str>,
    },
    /// A value is not what the key may hold.
    #[error("`{path}` is {value}, expected {expected}")]
    Malformed {
        /// The key's whole path.
        path: Box<str>,
        /// What is there.
        value: Shown,
        /// What may be there.
        expected: &'static str,
    },
    /// A number is out of its bounds.
    #[error("`{path}` is {value}, expected {min} to {max}")]
    OutOfRange {
        /// The key's whole path.
        path: Box<str>,
        /// What is there.
        value: u64,
        /// The smallest number allowed.
        min: u64,
        /// The largest number allowed.
        max: u64,
    },
    /// A number that may be used once is used again.
    #[error("`{path}` is {value}, which is in use for another ring")]
    Duplicate {
        /// The key's whole path.
        path: Box<str>,
        /// What is there.
        value: u64,
    },
    /// The frontend uses what the backend did not offer.
    #[error("`{path}` uses a feature that was not offered")]
    NotOffered {
        /// The key's whole path.
        path: Box<str>,
    },
    /// There is a device of this address already.
    #[error("`{path}` exists already")]
    Exists {
        /// The device's path.
        path: Box<str>,
    },
    /// The struct to be written contradicts itself or its bounds; nothing was written.
    #[error("cannot be written: {0}")]
    Unwritable(&'static str),
}

/// A value as a peer wrote it, safe to show: at most 64 of its bytes, odd ones escaped.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shown(Box<str>);

impl Shown {
    /// Makes a value presentable.
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

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
