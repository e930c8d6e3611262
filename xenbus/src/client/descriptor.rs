//! A client over a descriptor: a Unix socket, or Linux's `/dev/xen/xenbus`.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::string::ToString;
use std::time::{Duration, Instant};
use std::vec::Vec;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::connection::Connection;
use super::transport::{SendError, Transport, Wait};
use crate::wire::{Op, XsErrno};
use crate::xenstore::{WatchEvent, Xenstore, XsError};

/// Returns the default address of the server: `XENSTORED_PATH` if it is set, otherwise the first of
/// `/run/xenstored/socket`, `/var/run/xenstored/socket` and `/dev/xen/xenbus` that exists (as the
/// reference client library does).
#[must_use]
pub fn default_path() -> PathBuf {
    if let Some(path) = std::env::var_os("XENSTORED_PATH") {
        return path.into();
    }
    ["/run/xenstored/socket", "/var/run/xenstored/socket"]
        .iter()
        .map(PathBuf::from)
        .find(|p| p.exists())
        .unwrap_or_else(|| "/dev/xen/xenbus".into())
}

/// A connection to a xenstore server over a descriptor.
#[derive(Debug)]
pub struct Client(Connection<Descriptor>);

impl Client {
    /// Connects to a server's socket, or opens a character device with the same protocol.
    ///
    /// # Errors
    /// The system's error, if the connection or the open fails.
    pub fn connect(path: impl AsRef<Path>) -> std::io::Result<Self> {
        let path = path.as_ref();
        if std::fs::metadata(path)?.file_type().is_char_device() {
            let device = OpenOptions::new().read(true).write(true).open(path)?;
            return Self::new(Descriptor::Device(device));
        }
        Self::from_stream(UnixStream::connect(path)?)
    }

    /// Uses a connected stream, which is made non-blocking.
    ///
    /// # Errors
    /// The system's error, if the stream cannot be made non-blocking.
    pub fn from_stream(stream: UnixStream) -> std::io::Result<Self> {
        Self::new(Descriptor::Socket(stream))
    }

    fn new(descriptor: Descriptor) -> std::io::Result<Self> {
        descriptor.set_nonblocking()?;
        Ok(Self(Connection::new(descriptor)))
    }
}

impl Xenstore for Client {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        self.0.request(op, tx_id, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.0.poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.0.wait_event(timeout)
    }
}

/// The descriptor becomes readable when an event or the end of the connection arrives.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.transport.as_fd()
    }
}

/// The descriptor of a client.
///
/// The device is Linux's `/dev/xen/xenbus`. It differs from a server's socket: all processes that
/// open it share the kernel's one connection to the server. So the kernel handles watch requests
/// itself, and reports a rejected one as the error of the write that completed it. The device's
/// buffer is empty after that, and the connection stays usable. Writes to the device never wait for
/// room, so it is never reported as writable.
#[derive(Debug)]
enum Descriptor {
    Socket(UnixStream),
    Device(File),
}

impl Descriptor {
    pub fn set_nonblocking(&self) -> std::io::Result<()> {
        let flags = fcntl_getfl(self)?;
        fcntl_setfl(self, flags | OFlags::NONBLOCK)?;
        Ok(())
    }
}

impl Transport for Descriptor {
    type Deadline = Instant;

    fn deadline(&self, timeout: Duration) -> Option<Instant> {
        Instant::now().checked_add(timeout)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<Option<usize>, SendError> {
        match self {
            // A server that closed the socket must cause an error here, not a signal.
            Self::Socket(s) => Ok(outcome(rustix::net::send(s, bytes, SendFlags::NOSIGNAL))?),
            Self::Device(d) => match rustix::io::retry_on_intr(|| rustix::io::write(&*d, bytes)) {
                Ok(sent) => Ok(Some(sent)),
                Err(errno) => Err(match refused(errno) {
                    Some(errno) => SendError::Refused(errno),
                    None => SendError::Lost(failed(errno)),
                }),
            },
        }
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<Option<usize>, XsError> {
        let got = match self {
            Self::Socket(s) => rustix::net::recv(s, into, RecvFlags::empty()).map(|(n, _)| n),
            Self::Device(d) => rustix::io::read(d, into),
        };
        outcome(got)
    }

    fn wait(&mut self, what: Wait, until: Option<Instant>) -> Result<bool, XsError> {
        let flags = match what {
            Wait::Read => PollFlags::IN,
            Wait::ReadOrWrite => PollFlags::IN | PollFlags::OUT,
        };
        loop {
            let left = until.map(|t| t.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            let spec = left.and_then(|t| Timespec::try_from(t).ok());
            match poll(&mut [PollFd::new(self, flags)], spec.as_ref()) {
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }

    fn is_shared(&self) -> bool {
        matches!(self, Self::Device(_))
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(s) => s.as_fd(),
            Self::Device(d) => d.as_fd(),
        }
    }
}

fn outcome(result: Result<usize, Errno>) -> Result<Option<usize>, XsError> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(XsError::Closed),
        Err(e) => Err(failed(e)),
    }
}

/// Returns the server's error as the kernel reports it (`xs_error` of Linux's `xenbus_xs.c`).
fn refused(e: Errno) -> Option<XsErrno> {
    Some(match e {
        Errno::INVAL => XsErrno::Inval,
        Errno::ACCESS => XsErrno::Acces,
        Errno::PERM => XsErrno::Perm,
        Errno::EXIST => XsErrno::Exist,
        Errno::NOENT => XsErrno::NoEnt,
        Errno::NOMEM => XsErrno::NoMem,
        Errno::NOSPC => XsErrno::NoSpc,
        Errno::TOOBIG => XsErrno::TooBig,
        Errno::BUSY => XsErrno::Busy,
        Errno::NOSYS => XsErrno::NoSys,
        _ => return None,
    })
}

fn failed(e: Errno) -> XsError {
    XsError::Transport(std::io::Error::from(e).to_string().into())
}
