//! The files of a qcow2 image: the image itself and its chain of backing files.

use super::super::Format;
use super::super::error::ImageError;
use super::super::escaped::EscapedPath;
use super::super::file::{Access, FileHandle};
use super::super::metadata::{FileContent, Meter};
use super::super::provider::References;
use super::header::{Header, incompatible};
use alloc::boxed::Box;
use alloc::string::ToString;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Maximum length of a chain. A longer one is an error, most likely a file that is its own backing
/// file.
const LONGEST: usize = 200;

/// A qcow2 image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// The file of the image.
    pub file: FileHandle,
    /// The image's header.
    pub header: Header,
    /// The external data file, if there is one.
    pub data: Option<FileHandle>,
    /// The backing file, if there is one.
    pub backing: Option<Backing>,
}

impl Layer {
    /// Path of the image, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Returns whether its last writer may not have closed it, so that it is repaired before it is
    /// written. Version 2 has no mark for that.
    pub(super) fn needs_repair(&self) -> bool {
        self.header.incompatible & incompatible::DIRTY != 0 || self.header.version < 3
    }
}

/// A backing file.
#[derive(Debug)]
pub enum Backing {
    /// Another qcow2 image.
    Qcow2(Box<Layer>),
    /// A raw file or a block device.
    Raw(Box<FileHandle>),
}

/// Reads the headers of an image and its backing files. With `lock`, files that are being written
/// are rejected; without it, they are read in their current state.
///
/// # Errors
/// Any [`ImageError`].
pub(in crate::image) fn read(
    file: FileHandle,
    roots: &dyn References,
    lock: bool,
    meter: &Meter,
) -> Result<Layer, ImageError> {
    read_layer(file, roots, lock, meter, None)
}

/// An image above another one, up to the image that the operator named.
struct ChainLink<'a> {
    file: &'a FileHandle,
    above: Option<&'a ChainLink<'a>>,
    depth: usize,
}

impl ChainLink<'_> {
    fn contains(&self, file: &FileHandle) -> bool {
        self.file.is_same(file) || self.above.is_some_and(|above| above.contains(file))
    }
}

fn read_layer(
    file: FileHandle,
    roots: &dyn References,
    lock: bool,
    meter: &Meter,
    above: Option<&ChainLink<'_>>,
) -> Result<Layer, ImageError> {
    let wrap =
        |error| ImageError::Content { path: file.path().into(), format: Format::Qcow2, error };
    let open = file.open(Access { write: false, direct: false, lock })?;
    let content = FileContent::new(&open, meter).map_err(|e| wrap(e.into()))?;
    let header = Header::read(&content).map_err(wrap)?;
    // The library holds the first-level table in memory.
    meter.retain(u64::from(header.l1.1) * 8).map_err(wrap)?;
    drop(open);
    // Without its feature bit, the name of a data file has no meaning.
    let has_data_file = header.incompatible & incompatible::DATA_FILE != 0;
    let data = match header.data_file.as_deref().filter(|_| has_data_file) {
        Some(name) => Some(roots.find(&file, Path::new(OsStr::from_bytes(name)))?),
        None => None,
    };
    let here = ChainLink { file: &file, above, depth: above.map_or(1, |above| above.depth + 1) };
    let backing = match &header.backing {
        Some(name) => {
            let format = header.backing_format.as_deref();
            Some(read_backing(name, format, roots, lock, meter, &here)?)
        }
        None => None,
    };
    Ok(Layer { file, header, data, backing })
}

fn read_backing(
    name: &[u8],
    format: Option<&[u8]>,
    roots: &dyn References,
    lock: bool,
    meter: &Meter,
    here: &ChainLink<'_>,
) -> Result<Backing, ImageError> {
    let fail = |what, remedy| {
        let below = EscapedPath::new(OsStr::from_bytes(name)).to_string();
        Err(ImageError::Chain { path: here.file.path().into(), below, what, remedy })
    };
    // In QEMU, the prefix `file:` means that further colons are part of the path.
    let colon = name.iter().position(|byte| *byte == b':');
    let plain = match colon.map(|at| name.split_at(at)) {
        Some((b"file", rest)) => rest.get(1..).unwrap_or_default(),
        Some((word, _)) if !word.contains(&b'/') => {
            return fail(
                "only files are opened",
                "make one image of both where the backing file can be opened, with qemu-img convert \
                 of this image",
            );
        }
        _ => name,
    };
    let file = roots.find(here.file, Path::new(OsStr::from_bytes(plain)))?;
    if here.contains(&file) || here.depth >= LONGEST {
        return fail(
            "it depends on the image itself, or on too many files",
            "restore the image from a backup, or copy it again",
        );
    }
    match format {
        Some(b"raw" | b"file" | b"host_device") => Ok(Backing::Raw(Box::new(file))),
        Some(b"qcow2") => {
            let layer = read_layer(file, roots, lock, meter, Some(here))?;
            Ok(Backing::Qcow2(Box::new(layer)))
        }
        Some(_) => fail(
            "its format is neither raw nor qcow2",
            "make one image of both on the host it was copied from, with qemu-img convert of this \
             image",
        ),
        None => fail(
            "the image does not name its format, which is never detected",
            "if you know the format of that file, write it into a copy of this image with \
             qemu-img rebase -u -F FORMAT -b FILE COPY, where FILE is the name as it is here",
        ),
    }
}
