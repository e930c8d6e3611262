//! VMDK images whose extents are flat files: `imago` reads those, and only reads.
//!
//! The sparse and compressed kinds are another format behind the same name; they are refused.

use super::content::ContentError;
use super::error::ImageError;
use super::file::{self, Access};
use super::library::{Library, LibraryImage, failed, storage};
use super::{Format, ImageOptions, Opened, raw};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use imago::file::File;
use imago::format::gate::ImplicitOpenGate;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The longest descriptor: QEMU's is 20 sectors.
const LONGEST: u64 = 1 << 20;

/// Opens one.
pub(super) fn open(path: &Path, options: ImageOptions) -> Result<Opened, ImageError> {
    if !options.read_only {
        return Err(ImageError::OnlyRead(format!("vmdk:{}", path.display())));
    }
    check(path)?;
    let access = Access { write: false, direct: options.direct, lock: true };
    let library = Library::open(path, Format::Vmdk, false, || open_flat(path, access))?;
    let geometry = raw::geometry(path, library.size(), 512, 4096, true)?;
    Ok((Arc::new(library), geometry))
}

/// Bytes of the disk, looked up without a lock.
pub(super) fn size(path: &Path) -> Result<u64, ImageError> {
    check(path)?;
    let access = Access { write: false, direct: false, lock: false };
    Library::open(path, Format::Vmdk, false, || open_flat(path, access)).map(|l| l.size())
}

/// Tells the kinds apart that the library does not.
fn check(path: &Path) -> Result<(), ImageError> {
    let fail = |error| Err(ImageError::Content { path: path.into(), format: Format::Vmdk, error });
    let (descriptor, _) = file::open(path, Access { write: false, direct: false, lock: false })?;
    let mut head = [0; 21];
    let got = descriptor.read_at(&mut head, 0).unwrap_or_default();
    if head.starts_with(b"KDMV") || head.starts_with(b"COWD") {
        return fail(ContentError::unsupported("a sparse or compressed extent"));
    }
    if Format::resembled(&head[..got]) != Some(Format::Vmdk) {
        return fail(ContentError::NotThis("vmdk"));
    }
    let len = descriptor.metadata().map_or(0, |m| m.len());
    if len > LONGEST {
        return fail(ContentError::corrupt(format!("its descriptor has {len} bytes")));
    }
    let mut text = alloc::vec![0; len as usize];
    let got = descriptor.read_at(&mut text, 0).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(..got).unwrap_or_default());
    for (name, needed) in text.lines().filter_map(flat_extent) {
        // Others are not opened, and refused by name.
        if name.contains('/') {
            continue;
        }
        let extent = path.with_file_name(name);
        let there = match std::fs::metadata(&extent) {
            Ok(there) => there.len(),
            Err(_) => return Err(ImageError::Missing(extent)),
        };
        if there < needed {
            let what = format!("its extent {name} needs {needed} bytes, and has {there}");
            return fail(ContentError::truncated(what));
        }
    }
    Ok(())
}

/// A flat extent's file, and the bytes it must have: `RW 8192 FLAT "a-flat.vmdk" 0`, in sectors.
fn flat_extent(line: &str) -> Option<(&str, u64)> {
    let (words, rest) = line.split_once('"')?;
    let (name, offset) = rest.split_once('"')?;
    let mut words = words.split_whitespace().skip(1);
    let sectors: u64 = words.next()?.parse().ok()?;
    words.next().filter(|kind| *kind == "FLAT")?;
    let offset: u64 = offset.split_whitespace().next().unwrap_or("0").parse().ok()?;
    Some((name, sectors.checked_add(offset)?.checked_mul(512)?))
}

fn open_flat(path: &Path, access: Access) -> Result<LibraryImage, ImageError> {
    // The descriptor is text of any length, which cannot be read around the cache.
    let descriptor = storage(path, Access { direct: false, ..access })?;
    let dir = path.parent().unwrap_or(Path::new("")).to_path_buf();
    Vmdk::<File>::builder(descriptor)
        .storage_open_options(StorageOpenOptions::new().direct(access.direct))
        .open(Beside { dir, access })
        .map(FormatAccess::new)
        .map_err(|e| failed(path, Format::Vmdk, e))
}

/// Opens extents that lie beside their descriptor, and nothing else: a descriptor from elsewhere
/// must not name any file of this host.
struct Beside {
    dir: PathBuf,
    access: Access,
}

impl ImplicitOpenGate<File> for Beside {
    fn open_format<F: FormatDriverBuilder<File>>(&mut self, _: F) -> io::Result<LibraryImage> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "an image it rests on"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<File> {
        let path = options.get_filename().unwrap_or(Path::new(""));
        if path.parent() != Some(&self.dir) {
            let what = format!("an extent that is not beside it ({})", path.display());
            return Err(io::Error::new(io::ErrorKind::Unsupported, what));
        }
        storage(path, self.access).map_err(io::Error::other)
    }
}
