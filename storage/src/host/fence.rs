//! Waits until the kernel has finished the I/O of an earlier process for a disk.

use crate::image::ImageError;
use alloc::format;
use alloc::string::{String, ToString};
use pvio_recordfile::RecordDir;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The longest time for which Linux's gntdev keeps pages mapped after their last use.
///
/// It finds the pages of a dead process in use by I/O, and checks them again after 5 ms, 10 ms, 15
/// ms and so on (`__gnttab_unmap_refs_async`, `GNTTAB_UNMAP_REFS_DELAY` times `age` + 1). Check
/// number n follows the previous one after 5n ms, and occurs 5n(n + 1)/2 ms after the first. If the
/// I/O ends after a time t, the check that detects this has 5n(n - 1)/2 ms < t, and occurs at most
/// 5n ms later: less than √(10 ms · t) + 5 ms. That is 0.95 s for 90 s, the deadline of a fence;
/// timers add two jiffies, 20 ms at most.
pub const UNMAPPING: Duration = Duration::from_secs(1);

/// Returns the name of a disk's fence.
#[must_use]
pub fn fence_name(disk: &str) -> String {
    format!("{disk}.fence")
}

/// Waits until no I/O of an earlier process for the disk is in flight. Returns the descriptor that
/// the next process waits for. Nothing may be read or written before. Blocks, and is therefore called
/// on a separate thread.
///
/// # Errors
/// [`ImageError::Fence`], also if it takes longer than `patience`.
pub fn pass_fence(
    records: &RecordDir,
    disk: &str,
    patience: Duration,
) -> Result<OwnedFd, ImageError> {
    let failed = |error: io::Error| ImageError::Fence { disk: disk.to_string(), error };
    let fence = records.fence(&fence_name(disk)).map_err(failed)?;
    if !fence.is_passed().map_err(failed)? {
        tracing::info!(disk, "waiting for the I/O of an earlier process to end");
        if !fence.wait(patience).map_err(failed)? {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
    }
    fence.hold().map_err(failed)
}

/// Removes the fence of a disk that was detached.
pub fn remove_fence(records: &RecordDir, disk: &str) {
    if let Err(error) = records.fence(&fence_name(disk)).and_then(|fence| fence.remove()) {
        tracing::warn!(disk, %error, "the fence cannot be removed");
    }
}
