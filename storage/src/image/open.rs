//! Opening the storage that a specification names: the format or engine that serves it.

use super::error::ImageError;
use super::metadata::Meter;
use super::overlay::Overlay;
use super::provider::{DiskFiles, ImageFiles};
use super::storage::{Opened, Storage};
use super::{Format, ImageOptions, Spec, qcow2, raw, vhd, vmdk};
use crate::engine::nbd::{Dial, Export, NbdOptions, negotiate};
use crate::engine::ram::RamDisk;
use crate::engine::{Discard, Geometry};
use alloc::format;
use alloc::sync::Arc;
use raw::RawDisk;
use std::os::fd::OwnedFd;

/// Opens the storage of a disk.
pub(super) fn open(
    spec: &Spec,
    options: ImageOptions,
    files: &dyn DiskFiles,
    meter: &Meter,
) -> Result<(Storage, Geometry), ImageError> {
    let store = |(store, geometry): Opened| (Storage::Store(store), geometry);
    Ok(match spec {
        Spec::File { format: Format::Raw, path, .. } => raw::open(path, options, files)?,
        Spec::File { format: Format::Qcow2, path, snapshot } => {
            store(qcow2::open(path, snapshot.as_deref(), options, files, meter)?)
        }
        Spec::File { format: Format::Vmdk, path, .. } => {
            store(vmdk::open(path, options, files, meter)?)
        }
        Spec::File { format: Format::Vhd, path, .. } => vhd::open(path, options, files, meter)?,
        Spec::Ram { bytes } => {
            let disk = RamDisk::new(*bytes).ok_or(ImageError::Memory(*bytes))?;
            (Storage::Ram(Arc::new(disk)), RamDisk::geometry_of(*bytes, options.read_only))
        }
        Spec::Nbd(nbd) => {
            let link = files.link(nbd, nbd_options(options))?;
            let geometry = link.geometry(options.read_only);
            (Storage::Nbd(Arc::new(link)), geometry)
        }
        Spec::Overlay(below) => store(open_overlay(below, options, files, meter)?),
    })
}

/// A disk that was resolved.
pub(super) struct Found {
    pub geometry: Geometry,
    /// Whether it is served through io_uring from its file.
    pub is_file: bool,
    /// The connection to its server, after the handshake.
    pub server: Option<(OwnedFd, Export)>,
}

/// Checks the storage of a disk as [`open`] does, and changes nothing.
pub(super) fn resolve(
    spec: &Spec,
    options: ImageOptions,
    files: &dyn ImageFiles,
    dial: &dyn Dial,
    meter: &Meter,
) -> Result<Found, ImageError> {
    let store = |geometry| Found { geometry, is_file: false, server: None };
    Ok(match spec {
        Spec::File { format: Format::Raw, path, .. } => {
            let geometry = RawDisk::open(path, options, files)?.geometry;
            Found { is_file: true, ..store(geometry) }
        }
        Spec::File { format: Format::Qcow2, path, snapshot } => {
            store(qcow2::resolve(path, snapshot.as_deref(), options, files, meter)?)
        }
        Spec::File { format: Format::Vmdk, path, .. } => {
            store(vmdk::resolve(path, options, files, meter)?)
        }
        Spec::File { format: Format::Vhd, path, .. } => {
            let (geometry, is_file) = vhd::resolve(path, options, files, meter)?;
            Found { is_file, ..store(geometry) }
        }
        Spec::Ram { bytes } => store(RamDisk::geometry_of(*bytes, options.read_only)),
        Spec::Nbd(nbd) => {
            let (stream, export) = negotiate(nbd, nbd_options(options), dial)?;
            let server = Some((stream.into(), export));
            Found { server, ..store(export.geometry(options.read_only)) }
        }
        Spec::Overlay(below) => {
            let found = resolve(below, ImageOptions::BELOW_OVERLAY, files, dial, meter)?;
            Found { geometry: overlaid(found.geometry, options), is_file: false, ..found }
        }
    })
}

fn nbd_options(options: ImageOptions) -> NbdOptions {
    NbdOptions { read_only: options.read_only, ..NbdOptions::default() }
}

/// Returns the geometry of an overlay from that of the disk below.
fn overlaid(below: Geometry, options: ImageOptions) -> Geometry {
    let discard = Discard { granularity: below.physical_sector_size, alignment: 0, secure: false };
    Geometry {
        read_only: options.read_only,
        discard: (!options.read_only).then_some(discard),
        ..below
    }
}

/// Opens a disk for reading, with a writable layer over it.
fn open_overlay(
    below: &Spec,
    options: ImageOptions,
    files: &dyn DiskFiles,
    meter: &Meter,
) -> Result<Opened, ImageError> {
    let (storage, geometry) = open(below, ImageOptions::BELOW_OVERLAY, files, meter)?;
    let other = |error| ImageError::Other { path: format!("{below}").into(), error };
    let below = storage.into_store().map_err(other)?;
    let overlay = Overlay::new(below, geometry.sectors * 512, files.scratch()?);
    let overlay =
        overlay.map_err(|error| ImageError::Other { path: std::env::temp_dir(), error })?;
    Ok((Arc::new(overlay), overlaid(geometry, options)))
}
