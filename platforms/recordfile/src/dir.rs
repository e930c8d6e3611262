//! The directory of record files.

use crate::error::DirError;
use crate::file::RecordFile;
use crate::private_dir::PrivateDir;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat, flock, fstat, openat};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::geteuid;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// [`PrivateDir`] that is not readable for other users.
#[derive(Clone, Debug)]
pub struct RecordDir(Arc<PrivateDir>);

impl RecordDir {
    /// Opens the directory. It and its missing parents are created with mode 0700.
    ///
    /// # Errors
    /// A [`DirError`].
    pub fn open(path: &Path) -> Result<Self, DirError> {
        let dir = PrivateDir::create(path)?;
        let failed = |why: Errno| DirError::Io { path: path.into(), source: why.into() };
        let mode = fstat(&dir).map_err(failed)?.st_mode & 0o7777;
        if mode & 0o077 != 0 {
            return Err(DirError::Open { path: dir.path().into(), mode });
        }
        Ok(Self(Arc::new(dir)))
    }

    /// Returns the absolute path with which it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Creates a file of `len` zero bytes and maps it. A file of that name is replaced; existing
    /// mappings of it stay valid.
    ///
    /// # Errors
    /// A system error, such as no space or no permission.
    pub fn create(&self, name: &str, len: usize) -> io::Result<RecordFile> {
        self.remove(name)?;
        let fd = self.new_file(name)?;
        RecordFile::map(fd, len).inspect_err(|_| drop(self.remove(name)))
    }

    /// Creates a file of `len` zero bytes for another process, as [`create`](Self::create), without
    /// mapping it.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_unmapped(&self, name: &str, len: usize) -> io::Result<OwnedFd> {
        self.remove(name)?;
        let fd = self.new_file(name)?;
        RecordFile::allocate(fd, len).inspect_err(|_| drop(self.remove(name)))
    }

    /// Opens a file that another process created, without mapping it.
    ///
    /// # Errors
    /// As [`existing`](Self::existing).
    pub fn existing_unmapped(&self, name: &str, len: usize) -> io::Result<OwnedFd> {
        // Opening a FIFO must not block.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = openat(&self.0, checked(name)?, flags, Mode::empty())?;
        let stat = fstat(&fd)?;
        if !is_private_file(&stat) || u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
            let text = format!("{name} is no file of this user with at least {len} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(fd)
    }

    fn new_file(&self, name: &str) -> io::Result<OwnedFd> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.0, checked(name)?, flags, Mode::RUSR | Mode::WUSR)?)
    }

    /// Maps a file that another process created.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`]; [`io::ErrorKind::InvalidData`] if it is not a regular file of
    /// this user, or shorter than `len` bytes.
    pub fn existing(&self, name: &str, len: usize) -> io::Result<RecordFile> {
        let fd = self.existing_unmapped(name, len)?;
        RecordFile::map(fd, len)
    }

    /// Locks the directory, which prevents other threads and processes from holding or removing
    /// fences until the descriptor is closed.
    pub(crate) fn lock(&self, operation: FlockOperation) -> io::Result<OwnedFd> {
        // A lock belongs to an open file description, so each lock opens the directory.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(&self.0, ".", flags, Mode::empty())?;
        retry_on_intr(|| flock(&fd, operation))?;
        Ok(fd)
    }

    /// Removes a file, if it exists.
    ///
    /// # Errors
    /// A system error.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(checked(name)?)
    }
}

impl AsFd for RecordDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn is_private_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && stat.st_uid == geteuid().as_raw()
}

/// Checks that a name denotes a file in the directory itself.
pub(crate) fn checked(name: &str) -> io::Result<&str> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is no file name"),
        ));
    }
    Ok(name)
}
