//! Opening the files that images are in.

use super::error::ImageError;
use super::lock::{self, Use};
use crate::engine::store::{FileStore, Store};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

const O_EXCL: i32 = 0o200;
const O_DIRECT: i32 = 0o40000;

/// How to open a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub write: bool,
    pub direct: bool,
    /// Whether to hold it against other users.
    pub lock: bool,
}

/// Opens and locks a file or block device: one writer, or any number of readers. Also says whether
/// it is a block device.
pub(super) fn open(path: &Path, access: Access) -> Result<(File, bool), ImageError> {
    let name = || path.to_path_buf();
    let wrap = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => ImageError::Missing(name()),
        io::ErrorKind::PermissionDenied if !access.write => ImageError::Permission(name(), ""),
        io::ErrorKind::PermissionDenied => ImageError::Permission(name(), " for writing"),
        io::ErrorKind::ReadOnlyFilesystem => ImageError::Permission(name(), " for writing"),
        io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock => ImageError::Busy(name()),
        io::ErrorKind::InvalidInput if access.direct => ImageError::NoDirect(name()),
        _ => ImageError::Other { path: name(), error },
    };
    // Asked before opening: opening a FIFO would block, and a directory has a poor message.
    let kind = std::fs::metadata(path).map_err(wrap)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::NotADisk(name()));
    }
    // On a block device O_EXCL (without O_CREAT) asks that nobody else has it so, a mount say. Who
    // opens a disk's file a second time has no lock to ask for.
    let exclusive = kind.is_block_device() && access.write && access.lock;
    let exclusive = if exclusive { O_EXCL } else { 0 };
    let direct = if access.direct { O_DIRECT } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(access.write)
        .custom_flags(exclusive | direct)
        .open(path)
        .map_err(wrap)?;
    if access.lock {
        let how = if access.write { Use::Write } else { Use::Read };
        lock::lock(&file, how).map_err(wrap)?;
    }
    Ok((file, kind.is_block_device()))
}

/// Gives a range of a file or block device back: it reads as zeroes.
///
/// # Errors
/// What the system says.
pub(super) fn punch(file: &File, at: u64, len: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, hole, at, len) {
        // A block device that cannot, or not in the middle of its sectors.
        Err(Errno::INVAL | Errno::OPNOTSUPP) if file.metadata()?.file_type().is_block_device() => {
            FileStore::new(file.try_clone()?)?.write_zeroes(at, len)
        }
        other => Ok(other?),
    }
}
