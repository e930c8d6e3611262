//! A vif on the queues of a network interface, past the host's network stack (AF_XDP): one socket
//! for each, which receives what the interface receives by that queue and sends into it.
//!
//! The kernel neither completes checksums nor segments what is sent this way: the port does both.
//! What is received comes as the interface had it, with nothing said of its checksums.
//!
//! A socket has 2 MiB: 256 frames of a page for each way. What the guest does not take waits in
//! them, and the kernel drops what comes then.

mod port;
mod sys;

pub use port::AfXdpPort;

use super::netns::inside;
use super::tap::TapError;
use alloc::string::String;
use alloc::sync::Arc;
use core::time::Duration;
use pvio_uring::LogLimit;
use rustix::net::netdevice::name_to_index;
use rustix::net::xdp::{SocketAddrXdp, SocketAddrXdpFlags, XdpOptionsFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use std::io;
use std::time::Instant;
use sys::{Program, Socket};

/// For how long a queue may still belong to a socket that was closed: the kernel takes it back
/// when it gets to it.
const LET_GO: Duration = Duration::from_secs(2);

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AfXdpError {
    /// It is not there.
    #[error("there is no interface named {0}")]
    NoInterface(String),
    /// Its namespace is not.
    #[error(transparent)]
    Namespace(#[from] TapError),
    /// Not allowed.
    #[error("not permitted to {0}: CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF are needed")]
    NotPermitted(&'static str),
    /// The kernel cannot.
    #[error(
        "this kernel cannot {0}: it takes Linux 5.9 with CONFIG_XDP_SOCKETS and CONFIG_BPF_SYSCALL"
    )]
    Unsupported(&'static str),
    /// Somebody else uses it.
    #[error("cannot {0}: another program uses the interface or its queue by XDP")]
    InUse(&'static str),
    /// Anything else.
    #[error("cannot {what}: {error}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

impl AfXdpError {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoInterface(_) => "afxdp-no-interface",
            Self::Namespace(error) => error.code(),
            Self::NotPermitted(_) => "afxdp-not-permitted",
            Self::Unsupported(_) => "afxdp-unsupported",
            Self::InUse(_) => "afxdp-in-use",
            Self::System { .. } => "afxdp-system",
        }
    }
}

/// What the system said while `what` was being done, in our words.
fn failed(what: &'static str) -> impl Fn(io::Error) -> AfXdpError {
    move |error| match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => AfXdpError::NotPermitted(what),
        Some(libc::EAFNOSUPPORT | libc::ENOSYS | libc::EOPNOTSUPP) => AfXdpError::Unsupported(what),
        Some(libc::EBUSY | libc::EEXIST) => AfXdpError::InUse(what),
        _ => AfXdpError::System { what, error },
    }
}

/// An interface whose frames are led to sockets.
#[derive(Debug)]
pub struct AfXdp {
    netns: Option<String>,
    name: String,
    index: u32,
    queues: u32,
    program: Program,
    /// A guest may begin as many as it likes.
    starts: Arc<LogLimit>,
}

impl AfXdp {
    /// Takes an interface, in that network namespace if one is said, for up to `most` of its queues.
    ///
    /// # Errors
    /// An [`AfXdpError`].
    pub fn open(name: &str, netns: Option<&str>, most: u32) -> Result<Self, AfXdpError> {
        within(netns, || {
            let any =
                socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
            let any = any.map_err(|e| failed("look for an interface")(e.into()))?;
            let index =
                name_to_index(&any, name).map_err(|_| AfXdpError::NoInterface(name.into()))?;
            let program = Program::attach(index, most);
            let program = program.map_err(failed("attach an XDP program"))?;
            bound(index, 0).map_err(failed("bind an AF_XDP socket"))?;
            // The kernel says which queues there are by taking a socket for them.
            let more = (1..most).take_while(|queue| bound(index, *queue).is_ok()).count();
            let queues = u32::try_from(more).unwrap_or(0).saturating_add(1);
            let netns = netns.map(String::from);
            Ok(Self { netns, name: name.into(), index, queues, program, starts: Arc::default() })
        })
    }

    /// How many queues can be used.
    #[must_use]
    pub const fn queues(&self) -> u32 {
        self.queues
    }

    /// How often a queue was started.
    #[must_use]
    pub const fn starts(&self) -> &Arc<LogLimit> {
        &self.starts
    }

    /// A socket at a queue, which receives from now on.
    ///
    /// # Errors
    /// An [`AfXdpError`].
    pub fn queue(&self, queue: u32) -> Result<Queue, AfXdpError> {
        within(self.netns.as_deref(), || {
            let socket = bound(self.index, queue).map_err(failed("bind an AF_XDP socket"))?;
            let led = self.program.lead(queue, &socket);
            led.map_err(failed("lead frames to an AF_XDP socket"))?;
            let options = sockopt::xdp_options(&socket).unwrap_or(XdpOptionsFlags::empty());
            let zero_copy = options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY);
            if let Some(unlogged) = self.starts.admit() {
                let interface = &self.name;
                tracing::info!(interface, queue, zero_copy, unlogged, "serving by AF_XDP");
            }
            Ok(Queue(socket))
        })
    }
}

/// A queue's socket, to be made an [`AfXdpPort`] of.
pub struct Queue(Socket);

fn within<T: Send>(
    netns: Option<&str>,
    work: impl FnOnce() -> Result<T, AfXdpError> + Send,
) -> Result<T, AfXdpError> {
    match netns {
        None => work(),
        Some(name) => inside(name, || Ok(work()))?,
    }
}

/// A socket at a queue. The kernel takes the driver's zero-copy mode where there is one, and copies
/// where there is none.
fn bound(interface: u32, queue: u32) -> io::Result<Socket> {
    let socket = Socket::new()?;
    let address = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP, interface, queue);
    let begin = Instant::now();
    loop {
        match bind(&socket, &address) {
            Err(rustix::io::Errno::BUSY) if begin.elapsed() < LET_GO => {
                std::thread::sleep(Duration::from_millis(1));
            }
            done => return Ok(done.map(|()| socket)?),
        }
    }
}
