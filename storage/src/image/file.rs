//! Files and block devices of images: located once, then opened as often as needed.

use super::error::{ImageError, ReferenceProblem};
use super::lock::{self, Use};
use crate::engine::store::{FileStore, Store};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, Stat, fallocate, fstat};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// The way to open a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub write: bool,
    pub direct: bool,
    /// Whether to lock it against other users.
    pub lock: bool,
}

/// A located file or block device. The descriptor (`O_PATH`) refers to the object itself, so that
/// opening the handle opens the object that was checked, even if its path has changed.
#[derive(Debug)]
pub struct FileHandle {
    /// The path, for messages.
    path: PathBuf,
    fd: OwnedFd,
    stat: Stat,
    /// The image whose header names this file; `None` if the operator names it.
    pub(super) named_by: Option<PathBuf>,
}

impl FileHandle {
    /// Locates a file that the operator names, following symbolic links without restriction.
    pub(super) fn locate(path: &Path) -> Result<Self, ImageError> {
        let wrap = |e: Errno| explained(path, false, e.into());
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map_err(wrap)?;
        Self::new(fd, path.into(), None)
    }

    /// Creates a handle from a descriptor opened with `O_PATH`.
    pub(super) fn new(
        fd: OwnedFd,
        path: PathBuf,
        named_by: Option<PathBuf>,
    ) -> Result<Self, ImageError> {
        let stat = fstat(&fd).map_err(|e| explained(&path, false, e.into()))?;
        // Other file types are never opened: opening a FIFO blocks, and opening a character device
        // may have side effects.
        if !matches!(kind(&stat), FileType::RegularFile | FileType::BlockDevice) {
            return Err(ImageError::NotADisk(path));
        }
        Ok(Self { path, fd, stat, named_by })
    }

    /// Returns the path of the file, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether it is a block device.
    pub(super) fn is_block_device(&self) -> bool {
        kind(&self.stat) == FileType::BlockDevice
    }

    /// Returns whether both handles refer to the same file or device, by whatever paths.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let (a, b) = (&self.stat, &other.stat);
        match (self.is_block_device(), other.is_block_device()) {
            (true, true) => a.st_rdev == b.st_rdev,
            (false, false) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
            _ => false,
        }
    }

    /// Opens and locks the file: one writer, or any number of readers.
    pub(super) fn open(&self, access: Access) -> Result<File, ImageError> {
        let wrap = |error: io::Error| match &self.named_by {
            // The error must stay recognizable as busy, because callers retry on it.
            Some(image) if !is_busy(&error) => ImageError::Reference {
                image: image.clone(),
                name: self.path.clone(),
                problem: ReferenceProblem::System(error),
            },
            _ => explained(&self.path, access.write, error),
        };
        let mut flags = OFlags::CLOEXEC;
        flags |= if access.write { OFlags::RDWR } else { OFlags::RDONLY };
        flags.set(OFlags::DIRECT, access.direct);
        // On a block device, O_EXCL (without O_CREAT) fails if there is another exclusive user,
        // such as a mount. Only one descriptor of a disk is exclusive, the one that has its lock.
        flags.set(OFlags::EXCL, access.write && access.lock && self.is_block_device());
        let link = alloc::format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let file = retry_on_intr(|| rustix::fs::open(&link, flags, Mode::empty()));
        let file = file.map_err(|errno| match errno {
            // The object exists, because the handle holds it.
            Errno::NOENT => wrap(io::Error::other("/proc is not mounted")),
            Errno::INVAL if access.direct => ImageError::NoDirect(self.path.clone()),
            _ => wrap(errno.into()),
        })?;
        let file = File::from(file);
        if access.lock {
            let how = if access.write { Use::Write } else { Use::Read };
            lock::lock(&file, how).map_err(wrap)?;
        }
        Ok(file)
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock)
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn explained(path: &Path, write: bool, error: io::Error) -> ImageError {
    let path = path.to_path_buf();
    match error.kind() {
        io::ErrorKind::NotFound => ImageError::Missing(path),
        io::ErrorKind::PermissionDenied if !write => ImageError::Permission(path, ""),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ImageError::Permission(path, " for writing")
        }
        _ if is_busy(&error) => ImageError::Busy(path),
        _ => ImageError::Other { path, error },
    }
}

/// Opens and locks a file or block device that the operator names. Also returns whether it is a
/// block device.
pub(super) fn open(path: &Path, access: Access) -> Result<(File, bool), ImageError> {
    let handle = FileHandle::locate(path)?;
    Ok((handle.open(access)?, handle.is_block_device()))
}

/// Releases a range of a file or block device, which then reads as zeroes.
///
/// # Errors
/// The system's error.
pub(super) fn punch(file: &File, at: u64, len: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, hole, at, len) {
        // A block device without support for this, or a range that is not aligned to its sectors.
        Err(Errno::INVAL | Errno::OPNOTSUPP) if file.metadata()?.file_type().is_block_device() => {
            FileStore::new(file.try_clone()?)?.write_zeroes(at, len)
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn file_handle_after_path_was_replaced_opens_checked_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, secret) = (dir.path().join("a"), dir.path().join("secret"));
        std::fs::write(&path, "mine").unwrap();
        std::fs::write(&secret, "hers").unwrap();
        let handle = FileHandle::locate(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        for write in [false, true] {
            let file = handle.open(Access { write, direct: false, lock: true }).unwrap();
            let mut found = [0; 4];
            file.read_exact_at(&mut found, 0).unwrap();
            assert_eq!(&found, b"mine");
        }
        assert!(!handle.is_same(&FileHandle::locate(&path).unwrap()));
        assert!(FileHandle::locate(&secret).unwrap().is_same(&FileHandle::locate(&path).unwrap()));
    }
}
