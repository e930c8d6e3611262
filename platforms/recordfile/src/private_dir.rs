//! A directory that is private to this user, for sockets, logs, images and records.

use crate::error::DirError;
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, fstat, mkdirat, open, openat, readlinkat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// Limit of symbolic links that are followed, as in the kernel.
const MAX_LINKS: usize = 40;
/// Permission bits that allow other users than the owner to write.
const OTHERS_WRITE: u32 = 0o022;

/// Open directory that belongs to this user and in which no other user can write. Its path contains
/// no symbolic link that another user could have created, so files written in it cannot be
/// redirected. All files are accessed relative to its descriptor, even if its path changes.
#[derive(Debug)]
pub struct PrivateDir {
    path: PathBuf,
    fd: OwnedFd,
}

impl PrivateDir {
    /// Opens the directory.
    ///
    /// # Errors
    /// A [`DirError`].
    pub fn open(path: &Path) -> Result<Self, DirError> {
        Self::at_path(path, false)
    }

    /// Opens the directory. It and its missing parents are created with mode 0700.
    ///
    /// # Errors
    /// A [`DirError`].
    pub fn create(path: &Path) -> Result<Self, DirError> {
        Self::at_path(path, true)
    }

    fn at_path(path: &Path, make: bool) -> Result<Self, DirError> {
        let failed = |source: io::Error| DirError::Io { path: path.into(), source };
        let path = std::path::absolute(path).map_err(failed)?;
        let fd = walk(&path, make)?;
        let stat = fstat(&fd).map_err(|why| failed(why.into()))?;
        if stat.st_uid != geteuid().as_raw() {
            return Err(DirError::OtherOwner { path, owner: stat.st_uid });
        }
        if stat.st_mode & OTHERS_WRITE != 0 {
            return Err(DirError::Writable { path, mode: stat.st_mode & 0o7777 });
        }
        Ok(Self { path, fd })
    }

    /// Returns its absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a file in it through its descriptor, valid for this process only. It is
    /// for calls that take no directory descriptor, such as `bind`.
    #[must_use]
    pub fn by_descriptor(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// Opens a file for appending, which is created (mode 0600) if it does not exist. A symbolic
    /// link of that name is rejected.
    ///
    /// # Errors
    /// A system error.
    pub fn append(&self, name: &str) -> io::Result<File> {
        self.open_file(name, OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE)
    }

    /// Creates a file (mode 0600) for reading and writing, and replaces an existing one of that
    /// name.
    ///
    /// # Errors
    /// A system error.
    pub fn replace(&self, name: &str) -> io::Result<File> {
        self.remove(name)?;
        self.open_file(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    /// Opens a file for reading and writing, which is created (mode 0600) if it does not exist. A
    /// symbolic link of that name is rejected.
    ///
    /// # Errors
    /// A system error.
    pub fn read_write(&self, name: &str) -> io::Result<File> {
        self.open_file(name, OFlags::RDWR | OFlags::CREATE)
    }

    fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Removes a file, if it exists.
    ///
    /// # Errors
    /// A system error.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            Err(Errno::NOENT) | Ok(()) => Ok(()),
            Err(why) => Err(why.into()),
        }
    }

    /// Removes the directory, if its path still refers to it and it is empty.
    ///
    /// # Errors
    /// A system error.
    pub fn remove_empty(&self) -> io::Result<()> {
        let (here, there) = (fstat(&self.fd)?, statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)?);
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) {
            unlinkat(CWD, &self.path, AtFlags::REMOVEDIR)?;
        }
        Ok(())
    }
}

impl AsFd for PrivateDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens a directory component by component. A symbolic link is followed only where only root could
/// have created it (`/var/run`), and never as the last component.
fn walk(path: &Path, make: bool) -> Result<OwnedFd, DirError> {
    let failed = |why: Errno| DirError::Io { path: path.into(), source: why.into() };
    let base = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = || open("/", OFlags::RDONLY | base, Mode::empty()).map_err(failed);
    let mut todo: VecDeque<OsString> = names(path).collect();
    let (mut at, mut shown, mut links) = (root()?, PathBuf::from("/"), 0);
    let mut system = is_system(&at).map_err(failed)?;
    while let Some(name) = todo.pop_front() {
        let access = if todo.is_empty() { OFlags::RDONLY } else { OFlags::PATH };
        let go = || openat(&at, &name, access | base, Mode::empty());
        let next = match go() {
            Err(Errno::NOENT) if make => {
                match mkdirat(&at, &name, Mode::RWXU) {
                    // Another process may have created it in the meantime.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(why) => return Err(failed(why)),
                }
                go()
            }
            next => next,
        };
        let why = match next {
            Ok(next) => {
                at = next;
                shown.push(&name);
                system = system && is_system(&at).map_err(failed)?;
                continue;
            }
            Err(why) => why,
        };
        // For a symbolic link, the error is ENOTDIR or ELOOP.
        let Ok(target) = readlinkat(&at, &name, Vec::new()) else { return Err(failed(why)) };
        links += 1;
        if !system || todo.is_empty() || links > MAX_LINKS {
            return Err(DirError::Link { path: path.into(), link: shown.join(name) });
        }
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        if target.is_absolute() {
            (at, shown) = (root()?, PathBuf::from("/"));
        }
        names(&target).rev().for_each(|name| todo.push_front(name));
    }
    Ok(at)
}

/// Returns the names in a path; a path that consists of the root has none.
fn names(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::from_bytes(b"..").to_owned()),
        _ => None,
    })
}

/// Whether only root can change the contents of a directory.
fn is_system(dir: &OwnedFd) -> Result<bool, Errno> {
    let stat = fstat(dir)?;
    Ok(stat.st_uid == 0 && stat.st_mode & OTHERS_WRITE == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, set_permissions};
    use std::io::{Read, Write};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn private_dir_is_created_with_mode_0700() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        assert!(matches!(PrivateDir::open(&path), Err(DirError::Io { .. })));
        let made = PrivateDir::create(&path).unwrap();
        assert_eq!(made.path(), path);
        for path in [&path, &dir.path().join("a")] {
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        }
        PrivateDir::open(&path.join("../b/.")).unwrap();
        made.remove_empty().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn private_dir_path_with_symlink_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        symlink(&real, &link).unwrap();
        for path in [link.clone(), link.join("state"), link.join("../real")] {
            let refused = PrivateDir::create(&path).unwrap_err();
            let DirError::Link { link: named, .. } = &refused else { panic!("{refused}") };
            assert_eq!(*named, link);
        }
        assert_eq!(std::fs::read_dir(&real).unwrap().count(), 0);
        // A dangling link is rejected too, and its target is not created.
        symlink(dir.path().join("nothing"), dir.path().join("dangling")).unwrap();
        let dangling = PrivateDir::create(&dir.path().join("dangling"));
        assert!(matches!(dangling, Err(DirError::Link { .. })));
        assert!(!dir.path().join("nothing").exists());
    }

    #[test]
    fn directory_owned_or_writable_by_others_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o770, 0o707, 0o1777] {
            set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            let refused = PrivateDir::open(dir.path());
            assert!(matches!(refused, Err(DirError::Writable { mode: m, .. }) if m == mode));
        }
        set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        PrivateDir::open(dir.path()).unwrap();
        // Only root can change a directory's owner; other users find one that belongs to root.
        let others = match std::os::unix::fs::chown(dir.path(), Some(54_321), None) {
            Ok(()) => dir.path(),
            Err(_) => Path::new("/usr"),
        };
        assert!(matches!(PrivateDir::open(others), Err(DirError::OtherOwner { .. })));
    }

    #[test]
    fn private_dir_files_never_follow_symlinks_and_survive_rename() {
        let dir = tempfile::tempdir().unwrap();
        let private = PrivateDir::create(&dir.path().join("state")).unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        symlink(&victim, private.path().join("x")).unwrap();
        assert!(private.append("x").is_err());
        assert!(private.read_write("x").is_err());
        private.replace("x").unwrap().write_all(b"new").unwrap();
        // The directory is still accessible after it was renamed.
        std::fs::rename(private.path(), dir.path().join("moved")).unwrap();
        private.append("x").unwrap().write_all(b"er").unwrap();
        let mut text = String::new();
        private.read_write("x").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "newer");
        assert_eq!(std::fs::read_to_string(private.by_descriptor("x")).unwrap(), "newer");
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
        assert!(private.remove_empty().is_err(), "renamed directory cannot be removed by its path");
        private.remove("x").unwrap();
        private.remove("x").unwrap();
    }
}
