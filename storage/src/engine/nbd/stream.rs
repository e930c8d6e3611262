//! The socket, TCP or Unix.

use crate::image::spec::NbdServer;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Time for a connection to be made, and timeout of each step of the handshake.
const STEP: Duration = Duration::from_secs(5);

/// Makes connections to servers.
pub trait Dial: Send + Sync {
    /// Returns a socket that is connected to the server, before the handshake. May block for a few
    /// seconds.
    ///
    /// # Errors
    /// The server cannot be reached.
    fn dial(&self, server: &NbdServer) -> io::Result<OwnedFd>;
}

/// Connects through the network, and resolves host names.
#[derive(Clone, Copy, Debug, Default)]
pub struct Network;

impl Dial for Network {
    fn dial(&self, server: &NbdServer) -> io::Result<OwnedFd> {
        match server {
            NbdServer::Tcp(host, port) => {
                let mut last = io::ErrorKind::AddrNotAvailable.into();
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, STEP) {
                        Ok(stream) => return Ok(stream.into()),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
            NbdServer::Unix(path) => Ok(UnixStream::connect(path)?.into()),
        }
    }
}

#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Takes a connected socket. Reads and writes block for a limited time.
    pub fn new(server: &NbdServer, socket: OwnedFd) -> io::Result<Self> {
        match server {
            NbdServer::Tcp(..) => {
                let stream = TcpStream::from(socket);
                // Requests are batched before they are written.
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(STEP))?;
                stream.set_write_timeout(Some(STEP))?;
                Ok(Self::Tcp(stream))
            }
            NbdServer::Unix(_) => {
                let stream = UnixStream::from(socket);
                stream.set_read_timeout(Some(STEP))?;
                stream.set_write_timeout(Some(STEP))?;
                Ok(Self::Unix(stream))
            }
        }
    }

    pub fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(true),
            Self::Unix(stream) => stream.set_nonblocking(true),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buf),
            Self::Unix(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(buf),
            Self::Unix(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Tcp(stream) => stream.into(),
            Stream::Unix(stream) => stream.into(),
        }
    }
}
