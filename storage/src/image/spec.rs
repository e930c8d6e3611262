//! The storage of a disk as an operator writes it: one string, parsed only here. A
//! [`Disk`](super::Disk) has options before it.
//!
//! | string | disk |
//! |---|---|
//! | `/srv/guest.img`, `/dev/vg/guest` | raw, unless the name ends like another format's |
//! | `raw:PATH` | a raw file or a block device |
//! | `qcow2:PATH` | a qcow2 image, with its backing files |
//! | `qcow2@SNAPSHOT:PATH` | an internal snapshot of one, read-only, by its name or id |
//! | `vmdk:PATH` | a VMDK image of flat extents, read-only |
//! | `vhd:PATH` (also `vpc:`) | a fixed or dynamic VHD image |
//! | `nbd://HOST[:PORT][/EXPORT]` | a network block device over TCP |
//! | `nbd+unix:///[EXPORT]?socket=PATH` | the same over a Unix socket |
//! | `ram:64M` | memory, gone with the disk |
//! | `overlay:DISK` | any of these, never changed: writes last as long as the disk is served |
//!
//! **The format is never detected from an image's content.** A guest can write anything to a raw
//! disk, for example the header of another format with any file of the host as its backing file; an
//! image that is raw now would be opened in that format later. Only the name, which the operator
//! controls, determines the format.

use crate::image::Format;
use crate::image::escaped;
use crate::image::options::values::unescape;
use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;
use pvio_ring::error::Remedy;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The port that IANA has assigned to NBD.
pub const NBD_PORT: u16 = 10809;

/// The storage of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Spec {
    /// A file or a block device.
    File {
        /// Format of the file.
        format: Format,
        /// Path of the file.
        path: PathBuf,
        /// The internal snapshot to serve instead of the current state.
        snapshot: Option<String>,
    },
    /// A network block device.
    Nbd(NbdSpec),
    /// Memory.
    Ram {
        /// Size in bytes; a multiple of 512.
        bytes: u64,
    },
    /// Another disk that is only read, with a temporary writable layer.
    Overlay(Box<Spec>),
}

/// Address of a network block device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdSpec {
    /// Address of the server.
    pub server: NbdServer,
    /// The export's name; empty for the server's default.
    pub export: String,
}

/// Address of an NBD server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdServer {
    /// TCP: a host name or address, and a port.
    Tcp(String, u16),
    /// A Unix socket.
    Unix(PathBuf),
}

/// The string does not name a disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpecError {
    /// The string is empty.
    #[error("no disk is named")]
    Empty,
    /// The prefix before the colon is not a known format.
    #[error("unknown image format {0:?}")]
    UnknownFormat(String),
    /// The format is not supported.
    #[error("{0} images are not supported")]
    Foreign(&'static str),
    /// The size is invalid.
    #[error("invalid size of a disk {0:?}: expected a positive multiple of 512 bytes")]
    Size(String),
    /// The address of a network block device is invalid.
    #[error("invalid network block device {0:?}")]
    Nbd(String),
}

impl Remedy for SpecError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Empty => "name one, for example /srv/guest.img".into(),
            Self::UnknownFormat(word) => format!(
                "use raw, qcow2, qcow2@SNAPSHOT, vmdk, vhd, nbd://, nbd+unix://, ram or overlay, and \
                 write a path with a colon in it as raw:{word}:… or ./{word}:…"
            )
            .into(),
            Self::Foreign(format) => format!(
                "convert it with {}, or write raw:PATH if the guest is to see its bytes as they are",
                converter(format)
            )
            .into(),
            Self::Size(_) => "write it as in ram:64M".into(),
            Self::Nbd(_) => {
                "write nbd://host:port/export or nbd+unix:///export?socket=/path".into()
            }
        })
    }
}

/// Returns the program that converts an image of an unsupported format without loss.
fn converter(format: &str) -> &'static str {
    match format {
        // A disk of these formats consists of several files, of which QEMU reads only one.
        "parallels" | "hdd" | "vhdset" => {
            "the program that created it, as a whole, with no snapshots left"
        }
        // QEMU reads these formats if the disk is in one file.
        "vhdx" | "vdi" => {
            "qemu-img convert -O qcow2 OLD NEW.qcow2, or, if it has a parent, the program that \
             created it"
        }
        _ => "qemu-img convert -O qcow2 OLD NEW.qcow2",
    }
}

impl Spec {
    /// Creates the specification of a file in a given format.
    pub fn file(format: Format, path: impl Into<PathBuf>) -> Self {
        Self::File { format, path: path.into(), snapshot: None }
    }

    /// Parses a disk that a toolstack defines by a format and the rest. A path is a byte string
    /// without an encoding.
    ///
    /// # Errors
    /// Any [`SpecError`].
    pub fn with_format(
        format: impl AsRef<[u8]>,
        rest: impl AsRef<[u8]>,
    ) -> Result<Self, SpecError> {
        let (format, rest) = (String::from_utf8_lossy(format.as_ref()), rest.as_ref());
        if rest.is_empty() {
            return Err(SpecError::Empty);
        }
        let path = || PathBuf::from(OsStr::from_bytes(rest));
        if let Some(format) = Format::from_word(&format) {
            return Ok(Self::file(format, path()));
        }
        match &*format {
            "ram" => size(rest).map(|bytes| Self::Ram { bytes }),
            "overlay" => Ok(Self::Overlay(Box::new(Self::from_bytes(rest)?))),
            "nbd" | "nbd+unix" => nbd(&format, rest).map(Self::Nbd),
            _ => match format.split_once('@') {
                Some(("qcow2", name)) if !name.is_empty() => Ok(Self::File {
                    format: Format::Qcow2,
                    path: path(),
                    snapshot: Some(name.into()),
                }),
                _ => Err(match Format::foreign(&format) {
                    Some(foreign) => SpecError::Foreign(foreign),
                    None => SpecError::UnknownFormat(format.into_owned()),
                }),
            },
        }
    }

    /// Parses a name as [`FromStr`] does, but not necessarily in UTF-8: paths are bytes.
    ///
    /// # Errors
    /// Any [`SpecError`].
    pub fn from_bytes(text: &[u8]) -> Result<Self, SpecError> {
        match text.iter().position(|byte| *byte == b':').map(|at| text.split_at(at)) {
            _ if text.is_empty() => Err(SpecError::Empty),
            // A format contains no slash, except in the name of a snapshot.
            Some((format, rest)) if !format.contains(&b'/') || format.starts_with(b"qcow2@") => {
                Self::with_format(format, rest.get(1..).unwrap_or_default())
            }
            _ => {
                let path = Path::new(OsStr::from_bytes(text));
                let suffix = path.extension().and_then(|suffix| suffix.to_str());
                match suffix.and_then(Format::foreign) {
                    Some(foreign) => Err(SpecError::Foreign(foreign)),
                    None => Ok(Self::file(Format::of_name(path), path)),
                }
            }
        }
    }

    /// Returns a form that [`from_bytes`](Self::from_bytes) parses to the same specification.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::File { format, path, snapshot } => {
                let at = snapshot.iter().flat_map(|name| ["@", name]);
                let head: String = core::iter::once(format.word()).chain(at).chain([":"]).collect();
                [head.as_bytes(), path.as_os_str().as_bytes()].concat()
            }
            Self::Nbd(nbd) => nbd.to_string().into_bytes(),
            Self::Ram { bytes } => format!("ram:{bytes}").into_bytes(),
            Self::Overlay(below) => [b"overlay:", &below.to_bytes()[..]].concat(),
        }
    }

    /// Returns the path of the file, if the disk is in one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path, .. } => Some(path),
            Self::Overlay(below) => below.path(),
            Self::Nbd(_) | Self::Ram { .. } => None,
        }
    }

    /// Returns the server, if the disk has one.
    #[must_use]
    pub fn server(&self) -> Option<&NbdSpec> {
        match self {
            Self::Nbd(spec) => Some(spec),
            Self::Overlay(below) => below.server(),
            Self::File { .. } | Self::Ram { .. } => None,
        }
    }

    /// Makes the path of the file absolute.
    ///
    /// # Errors
    /// The error of [`std::path::absolute`].
    pub fn absolute(self) -> std::io::Result<Self> {
        Ok(match self {
            Self::File { format, path, snapshot } => {
                Self::File { format, path: std::path::absolute(path)?, snapshot }
            }
            Self::Overlay(below) => Self::Overlay(Box::new(below.absolute()?)),
            other => other,
        })
    }
}

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        Self::from_bytes(text.as_bytes())
    }
}

/// Formats the specification for messages: parseable if its path is UTF-8, otherwise as
/// [`EscapedPath`](crate::image::EscapedPath).
impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        escaped::utf8_or_escaped(&self.to_bytes(), f)
    }
}

/// Formats the address so that it is parsed to the same.
impl fmt::Display for NbdSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = Escaped(self.export.as_bytes());
        match &self.server {
            NbdServer::Tcp(host, port) if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{export}")
            }
            NbdServer::Tcp(host, port) => write!(f, "nbd://{host}:{port}/{export}"),
            NbdServer::Unix(path) => {
                let socket = Escaped(path.as_os_str().as_bytes());
                write!(f, "nbd+unix:///{export}?socket={socket}")
            }
        }
    }
}

/// A part of an address, percent-encoded.
struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '%' | '?' | '&' => write!(f, "%{:02X}", u32::from(c))?,
                    c => write!(f, "{c}")?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "%{byte:02X}"))?;
        }
        Ok(())
    }
}

/// Parses a size such as `64M`, in bytes.
fn size(text: &[u8]) -> Result<u64, SpecError> {
    let bytes = core::str::from_utf8(text).ok().and_then(super::options::values::size);
    let bytes = bytes.filter(|bytes| *bytes > 0 && bytes.is_multiple_of(512));
    bytes.ok_or_else(|| SpecError::Size(String::from_utf8_lossy(text).into_owned()))
}

/// Parses the part after `nbd:` or `nbd+unix:`.
fn nbd(scheme: &str, rest: &[u8]) -> Result<NbdSpec, SpecError> {
    let wrong = || SpecError::Nbd(format!("{scheme}:{}", String::from_utf8_lossy(rest)));
    let rest = rest.strip_prefix(b"//").ok_or_else(wrong)?;
    let (place, query) = split(rest, b'?').unwrap_or((rest, b""));
    let (host, export) = split(place, b'/').unwrap_or((place, b""));
    let host = core::str::from_utf8(host).map_err(|_| wrong())?;
    let export = unescape(export).and_then(|name| String::from_utf8(name).ok());
    let export = export.ok_or_else(wrong)?;
    let server = if scheme == "nbd+unix" {
        let mut words = query.split(|byte| *byte == b'&');
        let socket = words.find_map(|word| word.strip_prefix(b"socket="));
        let socket = socket.and_then(unescape).filter(|path| !path.is_empty());
        if !host.is_empty() {
            return Err(wrong());
        }
        NbdServer::Unix(OsString::from_vec(socket.ok_or_else(wrong)?).into())
    } else {
        let (host, port) = match host.strip_prefix('[').and_then(|h| h.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(wrong)?)),
            None => host.split_once(':').map_or((host, None), |(host, port)| (host, Some(port))),
        };
        let port = port.map_or(Ok(NBD_PORT), |port| port.parse().map_err(|_| wrong()))?;
        if host.is_empty() || !query.is_empty() {
            return Err(wrong());
        }
        NbdServer::Tcp(host.into(), port)
    };
    Ok(NbdSpec { server, export })
}

/// Splits a text at the first occurrence of a byte, which is removed.
fn split(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|byte| *byte == at)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Spec {
        text.parse().unwrap()
    }

    #[test]
    fn format_is_taken_from_prefix_or_file_extension() {
        assert_eq!(parse("/srv/a.img"), Spec::file(Format::Raw, "/srv/a.img"));
        assert_eq!(parse("/srv/a.qcow2"), Spec::file(Format::Qcow2, "/srv/a.qcow2"));
        assert_eq!(parse("A.VHD"), Spec::file(Format::Vhd, "A.VHD"));
        assert_eq!(parse("raw:/srv/a.qcow2"), Spec::file(Format::Raw, "/srv/a.qcow2"));
        assert_eq!(parse("aio:/srv/a"), Spec::file(Format::Raw, "/srv/a"));
        assert_eq!(parse("vpc:x:y"), Spec::file(Format::Vhd, "x:y"));
        assert_eq!(parse("./x:y"), Spec::file(Format::Raw, "./x:y"));
        let path = PathBuf::from("/a:b");
        let snapshot = Some("be/fore".into());
        assert_eq!(
            parse("qcow2@be/fore:/a:b"),
            Spec::File { format: Format::Qcow2, path, snapshot }
        );
    }

    #[test]
    fn nbd_ram_and_overlay_specs_parse() {
        let tcp = |host: &str, port, export: &str| {
            Spec::Nbd(NbdSpec { server: NbdServer::Tcp(host.into(), port), export: export.into() })
        };
        assert_eq!(parse("nbd://h"), tcp("h", NBD_PORT, ""));
        assert_eq!(parse("nbd://h:1/a%20b/c"), tcp("h", 1, "a b/c"));
        assert_eq!(parse("nbd://[::1]:1/x"), tcp("::1", 1, "x"));
        let unix = NbdSpec { server: NbdServer::Unix("/run/x:y".into()), export: "e".into() };
        assert_eq!(parse("nbd+unix:///e?socket=/run/x:y"), Spec::Nbd(unix));
        assert_eq!(parse("ram:64M"), Spec::Ram { bytes: 64 << 20 });
        let below = Spec::Ram { bytes: 512 };
        assert_eq!(parse("overlay:ram:512"), Spec::Overlay(Box::new(below)));
    }

    #[test]
    fn spec_text_round_trips() {
        for text in [
            "raw:/a b",
            "qcow2@s:/a",
            "vmdk:a",
            "vhd:a",
            "nbd://h:1/e",
            "nbd://[::1]:1/e",
            "nbd+unix:///e?socket=/s",
            "ram:1024",
            "overlay:qcow2:/a",
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
    }

    #[test]
    fn spec_with_non_utf8_path_round_trips() {
        let bytes: Vec<u8> = (1..=255).collect();
        let path = Path::new(OsStr::from_bytes(&bytes));
        for format in [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhd] {
            let spec = Spec::Overlay(Box::new(Spec::file(format, path)));
            assert_eq!(Spec::from_bytes(&spec.to_bytes()), Ok(spec));
        }
        let named = Spec::from_bytes(b"/srv/\xff.qcow2").unwrap();
        assert_eq!(named, Spec::file(Format::Qcow2, OsStr::from_bytes(b"/srv/\xff.qcow2")));
        let server = NbdServer::Unix(path.into());
        let nbd = Spec::Nbd(NbdSpec { server, export: "50%?&".into() });
        assert_eq!(Spec::from_bytes(&nbd.to_bytes()), Ok(nbd.clone()));
        assert_eq!(parse(&nbd.to_string()), nbd);
    }

    #[test]
    fn invalid_spec_is_rejected() {
        for text in [
            "",
            "raw:",
            "zip:/a",
            "vhdx:/a",
            "/srv/a.VDI",
            "qcow2@:/a",
            "ram:",
            "ram:0",
            "ram:1",
            "ram:64Q",
            "nbd:",
            "nbd://",
            "ram:99999999999999999999",
            "ram:9999999999999T",
            "nbd:///x",
            "nbd://h:x/",
            "nbd+unix:///x",
            "nbd+unix://h/x?socket=/s",
            "nbd://h/%zz",
            "nbd://[::1",
            "overlay:",
            "overlay:zip:/a",
        ] {
            assert!(text.parse::<Spec>().is_err(), "{text}");
        }
    }
}
