//! Whether a disk's reads and writes can be polled, found out when it is opened: a guest has no use
//! for an error that only its host can mend.

use super::{Disk, ImageError, device};
use crate::engine::uring::{TransferLimits, UringEngine};
use alloc::string::ToString;
use rustix::fs::{OFlags, SeekFrom, fcntl_getfl, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;

/// Bytes of the trial at most.
const TRIAL: u64 = 4096;

/// Whether a file or block device can be polled, and for what.
///
/// # Errors
/// [`ImageError::PollBuffered`], [`ImageError::NoPoll`].
pub(super) fn check(file: &File, disk: &Disk) -> Result<TransferLimits, ImageError> {
    let name = || disk.spec.to_string();
    let no = |error: io::Error| ImageError::NoPoll { disk: name(), error };
    if !fcntl_getfl(file).map_err(|e| no(e.into()))?.contains(OFlags::DIRECT) {
        return Err(ImageError::PollBuffered(name()));
    }
    trial(file).map_err(no)?;
    // The trial says nothing of the device where the file has no data yet, and older kernels
    // (before 6.11) wait for an interrupt where there is no queue to be polled.
    if device::polls(file).map_err(no)? == Some(false) {
        return Err(no(Errno::OPNOTSUPP.into()));
    }
    device::limits(file).map_err(no)
}

/// Reads the first data there is; of a file without any, its beginning.
fn trial(file: &File) -> io::Result<()> {
    let size = seek(file, SeekFrom::End(0))?;
    // A block device, and a file system without holes, may not know the question.
    let data = seek(file, SeekFrom::Data(0)).unwrap_or(0);
    let at = data / TRIAL * TRIAL;
    let len = size.saturating_sub(at).min(TRIAL);
    UringEngine::try_polled(file.try_clone()?.into(), at, len as usize)
}
