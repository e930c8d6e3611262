//! Alignment that bypassing the page cache (`O_DIRECT`) requires.

use super::device;
use crate::image::ImageError;
use crate::image::files::DeviceProperties;
use rustix::fs::{AtFlags, StatxFlags, statx};
use std::fs::File;
use std::path::Path;

/// `STATX_DIOALIGN`, from Linux 6.1 on.
const DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);
/// Smallest and largest logical sector of a disk, in bytes.
const SMALLEST: u32 = 512;
const LARGEST: u32 = 4096;

/// Returns the logical sector size, in bytes, of a disk of `size` bytes in a file or block device
/// that is open with `O_DIRECT`. With this size, requests of whole sectors are aligned in the file
/// and in memory.
///
/// # Errors
/// [`ImageError::NoDirect`] if there is no suitable size, [`ImageError::DirectSize`] if the disk is
/// not a whole number of sectors.
pub(super) fn sector_size(
    path: &Path,
    file: &File,
    properties: &DeviceProperties,
    size: u64,
) -> Result<u32, ImageError> {
    let other = |error| ImageError::Other { path: path.into(), error };
    let unit = match statx(file, c"", AtFlags::EMPTY_PATH, DIOALIGN) {
        Ok(found) if found.stx_mask & DIOALIGN.bits() != 0 => {
            // Zero if the file does not support `O_DIRECT`.
            if found.stx_dio_offset_align == 0 {
                return Err(ImageError::NoDirect(path.into()));
            }
            found.stx_dio_offset_align.max(found.stx_dio_mem_align)
        }
        // An older kernel, or a file system that does not report it: the requirement of its device.
        _ => device::logical_sector(file, properties).map_err(other)?.unwrap_or(SMALLEST),
    };
    let unit = unit.max(SMALLEST);
    if unit > LARGEST || !unit.is_power_of_two() {
        return Err(ImageError::NoDirect(path.into()));
    }
    // Guests support two sector sizes.
    let unit = if unit > SMALLEST { LARGEST } else { SMALLEST };
    if unit > SMALLEST && !size.is_multiple_of(unit.into()) {
        return Err(ImageError::DirectSize { path: path.into(), size, unit });
    }
    Ok(unit)
}
