//! Waiting for the end of what an earlier process began for a disk.

use crate::image::ImageError;
use alloc::format;
use alloc::string::{String, ToString};
use pvio_recordfile::RecordDir;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

fn name(disk: &str) -> String {
    format!("{disk}.fence")
}

/// Returns once no I/O of an earlier process for the disk is under way, with what the next one waits for;
/// fails if that takes longer than `patience`. Nothing may be read or written before. For a thread that may
/// wait.
pub(super) fn pass(
    records: &RecordDir,
    disk: &str,
    patience: Duration,
) -> Result<OwnedFd, ImageError> {
    let failed = |error: io::Error| ImageError::Fence { disk: disk.to_string(), error };
    let fence = records.fence(&name(disk)).map_err(failed)?;
    if !fence.is_passed().map_err(failed)? {
        tracing::info!(disk, "waiting for the I/O of an earlier process to end");
        if !fence.wait(patience).map_err(failed)? {
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
