//! qcow2 images: the header and the chain of files are ours to check, the rest is `imago`'s.
//!
//! The library is given every file already open and locked, and nothing to find by itself: which
//! files a chain has, and in which format each is read, is decided here. A file below that is named
//! without its format is refused, since a guest may once have written it as a raw disk.

pub mod chain;
pub mod header;
mod refcounts;
mod snapshot;

use super::content::{ContentError, FileContent};
use super::error::ImageError;
use super::file::{self, Access};
use super::library::{Library, LibraryImage, failed, storage};
use super::{Format, ImageOptions, Opened, raw};
use crate::engine::Discard;
use crate::engine::store::Store;
use alloc::format;
use alloc::sync::Arc;
use chain::{Below, Layer};
use header::{Header, incompatible};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use snapshot::SnapshotStore;
use std::io;
use std::path::Path;

/// Opens an image with all it rests on.
pub(super) fn open(
    path: &Path,
    snapshot: Option<&str>,
    options: ImageOptions,
) -> Result<Opened, ImageError> {
    let mut layer = chain::read(path, true)?;
    if !options.read_only && layer.header.incompatible & incompatible::DIRTY != 0 {
        repair(&layer)?;
        layer.header.incompatible &= !incompatible::DIRTY;
    }
    check_features(&layer, !options.read_only)?;
    is_whole(&layer)?;
    if let Some(name) = snapshot {
        let snapshot = snapshot::find(&layer, name)?;
        if !options.read_only {
            return Err(ImageError::OnlyRead(format!("qcow2@{name}:{}", path.display())));
        }
        let geometry = raw::geometry(path, snapshot.size, 512, 4096, true)?;
        return Ok((Arc::new(SnapshotStore::open(&layer, snapshot)?), geometry));
    }
    let mut geometry = raw::geometry(path, layer.header.size, 512, 4096, options.read_only)?;
    let cluster = layer.header.cluster() as u32;
    // Version 2 has no clusters that read as zeroes by themselves.
    geometry.discard = (!options.read_only && layer.header.version >= 3)
        .then_some(Discard { granularity: cluster, alignment: 0 });
    let access = Access { write: !options.read_only, direct: options.direct, lock: true };
    let library = Library::open(path, Format::Qcow2, access.write, || open_layer(&layer, access))?;
    let store: Arc<dyn Store> =
        if access.write { Arc::new(Marked::new(library, &layer)?) } else { Arc::new(library) };
    Ok((store, geometry))
}

/// Mends an image that was not closed by who wrote it last, before it is written again.
fn repair(layer: &Layer) -> Result<(), ImageError> {
    let wrap =
        |error| ImageError::Content { path: layer.path.clone(), format: Format::Qcow2, error };
    let system = |error: io::Error| wrap(error.into());
    let access = Access { write: true, direct: false, lock: true };
    let (file, _) = file::open(&layer.path, access)?;
    let content = FileContent::new(&file).map_err(system)?;
    // Nobody else writes it now; whoever did before we had the lock may have changed it.
    let header = Header::read(&content).map_err(wrap)?;
    let raised = refcounts::raise(&file, &content, &header).map_err(wrap)?;
    refcounts::set_dirty(&file, &header, false).map_err(system)?;
    tracing::warn!(
        image = %layer.path.display(), raised,
        "a disk image was not closed by who wrote it last; its reference counts are in order again"
    );
    Ok(())
}

/// An image that is marked as not closed for as long as it is written. Version 2 has no such mark.
struct Marked {
    /// Before the mark: it is closed first.
    library: Library,
    mark: Option<Mark>,
}

struct Mark {
    file: std::fs::File,
    header: Header,
    /// Whether the image is in order.
    closed: bool,
}

impl Marked {
    fn new(library: Library, layer: &Layer) -> Result<Self, ImageError> {
        if layer.header.version < 3 {
            return Ok(Self { library, mark: None });
        }
        let access = Access { write: true, direct: false, lock: false };
        let (file, _) = file::open(&layer.path, access)?;
        let header = layer.header.clone();
        refcounts::set_dirty(&file, &header, true)
            .map_err(|error| ImageError::Other { path: layer.path.clone(), error })?;
        Ok(Self { library, mark: Some(Mark { file, header, closed: false }) })
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        let closed = self.library.close();
        if let Some(mark) = &mut self.mark {
            mark.closed = closed;
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.closed
            && let Err(error) = refcounts::set_dirty(&self.file, &self.header, false)
        {
            tracing::error!(%error, "a disk image stays marked as not closed");
        }
    }
}

impl Store for Marked {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.library.read(at, into)
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.library.write(at, from)
    }

    fn flush(&self) -> io::Result<()> {
        self.library.flush()
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.library.discard(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.library.write_zeroes(at, len)
    }
}

/// Bytes of the disk in a snapshot.
pub(super) fn snapshot_size(layer: &Layer, name: &str) -> Result<u64, ImageError> {
    snapshot::find(layer, name).map(|snapshot| snapshot.size)
}

/// Refuses an image that was cut short. To be asked of one that is in order; what it rests on may be
/// written by nobody, and is looked at too.
fn is_whole(layer: &Layer) -> Result<(), ImageError> {
    let wrap =
        |error| ImageError::Content { path: layer.path.clone(), format: Format::Qcow2, error };
    let access = Access { write: false, direct: false, lock: false };
    let (file, _) = file::open(&layer.path, access)?;
    let content = FileContent::new(&file).map_err(|e| wrap(e.into()))?;
    refcounts::is_whole(&content, &layer.header).map_err(wrap)?;
    match &layer.below {
        Some(chain::Below::Qcow2(below)) => is_whole(below),
        Some(chain::Below::Raw(_)) | None => Ok(()),
    }
}

/// Opens an image to be read, without a lock, and lets go of it.
pub(super) fn try_open(layer: &Layer) -> Result<(), ImageError> {
    is_whole(layer)?;
    let access = Access { write: false, direct: false, lock: false };
    Library::open(&layer.path, Format::Qcow2, false, || open_layer(layer, access)).map(drop)
}

/// Refuses what the library would not understand, in words of our own.
pub(super) fn check_features(layer: &Layer, write: bool) -> Result<(), ImageError> {
    let header = &layer.header;
    let fail =
        |error| Err(ImageError::Content { path: layer.path.clone(), format: Format::Qcow2, error });
    let has = |bit| header.incompatible & bit != 0;
    if has(incompatible::CORRUPT) {
        return fail(ContentError::corrupt("it is marked so by a program that found it out"));
    }
    if has(incompatible::DIRTY) {
        return fail(ContentError::corrupt(
            "it was not closed by who wrote it last; attached to be written it is repaired",
        ));
    }
    if has(incompatible::COMPRESSION) {
        return fail(ContentError::unsupported("clusters compressed by zstd"));
    }
    if has(incompatible::EXTENDED_L2) {
        return fail(ContentError::unsupported("extended L2 entries"));
    }
    let known = incompatible::DIRTY
        | incompatible::CORRUPT
        | incompatible::DATA_FILE
        | incompatible::COMPRESSION
        | incompatible::EXTENDED_L2;
    if header.incompatible & !known != 0 {
        let what = format!("unknown features {:#x}", header.incompatible & !known);
        return fail(ContentError::unsupported(what));
    }
    if has(incompatible::DATA_FILE) && write {
        return fail(ContentError::unsupported("its data in another file, to be written"));
    }
    match &layer.below {
        Some(Below::Qcow2(layer)) => check_features(layer, false),
        Some(Below::Raw(_)) | None => Ok(()),
    }
}

/// Opens an image from the bottom up.
fn open_layer(layer: &Layer, access: Access) -> Result<LibraryImage, ImageError> {
    let below = match &layer.below {
        Some(below) => Some(Arc::new(open_below(below, access)?)),
        None => None,
    };
    let data = match &layer.data {
        Some(path) => Some(storage(path, Access { write: false, ..access })?),
        None => None,
    };
    let file = storage(&layer.path, access)?;
    Qcow2::<File, Arc<LibraryImage>>::builder(file)
        .write(access.write)
        .backing(below)
        .data_file(data)
        .open(DenyImplicitOpenGate::default())
        .map(FormatAccess::new)
        .map_err(|e| failed(&layer.path, Format::Qcow2, e))
}

fn open_below(below: &Below, access: Access) -> Result<LibraryImage, ImageError> {
    let access = Access { write: false, ..access };
    match below {
        Below::Qcow2(layer) => open_layer(layer, access),
        Below::Raw(path) => Raw::builder(storage(path, access)?)
            .open(DenyImplicitOpenGate::default())
            .map(FormatAccess::new)
            .map_err(|e| failed(path, Format::Raw, e)),
    }
}
