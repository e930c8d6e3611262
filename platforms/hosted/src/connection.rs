//! A connection of a domain to the hypervisor. The domain exists while one is open.

use crate::protocol::{LEN, Reply, Request};
use crate::socket;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
    socket_with, sockopt,
};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The hypervisor has closed the connection, or sent an invalid reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Lost;

/// Connection to the hypervisor. Calls are made one at a time.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Mutex<OwnedFd>,
}

impl Connection {
    /// Connects to the socket at `path`. Also returns the user id of the hypervisor.
    pub(crate) fn open(path: &Path) -> Result<(Self, rustix::process::Uid), Errno> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let uid = sockopt::socket_peercred(&socket)?.uid;
        Ok((Self { socket: Mutex::new(socket) }, uid))
    }

    /// Uses a connected socket.
    pub(crate) fn from_socket(socket: OwnedFd) -> Self {
        Self { socket: Mutex::new(socket) }
    }

    /// Sends a request and waits for the reply, which has `FDS` descriptors if it succeeded and
    /// none otherwise.
    pub(crate) fn call<const FDS: usize>(
        &self,
        request: &Request,
    ) -> Result<(Reply, Option<[OwnedFd; FDS]>), Lost> {
        // A poisoned lock protects only the order of packets; `ask` does not panic.
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        Self::ask(&socket, request).inspect_err(|Lost| {
            // Requests and replies no longer correspond, so the connection is closed.
            let _ = shutdown(&*socket, Shutdown::Both);
        })
    }

    fn ask<const FDS: usize>(
        socket: &OwnedFd,
        request: &Request,
    ) -> Result<(Reply, Option<[OwnedFd; FDS]>), Lost> {
        socket::send(socket, &request.to_wire(), &[]).map_err(|_| Lost)?;
        let (mut bytes, mut fds) = ([0; LEN], Vec::new());
        let got = socket::recv(socket, &mut bytes, Some(&mut fds)).map_err(|_| Lost)?;
        let reply = Reply::from_wire(bytes.get(..got).ok_or(Lost)?).map_err(|_| Lost)?;
        if reply.status == crate::protocol::Status::Done {
            Ok((reply, Some(fds.try_into().map_err(|_| Lost)?)))
        } else {
            Ok((reply, None))
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Takes effect immediately, even if a child that is about to `exec` holds a copy of the
        // descriptor.
        let socket = self.socket.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = shutdown(&*socket, Shutdown::Both);
    }
}
