//! Files and block devices that images are in: located once, then opened as often as needed.

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

/// How to open a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub write: bool,
    pub direct: bool,
    /// Whether to hold it against other users.
    pub lock: bool,
}

/// A file or block device that was located. The descriptor (`O_PATH`) refers to that very object:
/// whatever becomes of its path meanwhile, opening the handle opens what was checked.
#[derive(Debug)]
pub struct FileHandle {
    /// For messages.
    path: PathBuf,
    fd: OwnedFd,
    stat: Stat,
    /// The image whose header names this file; `None` if the operator does.
    pub(super) named_by: Option<PathBuf>,
}

impl FileHandle {
    /// Locates a file that the operator names; symbolic links are followed wherever they lead.
    pub(super) fn locate(path: &Path) -> Result<Self, ImageError> {
        let wrap = |e: Errno| explained(path, false, e.into());
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map_err(wrap)?;
        Self::new(fd, path.into(), None)
    }

    /// What a descriptor opened with `O_PATH` refers to.
    pub(super) fn new(
        fd: OwnedFd,
        path: PathBuf,
        named_by: Option<PathBuf>,
    ) -> Result<Self, ImageError> {
        let stat = fstat(&fd).map_err(|e| explained(&path, false, e.into()))?;
        // Never opened: a FIFO blocks, and opening a character device may act on it.
        if !matches!(kind(&stat), FileType::RegularFile | FileType::BlockDevice) {
            return Err(ImageError::NotADisk(path));
        }
        Ok(Self { path, fd, stat, named_by })
    }

    /// Path of the file, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    pub(super) fn is_block_device(&self) -> bool {
        kind(&self.stat) == FileType::BlockDevice
    }

    /// Whether both handles refer to the same file or device, by whatever paths.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let (a, b) = (&self.stat, &other.stat);
        match (self.is_block_device(), other.is_block_device()) {
            (true, true) => a.st_rdev == b.st_rdev,
            (false, false) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
            _ => false,
        }
    }

    /// Opens and locks it: one writer, or any number of readers.
    pub(super) fn open(&self, access: Access) -> Result<File, ImageError> {
        let wrap = |error: io::Error| match &self.named_by {
            // Who asks again when it is free goes by this.
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
        // On a block device O_EXCL (without O_CREAT) fails if anybody else has it so, a mount say.
        // Only one of the descriptors of a disk has it so, the one that has its lock.
        flags.set(OFlags::EXCL, access.write && access.lock && self.is_block_device());
        let link = alloc::format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let file = retry_on_intr(|| rustix::fs::open(&link, flags, Mode::empty()));
        let file = file.map_err(|errno| match errno {
            // The object itself is there: it is held.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn handle_whose_path_is_taken_by_another_file_opens_the_file_that_was_checked() {
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
