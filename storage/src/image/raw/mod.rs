//! Raw images: the disk's contents without metadata, in a file or on a block device.

mod device;
mod direct;
pub(super) mod poll;

use super::error::ImageError;
use super::file::{Access, FileHandle};
use super::files::DeviceProperties;
use super::provider::ImageFiles;
use super::storage::Storage;
use super::{Disk, DiskOptions, ImageOptions};
use crate::engine::offload::ThreadPool;
use crate::engine::store::FileStore;
use crate::engine::{Discard, Geometry};
use alloc::string::ToString;
use alloc::sync::Arc;
use rustix::fs::{ioctl_blkpbszget, ioctl_blksszget};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Threads for discards: enough to utilize a device. A discard that hangs blocks only other
/// discards.
const DISCARD_THREADS: usize = 2;

/// Opens a raw image.
pub(super) fn open(
    path: &Path,
    options: ImageOptions,
    files: &dyn ImageFiles,
) -> Result<(Storage, Geometry), ImageError> {
    let disk = RawDisk::open(path, options, files)?;
    disk.serve(path)
}

/// A file or block device whose bytes are those of the disk.
pub(super) struct RawDisk {
    file: File,
    properties: DeviceProperties,
    pub geometry: Geometry,
}

impl RawDisk {
    /// Opens a raw image.
    pub fn open(
        path: &Path,
        options: ImageOptions,
        files: &dyn ImageFiles,
    ) -> Result<Self, ImageError> {
        let access = Access { write: !options.read_only, direct: options.direct, lock: true };
        let handle = files.named(path)?;
        let mut file = handle.open(access)?;
        let other = |error: io::Error| ImageError::Other { path: path.to_path_buf(), error };
        let size = file.seek(SeekFrom::End(0)).map_err(other)?;
        let logical = if handle.is_block_device() {
            Some(ioctl_blksszget(&file).map_err(|e| other(e.into()))?)
        } else {
            None
        };
        Self::new(&handle, file, size, logical.unwrap_or(512), options)
    }

    /// Takes the first `size` bytes of a file or block device as a disk, with logical sectors of at
    /// least `logical` bytes.
    pub fn new(
        handle: &FileHandle,
        file: File,
        size: u64,
        logical: u32,
        options: ImageOptions,
    ) -> Result<Self, ImageError> {
        let path = handle.path();
        let other = |error: io::Error| ImageError::Other { path: path.to_path_buf(), error };
        let block_device = handle.is_block_device();
        let properties = match needs_properties(block_device, options.direct) {
            true => handle.device(&file).map_err(other)?,
            false => DeviceProperties::default(),
        };
        let system = |e: Errno| other(e.into());
        let physical = if block_device { ioctl_blkpbszget(&file).map_err(system)? } else { 4096 };
        let least = match options.direct {
            true => direct::sector_size(path, &file, &properties, size)?,
            false => logical,
        };
        let mut geometry = geometry(path, size, logical.max(least), physical, options.read_only)?;
        geometry.copied = options.direct && properties.granted;
        if block_device && !options.read_only {
            geometry.discard = device::discard(&file, &properties, geometry.physical_sector_size)
                .map_err(other)?;
        }
        Ok(Self { file, properties, geometry })
    }

    /// Starts the threads that serve it.
    pub fn serve(self, path: &Path) -> Result<(Storage, Geometry), ImageError> {
        let other = |error: io::Error| ImageError::Other { path: path.to_path_buf(), error };
        let Self { file, properties, geometry } = self;
        let block_device = file.metadata().map_err(other)?.file_type().is_block_device();
        let discards = match geometry.discard {
            Some(_) if block_device => Some(Arc::new(discard_pool(&file).map_err(other)?)),
            _ => None,
        };
        Ok((Storage::File { file, discards, properties }, geometry))
    }
}

/// Returns whether the properties of its device affect a raw disk.
pub(super) const fn needs_properties(block_device: bool, direct: bool) -> bool {
    block_device || direct
}

fn discard_pool(device: &File) -> io::Result<ThreadPool> {
    ThreadPool::start("discard", DISCARD_THREADS, Arc::new(FileStore::new(device.try_clone()?)?))
}

/// Checks a size and returns a geometry in which any physical sector can be discarded.
pub(super) fn geometry(
    path: &Path,
    size: u64,
    logical: u32,
    physical: u32,
    read_only: bool,
) -> Result<Geometry, ImageError> {
    if size == 0 || !size.is_multiple_of(u64::from(logical)) {
        return Err(ImageError::OddSize { path: path.to_path_buf(), size, unit: logical });
    }
    let physical = physical.max(logical);
    Ok(Geometry {
        sectors: size / 512,
        sector_size: logical,
        physical_sector_size: physical,
        copied: false,
        read_only,
        discard: (!read_only).then_some(Discard {
            granularity: physical,
            alignment: 0,
            secure: false,
        }),
    })
}

/// Returns the geometry with the sector sizes that the disk's options request.
pub(super) fn with_sector_options(geometry: Geometry, disk: &Disk) -> Result<Geometry, ImageError> {
    let DiskOptions { sector, physical, discard, .. } = disk.options;
    let sector_size = sector.unwrap_or(geometry.sector_size);
    let size = geometry.sectors.saturating_mul(512);
    if sector_size < geometry.sector_size || !size.is_multiple_of(sector_size.into()) {
        let least = geometry.sector_size;
        return Err(ImageError::Sectors { disk: disk.spec.to_string(), sector_size, least, size });
    }
    let physical_sector_size = physical.unwrap_or(geometry.physical_sector_size).max(sector_size);
    let larger = |d: Discard| Discard { granularity: d.granularity.max(sector_size), ..d };
    let discard = geometry.discard.filter(|_| discard != Some(false)).map(larger);
    Ok(Geometry { sector_size, physical_sector_size, discard, ..geometry })
}
