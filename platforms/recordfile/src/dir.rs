//! The directory.

use crate::file::RecordFile;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, mkdir, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory of this user alone. It is held open: renaming it, or replacing it by a link, changes
/// nothing for who has it.
#[derive(Clone, Debug)]
pub struct RecordDir {
    fd: Arc<OwnedFd>,
    path: PathBuf,
}

impl RecordDir {
    /// Opens the directory, and makes it if it is missing. The directory that it is in must exist.
    ///
    /// # Errors
    /// [`io::ErrorKind::PermissionDenied`] if it belongs to another user, or others may use it;
    /// [`io::ErrorKind::NotADirectory`] if it is something else, or a symbolic link.
    pub fn open(path: &Path) -> io::Result<Self> {
        match mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(CWD, path, flags, Mode::empty())?;
        let stat = fstat(&fd)?;
        if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
            let text = format!(
                "{} has owner {} and mode {:o}; it must be this user's ({}) and closed to others",
                path.display(),
                stat.st_uid,
                stat.st_mode & 0o777,
                geteuid().as_raw(),
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(Self { fd: Arc::new(fd), path: path.to_owned() })
    }

    /// The path by which it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a file of `len` zero bytes and maps it. A file of that name is replaced: a process that
    /// still has that one mapped keeps it.
    ///
    /// # Errors
    /// What the system reports: no space, no permission.
    pub fn create(&self, name: &str, len: usize) -> io::Result<RecordFile> {
        self.remove(name)?;
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(&self.fd, checked(name)?, flags, Mode::RUSR | Mode::WUSR)?;
        RecordFile::map(fd, len).inspect_err(|_| drop(self.remove(name)))
    }

    /// Maps a file that another process left.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`]; [`io::ErrorKind::InvalidData`] if it is no regular file of this
    /// user, or shorter than `len` bytes.
    pub fn existing(&self, name: &str, len: usize) -> io::Result<RecordFile> {
        // Opening a FIFO must not block.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = openat(&self.fd, checked(name)?, flags, Mode::empty())?;
        let stat = fstat(&fd)?;
        if !is_private_file(&stat) || u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
            let text = format!("{name} is no file of this user with at least {len} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        RecordFile::map(fd, len)
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// What the system reports.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.fd, checked(name)?, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_private_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && stat.st_uid == geteuid().as_raw()
}

/// A name of a file in the directory itself.
pub(crate) fn checked(name: &str) -> io::Result<&str> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is no file name"),
        ));
    }
    Ok(name)
}
