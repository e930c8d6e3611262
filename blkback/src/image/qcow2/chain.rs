//! The files a qcow2 image is made of: itself, and what it rests on, down to the last.

use super::super::Format;
use super::super::content::{FileContent, Meter};
use super::super::error::ImageError;
use super::super::file::{self, Access};
use super::header::Header;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use std::path::{Path, PathBuf};

/// Longer chains are a mistake: a file that rests on itself, most likely.
const LONGEST: usize = 200;

/// One qcow2 image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// Where it is.
    pub path: PathBuf,
    /// What its header says.
    pub header: Header,
    /// The file its data is in, if it is not in itself.
    pub data: Option<PathBuf>,
    /// What it rests on.
    pub below: Option<Below>,
}

/// What an image rests on.
#[derive(Debug)]
pub enum Below {
    /// Another.
    Qcow2(Box<Layer>),
    /// A raw file or a block device.
    Raw(PathBuf),
}

/// Reads the headers of an image and of all it rests on. Unless `lock` is asked for, files that are
/// being written are read as they are at the moment.
///
/// # Errors
/// Any [`ImageError`].
pub fn read(path: &Path, lock: bool, meter: &Meter) -> Result<Layer, ImageError> {
    read_above(path, lock, meter, &mut Vec::new())
}

fn read_above(
    path: &Path,
    lock: bool,
    meter: &Meter,
    seen: &mut Vec<PathBuf>,
) -> Result<Layer, ImageError> {
    let access = Access { write: false, direct: false, lock };
    let (file, _) = file::open(path, access)?;
    let wrap = |error| ImageError::Content { path: path.into(), format: Format::Qcow2, error };
    let content = FileContent::new(&file, meter).map_err(|e| wrap(e.into()))?;
    let header = Header::read(&content).map_err(wrap)?;
    // The library keeps it.
    meter.keep(u64::from(header.l1.1) * 8).map_err(wrap)?;
    drop(file);
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    seen.push(real);
    let beside = |name: &str| path.parent().unwrap_or(Path::new("")).join(name);
    let data = header.data_file.as_deref().map(beside);
    let below = match &header.backing {
        Some(name) => {
            let format = header.backing_format.as_deref();
            Some(below(path, name, format, lock, meter, seen)?)
        }
        None => None,
    };
    Ok(Layer { path: path.into(), header, data, below })
}

fn below(
    path: &Path,
    name: &str,
    format: Option<&str>,
    lock: bool,
    meter: &Meter,
    seen: &mut Vec<PathBuf>,
) -> Result<Below, ImageError> {
    let fail = |what| Err(ImageError::Chain { path: path.into(), below: String::from(name), what });
    // `file:` is QEMU's way to say that a colon in the rest is one.
    let plain = match name.split_once(':') {
        Some(("file", rest)) => rest,
        Some((word, _)) if !word.contains('/') => {
            return fail("which is no file; put the data into files, with qemu-img rebase");
        }
        _ => name,
    };
    let file = path.parent().unwrap_or(Path::new("")).join(plain);
    let real = std::fs::canonicalize(&file).unwrap_or_else(|_| file.clone());
    if seen.contains(&real) || seen.len() >= LONGEST {
        return fail("and comes back to itself by that; repair it with qemu-img rebase -u");
    }
    match format {
        Some("raw" | "file" | "host_device") => Ok(Below::Raw(file)),
        Some("qcow2") => {
            read_above(&file, lock, meter, seen).map(|layer| Below::Qcow2(Box::new(layer)))
        }
        Some(_) => fail("which is neither raw nor qcow2; make it so with qemu-img convert"),
        None => fail(
            "without a word about its format, which is never guessed; \
             write it into the image with qemu-img rebase -u -F FORMAT -b FILE IMAGE",
        ),
    }
}
