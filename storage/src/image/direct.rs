//! What reading and writing around the page cache (`O_DIRECT`) asks for.

use super::{ImageError, device};
use rustix::fs::{AtFlags, StatxFlags, statx};
use std::fs::File;
use std::path::Path;

/// `STATX_DIOALIGN`, from Linux 6.1 on.
const DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);
/// Bytes of the smallest logical sector of a disk, and of the largest.
const SMALLEST: u32 = 512;
const LARGEST: u32 = 4096;

/// Logical sector size, in bytes, of a disk of `size` bytes in a file or block device that is open
/// with `O_DIRECT`. Requests of whole sectors are aligned in the file and in memory then.
///
/// # Errors
/// [`ImageError::NoDirect`] if there is none, [`ImageError::DirectSize`] if the disk is not whole
/// sectors.
pub(super) fn sector_size(path: &Path, file: &File, size: u64) -> Result<u32, ImageError> {
    let other = |error| ImageError::Other { path: path.into(), error };
    let unit = match statx(file, c"", AtFlags::EMPTY_PATH, DIOALIGN) {
        Ok(found) if found.stx_mask & DIOALIGN.bits() != 0 => {
            // Zero for a file that is never read so.
            if found.stx_dio_offset_align == 0 {
                return Err(ImageError::NoDirect(path.into()));
            }
            found.stx_dio_offset_align.max(found.stx_dio_mem_align)
        }
        // An older kernel, or a file system that says nothing: what its device needs.
        _ => device::logical_sector(file).map_err(other)?.unwrap_or(SMALLEST),
    };
    let unit = unit.max(SMALLEST);
    if unit > LARGEST || !unit.is_power_of_two() {
        return Err(ImageError::NoDirect(path.into()));
    }
    // The guest's sectors are of one of two sizes.
    let unit = if unit > SMALLEST { LARGEST } else { SMALLEST };
    if unit > SMALLEST && !size.is_multiple_of(unit.into()) {
        return Err(ImageError::DirectSize { path: path.into(), size, unit });
    }
    Ok(unit)
}
