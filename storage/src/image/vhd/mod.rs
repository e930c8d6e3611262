//! VHD images, fixed and dynamic; not those with a parent.

mod dynamic;
pub mod footer;

use super::content::{ContentError, FileContent, Meter};
use super::error::ImageError;
use super::file::{self, Access};
use super::{Format, ImageOptions, Storage, raw};
use crate::engine::{Discard, Geometry};
use alloc::sync::Arc;
use dynamic::Dynamic;
use footer::{Footer, Kind};
use std::fs::File;
use std::path::Path;

/// Opens one.
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
                // Its lock would be in the way of the other's.
                drop(file);
                file::open(path, Access { write, direct: true, lock: true })?.0
            } else {
                file
            };
            raw::serve(path, file, footer.size, 512, options)
        }
        Kind::Dynamic { block, .. } => {
            let mut geometry = raw::geometry(path, footer.size, 512, 4096, options.read_only)?;
            // Blocks are not given back, only what is in them.
            geometry.discard =
                write.then_some(Discard { granularity: block, alignment: 0, secure: false });
            let dynamic = Dynamic::open(file, &footer, write, meter).map_err(wrap)?;
            Ok((Storage::Store(Arc::new(dynamic)), geometry))
        }
    }
}

/// Checks what the footer does not say.
pub(super) fn check(file: File, footer: &Footer, meter: &Meter) -> Result<(), ContentError> {
    match footer.kind {
        Kind::Fixed => Ok(()),
        Kind::Dynamic { .. } => Dynamic::open(file, footer, false, meter).map(drop),
    }
}
