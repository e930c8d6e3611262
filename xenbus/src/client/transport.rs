//! The descriptor of a client; only [`Transport::wait`] blocks.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::string::ToString;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::wire::XsErrno;
use crate::xenstore::XsError;

/// The descriptor of a client.
///
/// The device is Linux's `/dev/xen/xenbus`. It differs from a server's socket: all processes that
/// open it share the kernel's one connection to the server. So the kernel handles watch requests
/// itself, and reports a rejected one as the error of the write that completed it. The device's
/// buffer is empty after that, and the connection stays usable. Writes to the device never wait for
/// room, so it is never reported as writable.
#[derive(Debug)]
pub(super) enum Transport {
    Socket(UnixStream),
    Device(File),
}

/// Why bytes could not be sent.
#[derive(Debug)]
pub(super) enum SendError {
    /// The server or the kernel rejected the request that these bytes complete.
    Refused(XsErrno),
    /// The connection is unusable.
    Lost(XsError),
}

impl From<XsError> for SendError {
    fn from(error: XsError) -> Self {
        Self::Lost(error)
    }
}

#[derive(Clone, Copy)]
pub(super) enum Wait {
    Read,
    ReadOrWrite,
}

impl Transport {
    pub fn set_nonblocking(&self) -> std::io::Result<()> {
        let flags = fcntl_getfl(self)?;
        fcntl_setfl(self, flags | OFlags::NONBLOCK)?;
        Ok(())
    }

    /// Returns whether this connection and the kernel's are the same to the server.
    pub fn is_the_kernels(&self) -> bool {
        matches!(self, Self::Device(_))
    }

    /// Sends some of `bytes`; `None` if nothing can be sent now.
    pub fn send(&self, bytes: &[u8]) -> Result<Option<usize>, SendError> {
        match self {
            // A server that closed the socket must cause an error here, not a signal.
            Self::Socket(s) => Ok(outcome(rustix::net::send(s, bytes, SendFlags::NOSIGNAL))?),
            Self::Device(d) => match rustix::io::retry_on_intr(|| rustix::io::write(d, bytes)) {
                Ok(sent) => Ok(Some(sent)),
                Err(errno) => Err(match refused(errno) {
                    Some(errno) => SendError::Refused(errno),
                    None => SendError::Lost(failed(errno)),
                }),
            },
        }
    }

    /// Receives some bytes: `Some(0)` at the end of the stream, `None` if nothing is available.
    pub fn receive(&self, into: &mut [u8]) -> Result<Option<usize>, XsError> {
        let got = match self {
            Self::Socket(s) => rustix::net::recv(s, into, RecvFlags::empty()).map(|(n, _)| n),
            Self::Device(d) => rustix::io::read(d, into),
        };
        outcome(got)
    }

    /// Waits until the descriptor is ready, or the timeout expires.
    pub fn wait(&self, what: Wait, timeout: Option<Duration>) -> Result<(), XsError> {
        let flags = match what {
            Wait::Read => PollFlags::IN,
            Wait::ReadOrWrite => PollFlags::IN | PollFlags::OUT,
        };
        let until = timeout.and_then(|t| Instant::now().checked_add(t));
        loop {
            let left = until.map(|t| t.saturating_duration_since(Instant::now()));
            let spec = left.and_then(|t| Timespec::try_from(t).ok());
            match poll(&mut [PollFd::new(self, flags)], spec.as_ref()) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }
}

impl AsFd for Transport {
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
