//! The state directory: who owns it, and the sockets in it.

use crate::error::StartError;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use std::fs::{DirBuilder, Permissions, remove_file, set_permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
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
pub(crate) struct StateDir {
    path: PathBuf,
    lock: OwnedFd,
}

impl StateDir {
    /// Takes the directory, which is made (for this user alone) if it is not there.
    pub(crate) fn take(path: &Path) -> Result<Self, StartError> {
        let failed = |why: io::Error| StartError::Io { path: path.into(), source: why };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = open(path, flags, Mode::empty()).map_err(|why| failed(why.into()))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.into(), lock }),
            Err(Errno::WOULDBLOCK) => Err(StartError::Running(path.into())),
            Err(why) => Err(failed(why.into())),
        }
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Listens for packets on a socket in the directory. A socket that is there already was left
    /// by a hypervisor that is dead, since the directory is ours.
    pub(crate) fn listen(&self, name: &str) -> Result<OwnedFd, StartError> {
        let path = self.path.join(name);
        let failed = |why: io::Error| StartError::Io { path: path.clone(), source: why };
        let address =
            SocketAddrUnix::new(&path).map_err(|_| StartError::PathTooLong(path.clone()))?;
        match remove_file(&path) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(failed(why)),
            _ => {}
        }
        let listening = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            bind(&socket, &address)?;
            // Before `listen`, so that nobody else ever finds it open.
            set_permissions(&path, Permissions::from_mode(0o600))?;
            listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        listening().map_err(failed)
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        let _ = remove_file(self.path.join(HYPERVISOR_SOCKET));
        // At once, even if a child that is about to `exec` holds a copy for a moment.
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}
