//! The definition of a disk as an operator writes it: options in brackets, if any, and the storage.

use super::escaped;
#[cfg(feature = "serde")]
use super::files::path_text::Text;
use super::options::{DiskOptions, OptionError};
use super::spec::{Spec, SpecError};
use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;
use pvio_ring::error::Remedy;

/// A disk: `[iops=1000,direct]qcow2:/srv/guest.qcow2`, or only the storage.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// The options, as far as given.
    pub options: DiskOptions,
    /// The storage.
    pub spec: Spec,
}

/// The string does not define a disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskError {
    /// The storage is invalid.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The options are invalid.
    #[error(transparent)]
    Options(#[from] OptionError),
}

impl DiskError {
    /// Returns a short stable code for logs and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Spec(_) => "image-name",
            Self::Options(_) => "disk-options",
        }
    }
}

impl Remedy for DiskError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Spec(error) => error.remedy(),
            Self::Options(error) => error.remedy(),
        }
    }
}

impl Disk {
    /// Parses a disk that a toolstack defines by a format and the rest, which may begin with
    /// options.
    ///
    /// # Errors
    /// Any [`DiskError`].
    pub fn with_format(
        format: impl AsRef<[u8]>,
        rest: impl AsRef<[u8]>,
    ) -> Result<Self, DiskError> {
        let (options, rest) = split(rest.as_ref())?;
        Ok(Self { options, spec: Spec::with_format(format, rest)? })
    }

    /// Parses a disk as [`FromStr`] does, but not necessarily in UTF-8: paths are bytes.
    ///
    /// # Errors
    /// Any [`DiskError`].
    pub fn from_bytes(text: &[u8]) -> Result<Self, DiskError> {
        let (options, rest) = split(text)?;
        Ok(Self { options, spec: Spec::from_bytes(rest)? })
    }

    /// Returns a form that [`from_bytes`](Self::from_bytes) parses to the same disk.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let options = match self.options == DiskOptions::default() {
            true => String::new(),
            false => format!("[{}]", self.options),
        };
        [options.into_bytes(), self.spec.to_bytes()].concat()
    }

    /// Returns the storage, including an overlay if the options request one.
    #[must_use]
    pub fn storage_spec(&self) -> Spec {
        match self.options.overlay {
            Some(true) => Spec::Overlay(Box::new(self.spec.clone())),
            _ => self.spec.clone(),
        }
    }
}

/// Splits a definition into options and the rest. A path that begins with a bracket is written
/// `./[…`.
fn split(text: &[u8]) -> Result<(DiskOptions, &[u8]), OptionError> {
    let Some(rest) = text.strip_prefix(b"[") else { return Ok((DiskOptions::default(), text)) };
    let end = rest.iter().position(|byte| *byte == b']').ok_or(OptionError::Unclosed)?;
    let (options, rest) = rest.split_at(end);
    Ok((DiskOptions::from_bytes(options)?, rest.get(1..).unwrap_or_default()))
}

impl From<Spec> for Disk {
    fn from(spec: Spec) -> Self {
        Self { options: DiskOptions::default(), spec }
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Disk {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Text::new(self.to_bytes()).serialize(to)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Disk {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(from)?.into_bytes();
        Self::from_bytes(&text).map_err(serde::de::Error::custom)
    }
}

impl FromStr for Disk {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        Self::from_bytes(text.as_bytes())
    }
}

/// Formats the disk for messages: parseable if its paths are UTF-8, otherwise as
/// [`EscapedPath`](super::EscapedPath).
impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        escaped::utf8_or_escaped(&self.to_bytes(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn disk_with_options_before_spec_parses_and_round_trips() {
        let disk: Disk = "[iops=5/5,ro]qcow2:/a,b]c".parse().unwrap();
        assert_eq!(disk.options.read_only, Some(true));
        assert_eq!(disk.spec.to_string(), "qcow2:/a,b]c");
        assert_eq!(disk.to_string(), "[ro,iops=5/5]qcow2:/a,b]c");
        assert_eq!(disk.to_string().parse(), Ok(disk));
        assert_eq!("raw:/a".parse::<Disk>().unwrap().to_string(), "raw:/a");
        let raw = Disk::with_format("raw", "[direct]/a:b").unwrap();
        assert_eq!((raw.options.direct, raw.spec.to_string().as_str()), (Some(true), "raw:/a:b"));
        let over: Disk = "[overlay]ram:1M".parse().unwrap();
        assert_eq!(over.storage_spec().to_string(), "overlay:ram:1048576");
        for (bad, code) in
            [("[iops=5", "disk-options"), ("[wat]/a", "disk-options"), ("[ro]", "image-name")]
        {
            assert_eq!(bad.parse::<Disk>().unwrap_err().code(), code, "{bad}");
        }
    }
}
