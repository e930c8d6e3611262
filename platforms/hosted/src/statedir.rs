//! The state directory: its owner, and the sockets in it.

use crate::error::StartError;
use pvio_recordfile::PrivateDir;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use std::fs::{Permissions, set_permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Name of the socket at which domains join.
pub(crate) const HYPERVISOR_SOCKET: &str = "hypervisor.sock";
/// Name of the socket at which tools of domain 0 connect to xenstore.
pub(crate) const XENSTORE_SOCKET: &str = "xenstore.sock";
/// Limit of connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// State directory locked by this process. The lock is on the directory itself: the kernel releases
/// it however this process ends, and no lock file is left.
#[derive(Debug)]
pub(crate) struct StateDir(PrivateDir);

impl StateDir {
    /// Locks the directory, which is created (for this user only) if it does not exist.
    pub(crate) fn take(path: &Path) -> Result<Self, StartError> {
        let dir = PrivateDir::create(path)?;
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(dir)),
            Err(Errno::WOULDBLOCK) => Err(StartError::Running(path.into())),
            Err(why) => Err(StartError::Io { path: path.into(), source: why.into() }),
        }
    }

    /// Returns the directory.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns a path for binding a socket of that name, which stays valid even if the directory's
    /// path changes.
    pub(crate) fn socket(&self, name: &str) -> Result<PathBuf, StartError> {
        // Clients connect by this path, so it must be valid too.
        let path = self.0.path().join(name);
        match SocketAddrUnix::new(&path) {
            Ok(_) => Ok(self.0.by_descriptor(name)),
            Err(_) => Err(StartError::PathTooLong(path)),
        }
    }

    /// Listens for packets on a socket in the directory. An existing socket was left by a
    /// hypervisor that has ended, since this process holds the lock.
    pub(crate) fn listen(&self, name: &str) -> Result<OwnedFd, StartError> {
        let path = self.socket(name)?;
        let listening = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            self.0.remove(name)?;
            bind(&socket, &SocketAddrUnix::new(&path)?)?;
            // Before `listen`, so that no other user can ever connect.
            set_permissions(&path, Permissions::from_mode(0o600))?;
            listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        listening().map_err(|source| StartError::Io { path: self.path().join(name), source })
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        let _ = self.0.remove(HYPERVISOR_SOCKET);
        // Takes effect immediately, even if a child that is about to `exec` holds a copy of the
        // descriptor.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
