//! Files and block devices of images: located once, then opened as often as needed, or opened by
//! another process and handed over.

use super::error::{ImageError, ReferenceProblem};
use super::files::{Description, DeviceProperties, FileRecord, Opened};
use super::lock::{self, Use};
use crate::engine::store::{FileStore, Store};
use alloc::sync::Arc;
use alloc::vec::Vec;
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, Stat, fallocate, fstat};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The way to open a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub write: bool,
    pub direct: bool,
    /// Whether to lock it against other users.
    pub lock: bool,
}

/// A located file or block device.
#[derive(Debug)]
pub struct FileHandle {
    /// The path, for messages.
    path: PathBuf,
    source: Source,
    stat: Stat,
    /// The image whose header names this file; `None` if the operator names it.
    pub(super) named_by: Option<PathBuf>,
}

/// Where the open file descriptions of a file come from.
#[derive(Debug)]
enum Source {
    /// A descriptor of the object itself (`O_PATH`), so that opening the handle opens the object
    /// that was checked, even if its path has changed.
    Located(OwnedFd),
    /// Descriptions that exist. Opening duplicates one of them.
    Open(Vec<Description>),
    /// A descriptor of the object, and the descriptions opened so far, which are also listed for
    /// another process. Opening the same way twice gives the same description.
    Recorded(OwnedFd, Mutex<Vec<Description>>, Opened),
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
        let stat = checked_stat(&fd, &path)?;
        Ok(Self { path, source: Source::Located(fd), stat, named_by })
    }

    /// Creates a handle of a file that another process has opened. It opens nothing.
    pub(super) fn handed(
        descriptions: Vec<Description>,
        path: PathBuf,
        named_by: Option<PathBuf>,
    ) -> Result<Self, ImageError> {
        let Some(first) = descriptions.first() else {
            return Err(ImageError::Changed { path, what: "a file is used that was not before" });
        };
        let stat = checked_stat(&first.fd, &path)?;
        Ok(Self { path, source: Source::Open(descriptions), stat, named_by })
    }

    /// Lists every description that is opened from now on for another process.
    pub(super) fn recorded(self, opened: &Opened) -> Self {
        let source = match self.source {
            Source::Located(fd) => Source::Recorded(fd, Mutex::default(), Arc::clone(opened)),
            other => other,
        };
        Self { source, ..self }
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

    /// Returns the properties of the block device that the file is or that its file system is on.
    pub(super) fn device(&self, file: &File) -> io::Result<DeviceProperties> {
        match &self.source {
            Source::Located(_) | Source::Recorded(..) => DeviceProperties::read(file),
            Source::Open(all) => {
                Ok(all.iter().find_map(|one| one.record.device).unwrap_or_default())
            }
        }
    }

    /// Opens and locks the file: one writer, or any number of readers.
    pub(super) fn open(&self, access: Access) -> Result<File, ImageError> {
        let duplicate = |fd: &OwnedFd| {
            let other = |error| ImageError::Other { path: self.path.clone(), error };
            Ok(File::from(fd.try_clone().map_err(other)?))
        };
        match &self.source {
            Source::Located(fd) => self.open_anew(fd, access),
            Source::Open(all) => {
                let fitting = fitting(all, access).filter(|_| !access.lock || locks(all, access));
                let what = "a file is used in another way than before";
                let error = || ImageError::Changed { path: self.path.clone(), what };
                duplicate(fitting.ok_or_else(error)?)
            }
            Source::Recorded(fd, all, opened) => {
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(fitting) = fitting(&all, access) {
                    return duplicate(fitting);
                }
                // Two locks of one file exclude each other, even if one process has both.
                let lock = !locks(&all, access);
                let file = self.open_anew(fd, Access { lock, ..access })?;
                let Access { write, direct, .. } = access;
                let path = self.path.clone();
                let record = FileRecord { path, write, direct, locked: lock, device: None };
                let description = Description { record, fd: Arc::new(file.into()) };
                let file = duplicate(&description.fd);
                all.push(description.clone());
                opened.lock().unwrap_or_else(PoisonError::into_inner).push(description);
                file
            }
        }
    }

    fn open_anew(&self, fd: &OwnedFd, access: Access) -> Result<File, ImageError> {
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
        let link = alloc::format!("/proc/self/fd/{}", fd.as_raw_fd());
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

/// Returns the descriptor that allows this access, apart from its lock.
fn fitting(all: &[Description], access: Access) -> Option<&OwnedFd> {
    let fits =
        |record: &FileRecord| record.direct == access.direct && (record.write || !access.write);
    all.iter().find(|one| fits(&one.record)).map(|one| &*one.fd)
}

/// Returns whether one of the descriptions has the lock that this access needs. The others need
/// none.
fn locks(all: &[Description], access: Access) -> bool {
    all.iter().any(|one| one.record.locked && (one.record.write || !access.write))
}

fn checked_stat(fd: impl AsFd, path: &Path) -> Result<Stat, ImageError> {
    let stat = fstat(fd).map_err(|e| explained(path, false, e.into()))?;
    // Other file types are never opened: opening a FIFO blocks, and opening a character device may
    // have side effects.
    match kind(&stat) {
        FileType::RegularFile | FileType::BlockDevice => Ok(stat),
        _ => Err(ImageError::NotADisk(path.into())),
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
