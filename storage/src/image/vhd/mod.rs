//! VHD images, fixed and dynamic. Images with a parent (differencing) are not supported.

mod dynamic;
pub mod footer;
mod layout;

use super::error::ImageError;
use super::file::{self, Access};
use super::metadata::{ContentError, FileContent, Meter};
use super::storage::Storage;
use super::{Format, ImageOptions, raw};
use crate::engine::{Discard, Geometry};
use alloc::sync::Arc;
use dynamic::Dynamic;
use footer::{Footer, Kind};
use std::fs::File;
use std::path::Path;

/// Opens a VHD image.
pub(super) fn open(
    path: &Path,
    options: ImageOptions,
    meter: &Meter,
) -> Result<(Storage, Geometry), ImageError> {
    let write = !options.read_only;
    let wrap = |error| ImageError::Content { path: path.into(), format: Format::Vhd, error };
    let (file, _) = file::open(path, Access { write, direct: false, lock: true })?;
    let footer = Footer::read(&FileContent::new(&file, meter).map_err(|e| wrap(e.into()))?);
    let footer = footer.map_err(wrap)?;
    match footer.kind {
        Kind::Fixed => {
            let file = if options.direct {
                // Its lock would conflict with that of the second descriptor.
                drop(file);
                file::open(path, Access { write, direct: true, lock: true })?.0
            } else {
                file
            };
            raw::serve(path, file, footer.size, 512, options)
        }
        Kind::Dynamic { block, .. } => {
            let mut geometry = raw::geometry(path, footer.size, 512, 4096, options.read_only)?;
            // Blocks stay allocated; only their data is released.
            geometry.discard =
                write.then_some(Discard { granularity: block, alignment: 0, secure: false });
            let dynamic = Dynamic::open(file, &footer, write, meter).map_err(wrap)?;
            Ok((Storage::Store(Arc::new(dynamic)), geometry))
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
