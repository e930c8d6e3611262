//! Properties of the block device that a file is, or that its file system is on (sysfs).

use rustix::fs::{major, minor};
use std::format;
use std::fs::{File, read_dir, read_link, read_to_string};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The properties of a block device that only `/sys` reports. A process that cannot open files
/// receives them together with the descriptor. All are `None` for a file system on several devices
/// or on none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DeviceProperties {
    /// `queue/logical_block_size`, in bytes.
    pub logical_block_size: Option<u32>,
    /// `queue/discard_granularity`, in bytes.
    pub discard_granularity: Option<u32>,
    /// `discard_alignment`, in bytes. A partition has its own.
    pub discard_alignment: Option<u32>,
    /// `queue/io_poll`: whether the device has poll queues.
    pub io_poll: Option<u32>,
    /// `queue/max_sectors_kb`, in KiB.
    pub max_sectors_kb: Option<u32>,
    /// `queue/max_segments`.
    pub max_segments: Option<u32>,
    /// `queue/chunk_sectors`, in sectors of 512 bytes.
    pub chunk_sectors: Option<u32>,
    /// `start`: the first sector of a partition, in sectors of 512 bytes.
    pub start: Option<u64>,
    /// Whether the device is served by another domain, directly or below device mappers. Such a
    /// device grants its buffers to that domain, and pages of a third domain cannot be granted.
    pub granted: bool,
}

/// Maximum depth of nested device mappers.
const DEPTH: u32 = 8;

impl DeviceProperties {
    /// Reads the properties of the device that a file is or that its file system is on.
    ///
    /// # Errors
    /// The file's own properties cannot be determined.
    pub fn read(file: &File) -> io::Result<Self> {
        let device = directory(file)?;
        let queue = |name: &str| number(&device, &format!("queue/{name}"));
        Ok(Self {
            logical_block_size: queue("logical_block_size"),
            discard_granularity: queue("discard_granularity"),
            discard_alignment: number(&device, "discard_alignment"),
            io_poll: queue("io_poll"),
            max_sectors_kb: queue("max_sectors_kb"),
            max_segments: queue("max_segments"),
            chunk_sectors: queue("chunk_sectors"),
            start: number(&device, "start"),
            granted: is_granted(&device, DEPTH),
        })
    }
}

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
fn directory(file: &File) -> io::Result<PathBuf> {
    let data = file.metadata()?;
    let device = if data.file_type().is_block_device() { data.rdev() } else { data.dev() };
    Ok(format!("/sys/dev/block/{}:{}", major(device), minor(device)).into())
}

fn number<T: core::str::FromStr>(device: &Path, name: &str) -> Option<T> {
    // A partition's parent directory is its disk.
    let paths = [device.join(name), device.join("..").join(name)];
    let found = paths.iter().find_map(|path| read_to_string(path).ok());
    found.and_then(|text| text.trim().parse().ok())
}
