//! Reads and writes the keys of one directory, with validation of each value.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

use super::encoding::{Encoding, FLAG, Invalid, TEXT};
use super::{EscapedValue, HandshakeError};
use crate::wire::parse_u64;
use crate::xenstore::Xenstore;

/// Maximum length of a text, in bytes: the maximum size of a node.
const TEXT_MAX: usize = 4096;

pub(super) struct Reader<'a> {
    pub xs: &'a mut dyn Xenstore,
    pub base: &'a str,
}

impl Reader<'_> {
    pub fn path(&self, key: &str) -> Box<str> {
        format!("{}/{key}", self.base).into()
    }

    pub fn missing(&self, key: &str) -> HandshakeError {
        HandshakeError::Missing { path: self.path(key) }
    }

    pub fn malformed(&self, key: &str, value: &[u8], expected: &'static str) -> HandshakeError {
        HandshakeError::Malformed {
            path: self.path(key),
            value: EscapedValue::new(value),
            expected,
        }
    }

    /// Returns the value without one trailing NUL or line end, which some writers add.
    pub fn raw(&mut self, key: &str) -> Result<Option<Vec<u8>>, HandshakeError> {
        let mut value = self.xs.read_peer(&self.path(key))?;
        if let Some(v) = &mut value
            && matches!(v.last(), Some(b'\0' | b'\n'))
        {
            v.pop();
        }
        Ok(value)
    }

    /// Returns the decoded value; `None` if the key is missing.
    pub fn get<E: Encoding>(
        &mut self,
        key: &str,
        encoding: E,
    ) -> Result<Option<E::Value>, HandshakeError> {
        let Some(value) = self.raw(key)? else { return Ok(None) };
        encoding.decode(&value).map(Some).map_err(|invalid| match invalid {
            Invalid::Form(expected) => self.malformed(key, &value, expected),
            Invalid::Range { value, min, max } => {
                HandshakeError::OutOfRange { path: self.path(key), value, min, max }
            }
        })
    }

    /// Returns the decoded value of a required key.
    pub fn need<E: Encoding>(
        &mut self,
        key: &str,
        encoding: E,
    ) -> Result<E::Value, HandshakeError> {
        self.get(key, encoding)?.ok_or_else(|| self.missing(key))
    }

    pub fn flag(&mut self, key: &str, default: bool) -> Result<bool, HandshakeError> {
        Ok(self.get(key, FLAG)?.unwrap_or(default))
    }

    pub fn text(&mut self, key: &str) -> Result<Option<String>, HandshakeError> {
        self.get(key, TEXT)
    }
}

pub(super) struct Writer<'a> {
    pub xs: &'a mut dyn Xenstore,
    pub base: &'a str,
}

impl Writer<'_> {
    pub fn put(&mut self, key: &str, value: impl Display) -> Result<(), HandshakeError> {
        self.put_bytes(key, value.to_string().as_bytes())
    }

    pub fn put_bytes(&mut self, key: &str, value: &[u8]) -> Result<(), HandshakeError> {
        if value.len() > TEXT_MAX {
            return Err(HandshakeError::Unwritable("a text is too long"));
        }
        Ok(self.xs.write(&format!("{}/{key}", self.base), value)?)
    }

    pub fn flag(&mut self, key: &str, on: bool) -> Result<(), HandshakeError> {
        self.put(key, u8::from(on))
    }

    /// Writes the value, or removes the key that an earlier handshake may have left.
    pub fn opt(&mut self, key: &str, value: Option<impl Display>) -> Result<(), HandshakeError> {
        match value {
            Some(v) => self.put(key, v),
            None => self.clear(key),
        }
    }

    pub fn clear(&mut self, key: &str) -> Result<(), HandshakeError> {
        Ok(self.xs.rm(&format!("{}/{key}", self.base))?)
    }

    /// Removes the existing keys that are in a list; `%u` at the end of one stands for a number.
    pub fn clear_listed(&mut self, list: &[&str]) -> Result<(), HandshakeError> {
        let keys = match self.xs.directory(self.base) {
            Ok(keys) => keys,
            Err(e) if e.is_not_found() => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for key in keys.iter().filter(|key| list.iter().any(|listed| matches(listed, key))) {
            self.clear(key)?;
        }
        Ok(())
    }
}

/// Returns whether `key` is `listed`, or has a number in place of its `%u`.
fn matches(listed: &str, key: &str) -> bool {
    match listed.strip_suffix("%u") {
        None => listed == key,
        Some(prefix) => key.strip_prefix(prefix).is_some_and(|n| parse_u64(n.as_bytes()).is_some()),
    }
}
