//! The descriptor under a client: never blocks but in [`Transport::wait`].

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::string::ToString;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::xenstore::XsError;

#[derive(Debug)]
pub(super) enum Transport {
    Socket(UnixStream),
    Device(File),
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

    /// Sends some of `bytes`; `None` if nothing can be sent now.
    pub fn send(&self, bytes: &[u8]) -> Result<Option<usize>, XsError> {
        let sent = match self {
            // A server that went must be an error here, not a signal.
            Self::Socket(s) => rustix::net::send(s, bytes, SendFlags::NOSIGNAL),
            Self::Device(d) => rustix::io::write(d, bytes),
        };
        outcome(sent)
    }

    /// Receives some bytes: `Some(0)` at the end, `None` if nothing is there now.
    pub fn receive(&self, into: &mut [u8]) -> Result<Option<usize>, XsError> {
        let got = match self {
            Self::Socket(s) => rustix::net::recv(s, into, RecvFlags::empty()).map(|(n, _)| n),
            Self::Device(d) => rustix::io::read(d, into),
        };
        outcome(got)
    }

    /// Waits until something can be done, or the time is over.
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

fn failed(e: Errno) -> XsError {
    XsError::Transport(std::io::Error::from(e).to_string().into())
}
