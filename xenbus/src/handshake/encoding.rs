//! How values are encoded in keys, with the bounds of each.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

use pvio_ring::DomId;

use crate::wire::{ABS_PATH_MAX, WirePath, parse_u64};

/// Maximum length of a peer's path, in bytes: leaves room for every key below it.
const PEER_PATH_MAX: usize = ABS_PATH_MAX - 256;

/// Why a value is rejected.
pub(super) enum Invalid {
    /// It does not have the expected form.
    Form(&'static str),
    /// It is a number out of its bounds.
    Range { value: u64, min: u64, max: u64 },
}

/// How a value is encoded.
pub(super) trait Encoding {
    /// The decoded value.
    type Value;

    /// Decodes a key's value.
    fn decode(&self, bytes: &[u8]) -> Result<Self::Value, Invalid>;

    /// Encodes a value.
    fn encode(&self, value: &Self::Value) -> Vec<u8>;
}

/// An encoding without parameters: how it is decoded, and how it is encoded.
#[derive(Clone, Copy)]
pub(super) struct Form<T>(pub fn(&[u8]) -> Result<T, Invalid>, pub fn(&T) -> Vec<u8>);

impl<T> Encoding for Form<T> {
    type Value = T;

    fn decode(&self, bytes: &[u8]) -> Result<T, Invalid> {
        self.0(bytes)
    }

    fn encode(&self, value: &T) -> Vec<u8> {
        self.1(value)
    }
}

/// A boolean, written as 0 or 1. Any other number is read as true, as in all known implementations.
pub(super) const FLAG: Form<bool> =
    Form(|bytes| Ok(ANY.decode(bytes)? != 0), |on| display(&u8::from(*on)));

/// Printable UTF-8 text.
pub(super) const TEXT: Form<String> = Form(|bytes| Ok(text(bytes)?.into()), display);

/// A value that is not text, for example a file path, which has no defined encoding.
pub(super) const BYTES: Form<Vec<u8>> = Form(
    |bytes| match bytes.contains(&0) {
        true => Err(Invalid::Form("bytes other than NUL")),
        false => Ok(bytes.into()),
    },
    Vec::clone,
);

/// A domain's number, not a reserved one.
pub(super) const DOMAIN: Form<DomId> =
    Form(|bytes| Between(0, DomId::FIRST_RESERVED - 1).decode(bytes).map(DomId), display);

/// Any number.
pub(super) const ANY: Between<u32> = Between(0, u32::MAX);
/// Any number but 0.
pub(super) const POSITIVE: Between<u32> = Between(1, u32::MAX);

/// A decimal number between two bounds.
#[derive(Clone, Copy)]
pub(super) struct Between<T>(pub T, pub T);

impl<T: PartialOrd> Between<T> {
    /// Returns whether a value may be written.
    pub fn allows(&self, value: T) -> bool {
        value >= self.0 && value <= self.1
    }
}

impl<T: Copy + Display + Into<u64> + TryFrom<u64>> Encoding for Between<T> {
    type Value = T;

    fn decode(&self, bytes: &[u8]) -> Result<T, Invalid> {
        let (min, max) = (self.0.into(), self.1.into());
        let value = parse_u64(bytes).ok_or(Invalid::Form("a decimal number"))?;
        let n = T::try_from(value).ok().filter(|_| value >= min && value <= max);
        n.ok_or(Invalid::Range { value, min, max })
    }

    fn encode(&self, value: &T) -> Vec<u8> {
        display(value)
    }
}

/// A power of two between two bounds.
#[derive(Clone, Copy)]
pub(super) struct PowerOfTwo(pub u32, pub u32);

impl PowerOfTwo {
    /// Returns whether a value may be written.
    pub const fn allows(self, size: u32) -> bool {
        size.is_power_of_two() && size >= self.0 && size <= self.1
    }
}

impl Encoding for PowerOfTwo {
    type Value = u32;

    fn decode(&self, bytes: &[u8]) -> Result<u32, Invalid> {
        let size = Between(self.0, self.1).decode(bytes)?;
        if size.is_power_of_two() { Ok(size) } else { Err(Invalid::Form("a power of two")) }
    }

    fn encode(&self, value: &u32) -> Vec<u8> {
        display(value)
    }
}

/// One of several words; the second field names them in errors.
#[derive(Clone, Copy)]
pub(super) struct OneOf<T: 'static>(pub &'static [(T, &'static str)], pub &'static str);

impl<T: PartialEq> OneOf<T> {
    /// Returns the word for a value.
    pub fn word(&self, value: &T) -> &'static str {
        let found = self.0.iter().find(|(other, _)| other == value);
        found.map_or("", |(_, word)| word)
    }
}

impl<T: Copy + PartialEq> Encoding for OneOf<T> {
    type Value = T;

    fn decode(&self, bytes: &[u8]) -> Result<T, Invalid> {
        let found = self.0.iter().find(|(_, word)| word.as_bytes() == bytes);
        found.map(|(value, _)| *value).ok_or(Invalid::Form(self.1))
    }

    fn encode(&self, value: &T) -> Vec<u8> {
        self.word(value).into()
    }
}

/// A path of this domain, which must be below its own home directory: otherwise one domain could
/// impersonate another.
#[derive(Clone, Copy)]
pub(super) struct PathOf(DomId);

impl PathOf {
    /// Returns the encoding for a domain that is another field.
    pub const fn domain(domain: &DomId) -> Self {
        Self(*domain)
    }
}

impl Encoding for PathOf {
    type Value = String;

    fn decode(&self, bytes: &[u8]) -> Result<String, Invalid> {
        let path = text(bytes)?;
        let home = format!("/local/domain/{}/", self.0);
        let absolute = matches!(WirePath::parse(bytes), Ok(WirePath::Absolute(_)));
        if absolute && path.starts_with(&home) && path.len() <= PEER_PATH_MAX {
            Ok(path.into())
        } else {
            Err(Invalid::Form("a path below the peer's home"))
        }
    }

    fn encode(&self, value: &String) -> Vec<u8> {
        display(value)
    }
}

/// Decodes printable UTF-8 text.
pub(super) fn text(bytes: &[u8]) -> Result<&str, Invalid> {
    let text = core::str::from_utf8(bytes).ok().filter(|t| !t.chars().any(char::is_control));
    text.ok_or(Invalid::Form("printable UTF-8 text"))
}

/// Encodes a value in its display form.
pub(super) fn display<T: Display>(value: &T) -> Vec<u8> {
    value.to_string().into()
}
