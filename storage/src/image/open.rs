//! Opening the storage that a specification names: the format or engine that serves it.

use super::error::ImageError;
use super::metadata::Meter;
use super::overlay::Overlay;
use super::reference::ReferencePolicy;
use super::storage::{Opened, Storage};
use super::{Format, ImageOptions, Spec, qcow2, raw, vhd, vmdk};
use crate::engine::nbd::{NbdLink, NbdOptions};
use crate::engine::ram::RamDisk;
use crate::engine::{Discard, Geometry};
use alloc::format;
use alloc::sync::Arc;

/// Opens the storage of a disk.
pub(super) fn open(
    spec: &Spec,
    options: ImageOptions,
    policy: &ReferencePolicy,
    meter: &Meter,
) -> Result<(Storage, Geometry), ImageError> {
    let store = |(store, geometry): Opened| (Storage::Store(store), geometry);
    Ok(match spec {
        Spec::File { format: Format::Raw, path, .. } => raw::open(path, options)?,
        Spec::File { format: Format::Qcow2, path, snapshot } => {
            store(qcow2::open(path, snapshot.as_deref(), options, policy, meter)?)
        }
        Spec::File { format: Format::Vmdk, path, .. } => {
            store(vmdk::open(path, options, policy, meter)?)
        }
        Spec::File { format: Format::Vhd, path, .. } => vhd::open(path, options, meter)?,
        Spec::Ram { bytes } => {
            let disk = RamDisk::new(*bytes).ok_or(ImageError::Memory(*bytes))?;
            let geometry = disk.geometry(options.read_only);
            (Storage::Ram(Arc::new(disk)), geometry)
        }
        Spec::Nbd(nbd) => {
            let nbd_options = NbdOptions { read_only: options.read_only, ..NbdOptions::default() };
            let link = NbdLink::connect(nbd, nbd_options)?;
            let geometry = link.geometry(options.read_only);
            (Storage::Nbd(Arc::new(link)), geometry)
        }
        Spec::Overlay(below) => store(open_overlay(below, options, policy, meter)?),
    })
}

/// Opens a disk for reading, with a writable layer over it.
fn open_overlay(
    below: &Spec,
    options: ImageOptions,
    policy: &ReferencePolicy,
    meter: &Meter,
) -> Result<Opened, ImageError> {
    // The overlay copies data with buffers of any alignment.
    let read = ImageOptions { read_only: true, direct: false };
    let (storage, mut geometry) = open(below, read, policy, meter)?;
    let below = storage
        .into_store()
        .map_err(|error| ImageError::Other { path: format!("{below}").into(), error })?;
    geometry.read_only = options.read_only;
    geometry.discard = (!options.read_only).then_some(Discard {
        granularity: geometry.physical_sector_size,
        alignment: 0,
        secure: false,
    });
    let dir = std::env::temp_dir();
    let overlay = Overlay::new(below, geometry.sectors * 512, &dir);
    let overlay = overlay.map_err(|error| ImageError::Other { path: dir, error })?;
    Ok((Arc::new(overlay), geometry))
}
