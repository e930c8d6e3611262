//! Waiting for the end of what an earlier process began for a disk.

use crate::image::ImageError;
use alloc::format;
use alloc::string::{String, ToString};
use pvio_recordfile::RecordDir;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the I/O of an earlier process may take. A disk of the kernel's gives a command up after 30 s.
const PATIENCE: Duration = Duration::from_secs(90);

fn name(disk: &str) -> String {
    format!("{disk}.fence")
}

/// Returns once no I/O of an earlier process for the disk is under way, with what the next one waits for.
/// Nothing may be read or written before. For a thread that may wait.
pub(super) fn pass(records: &RecordDir, disk: &str) -> Result<OwnedFd, ImageError> {
    let failed = |error: io::Error| ImageError::Fence { disk: disk.to_string(), error };
    let fence = records.fence(&name(disk)).map_err(failed)?;
    if !fence.is_passed().map_err(failed)? {
        tracing::info!(disk, "waiting for the I/O of an earlier process to end");
        if !fence.wait(PATIENCE).map_err(failed)? {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
    }
    fence.hold().map_err(failed)
}

/// The disk is gone: nobody will wait for it.
pub(super) fn remove(records: &RecordDir, disk: &str) {
    if let Err(error) = records.fence(&name(disk)).and_then(|fence| fence.remove()) {
        tracing::warn!(disk, %error, "the fence is not removed");
    }
}
