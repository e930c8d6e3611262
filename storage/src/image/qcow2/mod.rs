//! qcow2 images. This module checks the header and the chain of files; `imago` does the rest.
//!
//! The library receives every file already open and locked, and opens none on its own: this module
//! decides which files a chain has, and in which format each is read. A backing file without a
//! named format is rejected, because its content may have been written by a guest as a raw disk.

pub mod chain;
mod changes;
pub mod header;
mod layout;
mod refcounts;
mod snapshot;
mod tables;
mod write_order;
mod writer;

use super::error::ImageError;
use super::escaped::EscapedPath;
use super::file::Access;
use super::library::{Library, LibraryImage, Ordered, failed, storage};
use super::metadata::{ContentError, FileContent, Meter};
use super::provider::ImageFiles;
use super::storage::Opened;
use super::{Format, ImageOptions, raw};
use crate::engine::{Discard, Geometry};
use alloc::format;
use alloc::sync::Arc;
use chain::{Backing, Layer};
use header::{Header, Snapshot, incompatible};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use layout::RawHeader;
use pvio_imagefile::ImageFile;
use snapshot::SnapshotStore;
use std::io;
use std::path::Path;
use writer::Writer;

/// Opens an image with its chain of backing files.
pub(super) fn open(
    path: &Path,
    snapshot: Option<&str>,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<Opened, ImageError> {
    let mut layer = read_chain(path, options, files, meter)?;
    if !options.read_only && layer.needs_repair() {
        repair(&layer, meter)?;
        layer.header.incompatible &= !incompatible::DIRTY;
    }
    check_complete(&layer, meter)?;
    let (geometry, snapshot) = measure(&layer, snapshot, options)?;
    if let Some(snapshot) = snapshot {
        return Ok((Arc::new(SnapshotStore::open(&layer, snapshot, meter)?), geometry));
    }
    let access = Access { write: !options.read_only, direct: options.direct, lock: true };
    if access.write {
        return Ok((Arc::new(Writer::open(&layer, access, meter)?), geometry));
    }
    let open = || open_layer(&layer, access, None);
    Ok((Arc::new(Library::open(path, Format::Qcow2, false, open)?), geometry))
}

/// Checks an image as [`open`] does, and changes nothing. The reference counts of an image that is
/// repaired before it is written are checked only then.
pub(super) fn resolve(
    path: &Path,
    snapshot: Option<&str>,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<Geometry, ImageError> {
    let layer = read_chain(path, options, files, meter)?;
    if options.read_only || !layer.needs_repair() {
        check_complete(&layer, meter)?;
    }
    let (geometry, snapshot) = measure(&layer, snapshot, options)?;
    if let Some(snapshot) = snapshot {
        SnapshotStore::open(&layer, snapshot, meter)?;
        return Ok(geometry);
    }
    if !options.read_only {
        Writer::check(&layer, meter)?;
    }
    // Also opens the backing files as they will be used.
    let access = Access { write: false, direct: options.direct, lock: true };
    Library::open(path, Format::Qcow2, false, || open_layer(&layer, access, None))?;
    Ok(geometry)
}

/// Reads the headers of an image and its backing files, and checks their features.
fn read_chain(
    path: &Path,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<Layer, ImageError> {
    let file = files.named(path)?;
    let roots = files.references(&file)?;
    let layer = chain::read(file, &*roots, true, meter)?;
    check_features(&layer, !options.read_only)?;
    Ok(layer)
}

/// Returns the geometry of the disk, and its snapshot if one is to be served.
fn measure<'a>(
    layer: &'a Layer,
    snapshot: Option<&str>,
    options: ImageOptions,
) -> Result<(Geometry, Option<&'a Snapshot>), ImageError> {
    let path = layer.path();
    if let Some(name) = snapshot {
        let snapshot = snapshot::find(layer, name)?;
        if !options.read_only {
            return Err(ImageError::OnlyRead(format!("qcow2@{name}:{}", EscapedPath::new(path))));
        }
        return Ok((raw::geometry(path, snapshot.size, 512, 4096, true)?, Some(snapshot)));
    }
    let mut geometry = raw::geometry(path, layer.header.size, 512, 4096, options.read_only)?;
    geometry.discard = (!options.read_only).then_some(Discard {
        granularity: geometry.physical_sector_size,
        alignment: 0,
        secure: false,
    });
    Ok((geometry, None))
}

/// Repairs an image that its last writer did not close, before it is written again.
fn repair(layer: &Layer, meter: &Meter) -> Result<(), ImageError> {
    let wrap =
        |error| ImageError::Content { path: layer.path().into(), format: Format::Qcow2, error };
    let system = |error: io::Error| wrap(error.into());
    let access = Access { write: true, direct: false, lock: true };
    let file = layer.file.open(access)?;
    let content = FileContent::new(&file, meter).map_err(system)?;
    // The header is read again under the lock, because another writer may have changed it before.
    let header = Header::read(&content).map_err(wrap)?;
    let raised = refcounts::raise_counts(&file, &content, &header).map_err(wrap)?;
    if header.version >= 3 {
        refcounts::set_dirty(&file, header.incompatible, false).map_err(system)?;
    }
    if header.version >= 3 || raised > 0 {
        tracing::warn!(
            image = %EscapedPath::new(layer.path()), raised,
            "a disk image had not been closed: its reference counts were repaired"
        );
    }
    Ok(())
}

/// Returns the bytes of the disk in a snapshot.
pub(super) fn snapshot_size(layer: &Layer, name: &str) -> Result<u64, ImageError> {
    snapshot::find(layer, name).map(|snapshot| snapshot.size)
}

/// Rejects a truncated image. The caller has checked that the image is consistent. Backing files
/// are checked as well, because they have no writer.
fn check_complete(layer: &Layer, meter: &Meter) -> Result<(), ImageError> {
    let wrap =
        |error| ImageError::Content { path: layer.path().into(), format: Format::Qcow2, error };
    let access = Access { write: false, direct: false, lock: false };
    let file = layer.file.open(access)?;
    let content = FileContent::new(&file, meter).map_err(|e| wrap(e.into()))?;
    refcounts::check_complete(&content, &layer.header).map_err(wrap)?;
    match &layer.backing {
        Some(chain::Backing::Qcow2(backing)) => check_complete(backing, meter),
        Some(chain::Backing::Raw(_)) | None => Ok(()),
    }
}

/// Opens an image for reading without a lock, and closes it.
pub(super) fn try_open(layer: &Layer, meter: &Meter) -> Result<(), ImageError> {
    check_complete(layer, meter)?;
    let access = Access { write: false, direct: false, lock: false };
    Library::open(layer.path(), Format::Qcow2, false, || open_layer(layer, access, None)).map(drop)
}

/// Rejects features that the library does not support, with a specific message.
pub(super) fn check_features(layer: &Layer, write: bool) -> Result<(), ImageError> {
    let header = &layer.header;
    let fail = |error| {
        Err(ImageError::Content { path: layer.path().into(), format: Format::Qcow2, error })
    };
    let has = |bit| header.incompatible & bit != 0;
    if has(incompatible::CORRUPT) {
        return fail(ContentError::corrupt("another program has marked it as corrupt"));
    }
    // The reference counts may be wrong, but reading does not need them.
    if !write && has(incompatible::DIRTY) {
        tracing::warn!(
            image = %EscapedPath::new(layer.path()),
            "a disk image that had not been closed is opened read-only"
        );
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
        return fail(ContentError::unsupported(
            "writing to an image whose data is in another file",
        ));
    }
    match &layer.backing {
        Some(Backing::Qcow2(layer)) => check_features(layer, false),
        Some(Backing::Raw(_)) | None => Ok(()),
    }
}

/// Opens an image, backing files first.
fn open_layer(
    layer: &Layer,
    access: Access,
    ordered: Option<Ordered>,
) -> Result<LibraryImage, ImageError> {
    let backing = match &layer.backing {
        Some(backing) => Some(Arc::new(open_backing(backing, access)?)),
        None => None,
    };
    let data = match &layer.data {
        Some(file) => Some(storage(file, Access { write: false, ..access }, None)?),
        None => None,
    };
    let mut file = storage(&layer.file, access, ordered)?.hiding(layer.header.not_utf8.clone());
    let features = layer.header.incompatible;
    // The library rejects images with this mark.
    if !access.write && features & incompatible::DIRTY != 0 {
        let features = (features & !incompatible::DIRTY).to_be_bytes();
        file = file.reading_as(RawHeader::INCOMPATIBLE_FEATURES, features.to_vec());
    }
    Qcow2::<ImageFile, Arc<LibraryImage>>::builder(file)
        .write(access.write)
        .backing(backing)
        .data_file(data)
        .open(DenyImplicitOpenGate::default())
        .map(FormatAccess::new)
        .map_err(|e| failed(layer.path(), Format::Qcow2, e))
}

fn open_backing(backing: &Backing, access: Access) -> Result<LibraryImage, ImageError> {
    let access = Access { write: false, ..access };
    match backing {
        Backing::Qcow2(layer) => open_layer(layer, access, None),
        Backing::Raw(file) => Raw::builder(storage(file, access, None)?)
            .open(DenyImplicitOpenGate::default())
            .map(FormatAccess::new)
            .map_err(|e| failed(file.path(), Format::Raw, e)),
    }
}
