//! VHD images, fixed and dynamic. Images with a parent (differencing) are not supported.

mod dynamic;
pub mod footer;
mod layout;

use super::error::ImageError;
use super::file::Access;
use super::metadata::{ContentError, FileContent, Meter};
use super::provider::ImageFiles;
use super::raw::RawDisk;
use super::storage::Storage;
use super::{Format, ImageOptions, raw};
use crate::engine::{Discard, Geometry};
use alloc::boxed::Box;
use alloc::sync::Arc;
use dynamic::Dynamic;
use footer::{Footer, Kind};
use std::fs::File;
use std::path::Path;

/// Opens a VHD image.
pub(super) fn open(
    path: &Path,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<(Storage, Geometry), ImageError> {
    let write = !options.read_only;
    match OpenVhd::open(path, options, files, meter)? {
        OpenVhd::Fixed(disk) => disk.serve(path),
        OpenVhd::Dynamic(file, footer, geometry) => {
            let wrap =
                |error| ImageError::Content { path: path.into(), format: Format::Vhd, error };
            let dynamic = Dynamic::open(file, &footer, write, meter).map_err(wrap)?;
            Ok((Storage::Store(Arc::new(dynamic)), geometry))
        }
    }
}

/// Checks an image as [`open`] does, and changes nothing. Also returns whether its disk is served
/// through io_uring from its file.
pub(super) fn resolve(
    path: &Path,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<(Geometry, bool), ImageError> {
    match OpenVhd::open(path, options, files, meter)? {
        OpenVhd::Fixed(disk) => Ok((disk.geometry, true)),
        OpenVhd::Dynamic(file, footer, geometry) => {
            let wrap =
                |error| ImageError::Content { path: path.into(), format: Format::Vhd, error };
            check(file, &footer, meter).map_err(wrap)?;
            Ok((geometry, false))
        }
    }
}

/// An image whose footer was read.
enum OpenVhd {
    Fixed(RawDisk),
    Dynamic(File, Box<Footer>, Geometry),
}

impl OpenVhd {
    fn open(
        path: &Path,
        options: ImageOptions,
        files: &dyn ImageFiles,
        meter: &Meter,
    ) -> Result<Self, ImageError> {
        let write = !options.read_only;
        let wrap = |error| ImageError::Content { path: path.into(), format: Format::Vhd, error };
        let handle = files.named(path)?;
        let file = handle.open(Access { write, direct: false, lock: true })?;
        let footer = Footer::read(&FileContent::new(&file, meter).map_err(|e| wrap(e.into()))?);
        let footer = footer.map_err(wrap)?;
        match footer.kind {
            Kind::Fixed => {
                let file = if options.direct {
                    // Its lock would conflict with that of the second descriptor.
                    drop(file);
                    handle.open(Access { write, direct: true, lock: true })?
                } else {
                    file
                };
                RawDisk::new(&handle, file, footer.size, 512, options).map(Self::Fixed)
            }
            Kind::Dynamic { block, .. } => {
                let mut geometry = raw::geometry(path, footer.size, 512, 4096, options.read_only)?;
                // Blocks stay allocated; only their data is released.
                geometry.discard =
                    write.then_some(Discard { granularity: block, alignment: 0, secure: false });
                Ok(Self::Dynamic(file, Box::new(footer), geometry))
            }
        }
    }
}

/// Checks the parts of an image that the footer does not cover.
pub(super) fn check(file: File, footer: &Footer, meter: &Meter) -> Result<(), ContentError> {
    match footer.kind {
        Kind::Fixed => Ok(()),
        Kind::Dynamic { .. } => Dynamic::open(file, footer, false, meter).map(drop),
    }
}
