//! The state directory: who owns it, and the sockets in it.

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

/// Where domains join.
pub(crate) const HYPERVISOR_SOCKET: &str = "hypervisor.sock";
/// Where tools of domain 0 reach xenstore.
pub(crate) const XENSTORE_SOCKET: &str = "xenstore.sock";
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// A state directory that is ours. The lock is on the directory itself: the kernel lets go of it
/// however this process ends, and no file is left behind.
#[derive(Debug)]
pub(crate) struct StateDir(PrivateDir);

impl StateDir {
    /// Takes the directory, which is made (for this user alone) if it is not there.
    pub(crate) fn take(path: &Path) -> Result<Self, StartError> {
        let dir = PrivateDir::create(path)?;
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(dir)),
            Err(Errno::WOULDBLOCK) => Err(StartError::Running(path.into())),
            Err(why) => Err(StartError::Io { path: path.into(), source: why.into() }),
        }
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where to bind a socket of that name, whatever becomes of the directory's path meanwhile.
    pub(crate) fn socket(&self, name: &str) -> Result<PathBuf, StartError> {
        // Others connect by its path.
        let path = self.0.path().join(name);
        match SocketAddrUnix::new(&path) {
            Ok(_) => Ok(self.0.by_descriptor(name)),
            Err(_) => Err(StartError::PathTooLong(path)),
        }
    }

    /// Listens for packets on a socket in the directory. A socket that is there already was left
    /// by a hypervisor that is dead, since the directory is ours.
    pub(crate) fn listen(&self, name: &str) -> Result<OwnedFd, StartError> {
        let path = self.socket(name)?;
        let listening = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            self.0.remove(name)?;
            bind(&socket, &SocketAddrUnix::new(&path)?)?;
            // Before `listen`, so that nobody else ever finds it open.
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
        // At once, even if a child that is about to `exec` holds a copy for a moment.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
