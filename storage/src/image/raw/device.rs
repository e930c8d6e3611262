//! Discard parameters and transfer limits of a block device.

use crate::engine::Discard;
use crate::engine::uring::TransferLimits;
use crate::image::files::DeviceProperties;
use pvio_blockdev::Forget;
use rustix::fs::ioctl_blksszget;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;

/// Returns the discard parameters of a block device; `None` if it does not support discard.
///
/// # Errors
/// The device is not open for writing, or the query fails.
pub(super) fn discard(
    file: &File,
    properties: &DeviceProperties,
    physical: u32,
) -> io::Result<Option<Discard>> {
    if !Forget::Discard.is_known(file)? {
        return Ok(None);
    }
    Ok(Some(Discard {
        granularity: properties.discard_granularity.unwrap_or(0).max(physical),
        alignment: properties.discard_alignment.unwrap_or(0),
        secure: Forget::Securely.is_known(file)?,
    }))
}

/// Returns the logical sector size of the device in bytes. `None` for a file system on several
/// devices or on none.
pub(super) fn logical_sector(
    file: &File,
    properties: &DeviceProperties,
) -> io::Result<Option<u32>> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(Some(ioctl_blksszget(file)?));
    }
    Ok(properties.logical_block_size)
}

/// Returns the transfer limits of the device; minimal ones if the kernel does not report them.
pub(super) fn limits(file: &File, properties: &DeviceProperties) -> io::Result<TransferLimits> {
    let DeviceProperties { max_sectors_kb, max_segments, chunk_sectors, start, .. } = *properties;
    let (Some(kib), Some(pages)) = (max_sectors_kb, max_segments) else {
        return Ok(TransferLimits::default());
    };
    let start = match file.metadata()?.file_type().is_block_device() {
        true => Some(start.unwrap_or(0).saturating_mul(512)),
        false => None,
    };
    let (bytes, chunk) = (u64::from(kib) << 10, u64::from(chunk_sectors.unwrap_or(0)) * 512);
    Ok(TransferLimits { bytes, pages: pages as usize, chunk, start })
}
