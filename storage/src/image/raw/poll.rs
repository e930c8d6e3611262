//! Checks when a disk is opened whether its reads and writes can be polled. Otherwise guests would
//! see errors that only the host's operator can resolve.

use super::device;
use crate::engine::uring::{TransferLimits, UringEngine};
use crate::image::files::DeviceProperties;
use crate::image::{Disk, ImageError};
use alloc::string::ToString;
use rustix::fs::{OFlags, SeekFrom, fcntl_getfl, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;

/// Maximum number of bytes of the trial read.
const TRIAL: u64 = 4096;

/// Checks that a file or block device can be polled. Returns its transfer limits.
///
/// # Errors
/// [`ImageError::PollBuffered`], [`ImageError::NoPoll`].
pub(in crate::image) fn check(
    file: &File,
    properties: &DeviceProperties,
    disk: &Disk,
) -> Result<TransferLimits, ImageError> {
    let name = || disk.spec.to_string();
    let no = |error: io::Error| ImageError::NoPoll { disk: name(), error };
    if !fcntl_getfl(file).map_err(|e| no(e.into()))?.contains(OFlags::DIRECT) {
        return Err(ImageError::PollBuffered(name()));
    }
    trial(file).map_err(no)?;
    // The trial does not reach the device if the file has no data, and kernels before 6.11 wait for
    // an interrupt if there is no poll queue.
    if properties.io_poll == Some(0) {
        return Err(no(Errno::OPNOTSUPP.into()));
    }
    device::limits(file, properties).map_err(no)
}

/// Reads the first data of the file, or its beginning if it has none.
fn trial(file: &File) -> io::Result<()> {
    let size = seek(file, SeekFrom::End(0))?;
    // Block devices, and file systems without holes, may not support this.
    let data = seek(file, SeekFrom::Data(0)).unwrap_or(0);
    let at = data / TRIAL * TRIAL;
    let len = size.saturating_sub(at).min(TRIAL);
    UringEngine::try_polled(file.try_clone()?.into(), at, len as usize)
}
