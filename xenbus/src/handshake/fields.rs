//! Reads and writes the keys of one directory, with validation of each value.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

use pvio_ring::DomId;

use super::{HandshakeError, Shown};
use crate::wire::{ABS_PATH_MAX, WirePath, parse_u32, parse_u64};
use crate::xenstore::Xenstore;

/// Maximum length of a text, in bytes: the maximum size of a node.
const TEXT_MAX: usize = 4096;

/// Maximum length of a peer's path, in bytes: leaves room for every key below it.
const PEER_PATH_MAX: usize = ABS_PATH_MAX - 256;

pub(super) struct Reader<'a, X: ?Sized> {
    pub xs: &'a mut X,
    pub base: &'a str,
}

impl<X: Xenstore + ?Sized> Reader<'_, X> {
    pub fn path(&self, key: &str) -> Box<str> {
        format!("{}/{key}", self.base).into()
    }

    pub fn missing(&self, key: &str) -> HandshakeError {
        HandshakeError::Missing { path: self.path(key) }
    }

    pub fn malformed(&self, key: &str, value: &[u8], expected: &'static str) -> HandshakeError {
        HandshakeError::Malformed { path: self.path(key), value: Shown::new(value), expected }
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

    pub fn number(&mut self, key: &str, min: u64, max: u64) -> Result<Option<u64>, HandshakeError> {
        let Some(value) = self.raw(key)? else {
            return Ok(None);
        };
        let n = parse_u64(&value).ok_or_else(|| self.malformed(key, &value, "a decimal number"))?;
        if n < min || n > max {
            return Err(HandshakeError::OutOfRange { path: self.path(key), value: n, min, max });
        }
        Ok(Some(n))
    }

    pub fn opt_u32(
        &mut self,
        key: &str,
        min: u32,
        max: u32,
    ) -> Result<Option<u32>, HandshakeError> {
        let n = self.number(key, u64::from(min), u64::from(max))?;
        Ok(n.and_then(|n| u32::try_from(n).ok()))
    }

    pub fn need_u32(&mut self, key: &str, min: u32, max: u32) -> Result<u32, HandshakeError> {
        self.opt_u32(key, min, max)?.ok_or_else(|| self.missing(key))
    }

    /// Returns a frontend's number. If the toolstack wrote no key, the name of the directory is
    /// used.
    pub fn number_of_device(&mut self, key: &str) -> Result<u32, HandshakeError> {
        let name = self.base.rsplit('/').next().unwrap_or_default();
        let by_name = parse_u32(name.as_bytes());
        self.opt_u32(key, 0, u32::MAX)?.or(by_name).ok_or_else(|| self.missing(key))
    }

    /// Returns a boolean: 0 is false, any other number is true, as in all known implementations.
    pub fn flag(&mut self, key: &str, default: bool) -> Result<bool, HandshakeError> {
        Ok(self.opt_u32(key, 0, u32::MAX)?.map_or(default, |n| n != 0))
    }

    pub fn domid(&mut self, key: &str) -> Result<DomId, HandshakeError> {
        let max = u32::from(DomId::FIRST_RESERVED).saturating_sub(1);
        let n = self.need_u32(key, 0, max)?;
        Ok(DomId(u16::try_from(n).unwrap_or(DomId::FIRST_RESERVED)))
    }

    pub fn opt_text(&mut self, key: &str) -> Result<Option<String>, HandshakeError> {
        let Some(value) = self.raw(key)? else {
            return Ok(None);
        };
        let text = core::str::from_utf8(&value).ok().filter(|t| !t.chars().any(char::is_control));
        match text {
            Some(t) => Ok(Some(t.to_string())),
            None => Err(self.malformed(key, &value, "printable UTF-8 text")),
        }
    }

    pub fn need_text(&mut self, key: &str) -> Result<String, HandshakeError> {
        self.opt_text(key)?.ok_or_else(|| self.missing(key))
    }

    /// Returns a value that is not text, for example a file path, which has no defined encoding.
    pub fn opt_bytes(&mut self, key: &str) -> Result<Option<Vec<u8>>, HandshakeError> {
        match self.raw(key)? {
            Some(value) if value.contains(&0) => {
                Err(self.malformed(key, &value, "bytes other than NUL"))
            }
            value => Ok(value),
        }
    }

    pub fn need_bytes(&mut self, key: &str) -> Result<Vec<u8>, HandshakeError> {
        self.opt_bytes(key)?.ok_or_else(|| self.missing(key))
    }

    /// Returns the peer's path, which must be below the peer's own home directory: otherwise one
    /// domain could impersonate another.
    pub fn peer_path(&mut self, key: &str, peer: DomId) -> Result<String, HandshakeError> {
        let path = self.need_text(key)?;
        let home = format!("/local/domain/{peer}/");
        let absolute = matches!(WirePath::parse(path.as_bytes()), Ok(WirePath::Absolute(_)));
        if !absolute || !path.starts_with(&home) || path.len() > PEER_PATH_MAX {
            return Err(self.malformed(key, path.as_bytes(), "a path below the peer's home"));
        }
        Ok(path)
    }
}

pub(super) struct Writer<'a, X: ?Sized> {
    pub xs: &'a mut X,
    pub base: &'a str,
}

impl<X: Xenstore + ?Sized> Writer<'_, X> {
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

    /// Writes a value that is not text, as [`opt`](Self::opt).
    pub fn opt_bytes(&mut self, key: &str, value: Option<&[u8]>) -> Result<(), HandshakeError> {
        match value {
            Some(v) => self.put_bytes(key, v),
            None => self.clear(key),
        }
    }

    pub fn clear(&mut self, key: &str) -> Result<(), HandshakeError> {
        Ok(self.xs.rm(&format!("{}/{key}", self.base))?)
    }

    /// Removes the existing keys that `stale` selects.
    pub fn clear_all(&mut self, stale: impl Fn(&str) -> bool) -> Result<(), HandshakeError> {
        let keys = match self.xs.directory(self.base) {
            Ok(keys) => keys,
            Err(e) if e.is_not_found() => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for key in keys.iter().filter(|k| stale(k)) {
            self.clear(key)?;
        }
        Ok(())
    }
}

/// Returns whether `key` is `prefix` followed by a number.
pub(super) fn is_numbered(key: &str, prefix: &str) -> bool {
    key.strip_prefix(prefix).is_some_and(|n| parse_u64(n.as_bytes()).is_some())
}
