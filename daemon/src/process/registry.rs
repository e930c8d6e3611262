//! The sockets at which a supervisor finds the device processes of its predecessor.
//!
//! Each device process has a listening socket, which the supervisor creates in a directory that only
//! it may enter. A supervisor that starts connects to all of them. The process then leaves its
//! earlier connection, if it still has one.

use super::channel::Channel;
use pvio_recordfile::{DirError, PrivateDir};
use rustix::fs::{Dir, FileType};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// Suffix of the sockets' names.
const SUFFIX: &str = ".sock";

/// The directory of the device processes' sockets.
#[derive(Debug, Clone)]
pub struct Registry(Arc<PrivateDir>);

impl Registry {
    /// Opens the directory; creates it if it does not exist.
    ///
    /// # Errors
    /// It cannot be created, or other users have access to it.
    pub fn open(path: &Path) -> Result<Self, DirError> {
        PrivateDir::create(path).map(|dir| Self(Arc::new(dir)))
    }

    /// Creates the listening socket of a device's process. It replaces that of an earlier process.
    ///
    /// # Errors
    /// The system's error.
    pub fn listen(&self, device: &str) -> io::Result<OwnedFd> {
        let name = format!("{device}{SUFFIX}");
        self.0.remove(&name)?;
        let socket = seqpacket()?;
        bind(&socket, &SocketAddrUnix::new(self.0.by_descriptor(&name))?)?;
        listen(&socket, 1)?;
        Ok(socket)
    }

    /// Connects to the processes of an earlier supervisor, by device. Sockets whose processes have
    /// ended are removed.
    ///
    /// # Errors
    /// The system's error.
    pub fn processes(&self) -> io::Result<BTreeMap<String, Channel>> {
        let mut found = BTreeMap::new();
        for device in self.devices()? {
            match self.connect(&device)? {
                Some(channel) => drop(found.insert(device, channel)),
                None => self.remove(&device)?,
            }
        }
        Ok(found)
    }

    fn connect(&self, device: &str) -> io::Result<Option<Channel>> {
        let channel = Channel::new(seqpacket()?);
        // Whoever created the listening socket is known; the process that accepts is not. Before the
        // connection, because that process may send at once.
        channel.ask_for_sender()?;
        let name = self.0.by_descriptor(&format!("{device}{SUFFIX}"));
        match connect(&channel, &SocketAddrUnix::new(name)?) {
            Ok(()) => Ok(Some(channel)),
            // A process that does not accept connections is of no use to its supervisor.
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the socket of a device.
    ///
    /// # Errors
    /// The system's error.
    pub fn remove(&self, device: &str) -> io::Result<()> {
        self.0.remove(&format!("{device}{SUFFIX}"))
    }

    fn devices(&self) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in Dir::read_from(self.0.as_fd())? {
            let entry = entry?;
            let name = entry.file_name().to_str().ok().and_then(|name| name.strip_suffix(SUFFIX));
            if let (FileType::Socket, Some(device)) = (entry.file_type(), name) {
                found.push(device.to_owned());
            }
        }
        Ok(found)
    }
}

/// Accepts a connection at a listening socket; `None` if there is none.
///
/// # Errors
/// The system's error.
pub fn accept(socket: impl AsFd) -> io::Result<Option<Channel>> {
    match accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(accepted) => Ok(Some(Channel::new(accepted))),
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn seqpacket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&dir.path().join("devices")).unwrap();
        (dir, registry)
    }

    #[test]
    fn supervisor_finds_process_of_predecessor() {
        let (_dir, registry) = registry();
        let socket = registry.listen("vbd-1-51712").unwrap();
        assert!(accept(&socket).unwrap().is_none());
        let found = registry.processes().unwrap();
        let accepted = accept(&socket).unwrap().unwrap();
        accepted.send(&"hello", &[]).unwrap();
        let received = found["vbd-1-51712"].receive_from::<String>().unwrap().unwrap();
        let sender = Some(rustix::process::getpid());
        assert_eq!((&*received.message, received.sender), ("hello", sender));
    }

    #[test]
    fn socket_of_ended_process_is_removed() {
        let (_dir, registry) = registry();
        let _lives = registry.listen("vif-1-0").unwrap();
        drop(registry.listen("vbd-1-51712").unwrap());
        let found: Vec<String> = registry.processes().unwrap().into_keys().collect();
        assert_eq!(found, ["vif-1-0"]);
        assert_eq!(registry.devices().unwrap(), ["vif-1-0"]);
    }

    #[test]
    fn later_process_of_device_replaces_socket() {
        let (_dir, registry) = registry();
        let before = registry.listen("vif-1-0").unwrap();
        let now = registry.listen("vif-1-0").unwrap();
        let _found = registry.processes().unwrap();
        assert!(accept(&before).unwrap().is_none());
        assert!(accept(&now).unwrap().is_some());
    }
}
