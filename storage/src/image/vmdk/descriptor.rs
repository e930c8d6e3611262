//! The descriptor: the extents of a disk, as text.

use super::super::metadata::ContentError;
use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use encoding_rs::{Encoding, UTF_8};

/// Maximum number of extents of a disk: 4 TiB in files of 2 GiB. Each uses a file descriptor of
/// this process.
const MOST_EXTENTS: usize = 2048;

/// The contents of a descriptor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Descriptor {
    /// The type of the disk, such as `monolithicSparse`.
    pub kind: String,
    /// Offset of the content id in the text, and the number of its digits.
    pub content_id: Option<(u64, usize)>,
    /// The encoding of file names, if it is not UTF-8.
    pub encoding: Option<&'static Encoding>,
    /// The extents, in the order of the disk.
    pub extents: Vec<Extent>,
}

/// An extent of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Number of sectors of the disk in it.
    pub sectors: u64,
    /// Whether it is writable.
    pub write: bool,
    /// Its storage.
    pub data: ExtentData,
}

/// The storage of an extent. File names are bytes, because their encoding is not reliable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExtentData {
    /// A flat file, from a sector on.
    Flat(Vec<u8>, u64),
    /// A file of grains.
    Sparse(Vec<u8>),
    /// No storage: reads as zeroes.
    Zero,
}

impl Descriptor {
    /// Parses and checks a descriptor.
    ///
    /// # Errors
    /// [`ContentError`].
    pub fn parse(text: &[u8]) -> Result<Self, ContentError> {
        if !text.starts_with(b"# Disk DescriptorFile") {
            return Err(ContentError::NotThis("vmdk"));
        }
        let mut this =
            Self { kind: String::new(), content_id: None, encoding: None, extents: Vec::new() };
        let mut at = 0;
        // Checked first: the message about other unsupported features suggests a conversion, which
        // would lose the parent's data.
        let parent = |line: &[u8]| {
            let id = line.strip_prefix(b"parentCID=").map(<[u8]>::trim_ascii_end);
            id.is_some_and(|id| !id.eq_ignore_ascii_case(b"ffffffff"))
        };
        if text.split(|byte| matches!(byte, b'\n' | b'\r')).any(parent) {
            return Err(ContentError::Parent);
        }
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let end = line.iter().rposition(|byte| !b"\0\r\n ".contains(byte));
            this.line(at, line.get(..end.map_or(0, |end| end + 1)).unwrap_or_default())?;
            at += line.len() as u64;
        }
        if this.extents.is_empty() {
            return Err(ContentError::corrupt("its descriptor names no extent"));
        }
        Ok(this)
    }

    fn line(&mut self, at: u64, line: &[u8]) -> Result<(), ContentError> {
        if let Some(id) = line.strip_prefix(b"CID=") {
            let digits = id.len();
            let is_id = (1..=8).contains(&digits) && id.iter().all(u8::is_ascii_hexdigit);
            self.content_id = is_id.then_some((at + 4, digits));
        } else if let Some(encoding) = line.strip_prefix(b"encoding=") {
            let label = encoding.trim_ascii();
            let label = label.strip_prefix(b"\"").unwrap_or(label);
            let label = label.strip_suffix(b"\"").unwrap_or(label);
            self.encoding = Encoding::for_label(label).filter(|encoding| *encoding != UTF_8);
        } else if let Some(kind) = line.strip_prefix(b"createType=") {
            self.kind = String::from_utf8_lossy(kind).trim_matches('"').into();
        } else if let Some(extent) = Extent::parse(line)? {
            if self.extents.len() == MOST_EXTENTS {
                let what = format!("more than {MOST_EXTENTS} extents");
                return Err(ContentError::unsupported(what));
            }
            self.extents.push(extent);
        }
        Ok(())
    }
}

impl Descriptor {
    /// Returns the possible names of a file: decoded to UTF-8, as most systems store it, and
    /// unchanged.
    pub fn spellings<'a>(&self, name: &'a [u8]) -> impl Iterator<Item = Cow<'a, [u8]>> + use<'a> {
        let encoding = self.encoding.filter(|_| !name.is_ascii());
        let decoded = encoding.and_then(|encoding| {
            encoding.decode_without_bom_handling_and_without_replacement(name)
        });
        let decoded = decoded.map(|name| Cow::Owned(name.into_owned().into_bytes()));
        decoded.into_iter().chain([Cow::Borrowed(name)])
    }
}

impl Extent {
    /// Parses a line such as `RW 8192 FLAT "a-flat.vmdk" 0`, in sectors.
    fn parse(line: &[u8]) -> Result<Option<Self>, ContentError> {
        let wrong = || {
            let line = String::from_utf8_lossy(line);
            ContentError::corrupt(format!("its descriptor says {line:?}"))
        };
        let (head, rest) = split(line, b'"').unwrap_or((line, b""));
        let mut words = words(head);
        let write = match words.next() {
            Some(b"RW") => true,
            Some(b"RDONLY") => false,
            Some(b"NOACCESS") => return Err(ContentError::unsupported("an extent of no access")),
            _ => return Ok(None),
        };
        let sectors: u64 = words.next().and_then(number).ok_or_else(wrong)?;
        let kind = words.next().ok_or_else(wrong)?;
        let name = || split(rest, b'"').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong);
        let data = match kind {
            b"FLAT" | b"VMFS" => {
                let (name, offset) = name()?;
                let offset = match self::words(offset).next() {
                    Some(offset) => number(offset).ok_or_else(wrong)?,
                    None => 0,
                };
                ExtentData::Flat(name.into(), offset)
            }
            b"SPARSE" => ExtentData::Sparse(name()?.0.into()),
            b"ZERO" => ExtentData::Zero,
            other => {
                let what = format!("an extent of kind {}", String::from_utf8_lossy(other));
                return Err(ContentError::unsupported(what));
            }
        };
        if sectors == 0 || sectors > u64::MAX / 1024 {
            return Err(wrong());
        }
        Ok(Some(Self { sectors, write, data }))
    }
}

/// Splits a text at the first occurrence of a byte, which is removed.
fn split(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|byte| *byte == at)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

fn number(digits: &[u8]) -> Option<u64> {
    core::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    const HEAD: &str = "# Disk DescriptorFile\nversion=1\nCID=12c2909a\nparentCID=ffffffff\r\n\
                        createType=\"custom\"\n";

    #[test]
    fn descriptor_with_extents_of_every_kind_is_parsed() {
        let text = format!(
            "{HEAD}\n# Extent description\nRW 63 FLAT \"a b.vmdk\" 7\nRDONLY 1 VMFS \"c\"\n\
             RW 2 SPARSE \"d\"\nRW 3 ZERO\n\n#DDB\nddb.x = \"RW\"\n\0\0\0"
        );
        let found = Descriptor::parse(text.as_bytes()).unwrap();
        let extent = |sectors, write, data| Extent { sectors, write, data };
        assert_eq!(
            found.extents,
            vec![
                extent(63, true, ExtentData::Flat("a b.vmdk".into(), 7)),
                extent(1, false, ExtentData::Flat("c".into(), 0)),
                extent(2, true, ExtentData::Sparse("d".into())),
                extent(3, true, ExtentData::Zero),
            ]
        );
        assert_eq!(found.kind, "custom");
        let (at, digits) = found.content_id.unwrap();
        assert_eq!(&text[at as usize..][..digits], "12c2909a");
    }

    #[test]
    fn malformed_descriptor_is_rejected() {
        for line in [
            "",
            "RW",
            "RW x FLAT \"a\" 0",
            "RW 1",
            "RW 0 ZERO",
            "RW 1 FLAT",
            "RW 1 FLAT \"\" 0",
            "RW 1 FLAT \"a",
            "RW 1 FLAT \"a\" x",
            "RW 18446744073709551615 ZERO",
            "RW 1 SESPARSE \"a\"",
            "NOACCESS 1 FLAT \"a\" 0",
            "RW 1 ZERO\nparentCID=12c2909a",
        ] {
            assert!(Descriptor::parse(format!("{HEAD}{line}\n").as_bytes()).is_err(), "{line}");
        }
        assert!(Descriptor::parse(b"RW 1 ZERO").is_err());
    }
}
