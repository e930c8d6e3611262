//! Properties of the block device that a file is, or that its file system is on (sysfs).

use crate::engine::Discard;
use crate::engine::uring::TransferLimits;
use alloc::format;
use pvio_blockdev::Forget;
use rustix::fs::{ioctl_blksszget, major, minor};
use std::fs::{File, read_dir, read_link, read_to_string};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Returns the discard parameters of a block device; `None` if it does not support discard.
///
/// # Errors
/// The device is not open for writing, or the query fails.
pub(super) fn discard(file: &File, physical: u32) -> io::Result<Option<Discard>> {
    if !Forget::Discard.is_known(file)? {
        return Ok(None);
    }
    let granularity = number(file, "queue/discard_granularity")?.unwrap_or(0);
    Ok(Some(Discard {
        granularity: granularity.max(physical),
        // A partition has its own alignment.
        alignment: number(file, "discard_alignment")?.unwrap_or(0),
        secure: Forget::Securely.is_known(file)?,
    }))
}

/// Returns the logical sector size of the device in bytes. `None` for a file system on several
/// devices or on none.
pub(super) fn logical_sector(file: &File) -> io::Result<Option<u32>> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(Some(ioctl_blksszget(file)?));
    }
    number(file, "queue/logical_block_size")
}

/// Returns whether the device has poll queues. `None` for a file system on several devices or on
/// none.
pub(super) fn polls(file: &File) -> io::Result<Option<bool>> {
    Ok(number(file, "queue/io_poll")?.map(|polls| polls != 0))
}

/// Returns the transfer limits of the device; minimal ones if the kernel does not report them.
pub(super) fn limits(file: &File) -> io::Result<TransferLimits> {
    let kib = number(file, "queue/max_sectors_kb")?;
    let pages = number(file, "queue/max_segments")?;
    let (Some(kib), Some(pages)) = (kib, pages) else { return Ok(TransferLimits::default()) };
    let chunk = number(file, "queue/chunk_sectors")?.unwrap_or(0);
    let start = match file.metadata()?.file_type().is_block_device() {
        true => Some(u64::from(number(file, "start")?.unwrap_or(0)) * 512),
        false => None,
    };
    let (bytes, chunk) = (u64::from(kib) << 10, u64::from(chunk) * 512);
    Ok(TransferLimits { bytes, pages: pages as usize, chunk, start })
}

/// Returns whether the device is served by another domain, directly or below device mappers. Such a
/// device grants its buffers to that domain, and pages of a third domain cannot be granted.
pub(super) fn grants(file: &File) -> io::Result<bool> {
    Ok(is_granted(&place(file)?, DEPTH))
}

/// Maximum depth of nested device mappers.
const DEPTH: u32 = 8;

fn is_granted(device: &Path, depth: u32) -> bool {
    // A partition's parent directory is its disk.
    let of_xen = |bus: &str| {
        read_link(device.join(bus)).is_ok_and(|bus| bus.file_name() == Some("xen".as_ref()))
    };
    let below = || read_dir(device.join("slaves")).into_iter().flatten().flatten();
    of_xen("device/subsystem")
        || of_xen("../device/subsystem")
        || depth > 0 && below().any(|part| is_granted(&part.path(), depth - 1))
}

/// Returns the device's directory in sysfs.
fn place(file: &File) -> io::Result<PathBuf> {
    let data = file.metadata()?;
    let device = if data.file_type().is_block_device() { data.rdev() } else { data.dev() };
    Ok(format!("/sys/dev/block/{}:{}", major(device), minor(device)).into())
}

fn number(file: &File, name: &str) -> io::Result<Option<u32>> {
    let device = place(file)?;
    // A partition's parent directory is its disk.
    let paths = [device.join(name), device.join("..").join(name)];
    let found = paths.iter().find_map(|path| read_to_string(path).ok());
    Ok(found.and_then(|text| text.trim().parse().ok()))
}
