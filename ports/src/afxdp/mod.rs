//! A vif on the queues of a network interface, bypassing the host's network stack (AF_XDP). Each
//! queue has a socket, which receives the frames of that queue of the interface and sends into it.
//!
//! The kernel neither completes checksums nor segments frames sent this way, so the port does both.
//! Received frames carry no information about their checksums.
//!
//! A socket has 2 MiB of memory: 256 frames of one page in each direction. Frames that the guest
//! does not take wait there; when the memory is full, the kernel drops further frames.

mod port;
mod sys;

pub use port::AfXdpPort;

use crate::tap::{TapError, inside};
use alloc::borrow::Cow;
use alloc::string::String;
use alloc::sync::Arc;
use core::time::Duration;
use pvio_ring::error::Remedy;
use pvio_runtime::LogLimit;
use pvio_xenbus::driver::Fault;
use rustix::net::netdevice::name_to_index;
use rustix::net::xdp::{SocketAddrXdp, SocketAddrXdpFlags, XdpOptionsFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;
use sys::{Program, Socket};

/// Longest time for which a queue may still belong to a closed socket: the kernel releases it
/// asynchronously.
const LET_GO: Duration = Duration::from_secs(2);

/// Reason why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AfXdpError {
    /// The interface does not exist.
    #[error("the interface {0} does not exist")]
    NoInterface(String),
    /// The network namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] TapError),
    /// A capability is missing.
    #[error("cannot {0}: permission denied")]
    NotPermitted(&'static str),
    /// The kernel lacks AF_XDP support.
    #[error("cannot {0}: this kernel does not support it")]
    Unsupported(&'static str),
    /// Another program uses the interface or its queue.
    #[error("cannot {0}: another program uses the interface or its queue with XDP")]
    InUse(&'static str),
    /// Another system error.
    #[error("cannot {what}")]
    System {
        /// Operation that failed.
        what: &'static str,
        /// Error of the system.
        #[source]
        error: io::Error,
    },
}

impl Remedy for AfXdpError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::NoInterface(_) => "list the interfaces with ip link".into(),
            Self::Namespace(error) => return error.remedy(),
            Self::NotPermitted(_) => "run with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF".into(),
            Self::Unsupported(_) => {
                "use Linux 5.9 or later with CONFIG_XDP_SOCKETS and CONFIG_BPF_SYSCALL".into()
            }
            Self::InUse(_) => "stop that program, or name another interface".into(),
            Self::System { .. } => return None,
        })
    }
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

impl From<AfXdpError> for Fault {
    fn from(error: AfXdpError) -> Self {
        Self::of(error.code(), &error)
    }
}

/// Returns a function that converts a system error of the operation `what`.
fn failed(what: &'static str) -> impl Fn(io::Error) -> AfXdpError {
    move |error| match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => AfXdpError::NotPermitted(what),
        Some(libc::EAFNOSUPPORT | libc::ENOSYS | libc::EOPNOTSUPP) => AfXdpError::Unsupported(what),
        Some(libc::EBUSY | libc::EEXIST) => AfXdpError::InUse(what),
        _ => AfXdpError::System { what, error },
    }
}

/// Interface whose frames are redirected to sockets.
#[derive(Debug)]
pub struct AfXdp {
    netns: Option<String>,
    name: String,
    index: u32,
    queues: u32,
    program: Program,
    /// Rate limit of the log lines for started queues, since a guest can cause any number of them.
    starts: Arc<LogLimit>,
}

impl AfXdp {
    /// Returns an interface that another process opened, of whose queues `queues` are usable:
    /// descriptors of the attachment of its program and of the map, in this order.
    #[must_use]
    pub fn from_opened(place: InterfacePlace, queues: u32, [link, map]: [OwnedFd; 2]) -> Self {
        let InterfacePlace { name, netns, index } = place;
        let program = Program::from_descriptors(link, map);
        Self { netns, name, index, queues, program, starts: Arc::default() }
    }

    /// Opens an interface, in the given network namespace, for at most `most` of its queues.
    ///
    /// # Errors
    /// An [`AfXdpError`].
    pub fn open(name: &str, netns: Option<&str>, most: u32) -> Result<Self, AfXdpError> {
        within(netns, || {
            let index = index_here(name)?;
            let program = Program::attach(index, most);
            let program = program.map_err(failed("attach an XDP program"))?;
            let bound = |queue| bind_to(index, queue, Socket::new(unbound()?)?);
            bound(0).map_err(failed("bind an AF_XDP socket"))?;
            // The kernel has no call for the number of queues, so each is probed with a socket.
            let more = (1..most).take_while(|queue| bound(*queue).is_ok()).count();
            let queues = u32::try_from(more).unwrap_or(0).saturating_add(1);
            let netns = netns.map(String::from);
            Ok(Self { netns, name: name.into(), index, queues, program, starts: Arc::default() })
        })
    }

    /// Returns the number of usable queues.
    #[must_use]
    pub const fn queues(&self) -> u32 {
        self.queues
    }

    /// Returns the rate limit of the log lines for started queues.
    #[must_use]
    pub const fn starts(&self) -> &Arc<LogLimit> {
        &self.starts
    }

    /// Returns where the interface is.
    #[must_use]
    pub fn place(&self) -> InterfacePlace {
        let (name, netns) = (self.name.clone(), self.netns.clone());
        InterfacePlace { name, netns, index: self.index }
    }

    /// Returns descriptors of the attachment of its program and of the map, in this order.
    ///
    /// # Errors
    /// The system has no descriptor.
    pub fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        self.program.descriptors()
    }

    /// Creates a socket for a queue, to be bound by [`bind`](Self::bind), in this process or in one
    /// without capabilities. Another socket of the queue receives nothing from then on.
    ///
    /// # Errors
    /// An [`AfXdpError`].
    pub fn socket(&self, queue: u32) -> Result<OwnedFd, AfXdpError> {
        within(self.netns.as_deref(), || {
            let socket = unbound().map_err(failed("create an AF_XDP socket"))?;
            let led = self.program.lead(queue, &socket);
            led.map_err(failed("lead frames to an AF_XDP socket")).map(|()| socket)
        })
    }

    /// Binds a socket that was created for this queue. It receives from then on. Needs no capability,
    /// and works in any network namespace: a socket belongs to the one in which it was created.
    ///
    /// # Errors
    /// An [`AfXdpError`].
    pub fn bind(&self, queue: u32, socket: OwnedFd) -> Result<Queue, AfXdpError> {
        let bound = Socket::new(socket).and_then(|socket| bind_to(self.index, queue, socket));
        let socket = bound.map_err(failed("bind an AF_XDP socket"))?;
        let options = sockopt::xdp_options(&socket).unwrap_or(XdpOptionsFlags::empty());
        let zero_copy = options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY);
        if let Some(unlogged) = self.starts.admit() {
            let interface = &self.name;
            tracing::info!(interface, queue, zero_copy, unlogged, "queue served by AF_XDP");
        }
        Ok(Queue(socket))
    }
}

/// Place of a network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct InterfacePlace {
    /// Its name.
    pub name: String,
    /// Network namespace; that of the process that opens it if `None`.
    pub netns: Option<String>,
    /// Its number in that namespace.
    pub index: u32,
}

impl InterfacePlace {
    /// Finds an interface by its name.
    ///
    /// # Errors
    /// An [`AfXdpError`].
    pub fn find(name: &str, netns: Option<&str>) -> Result<Self, AfXdpError> {
        let index = within(netns, || index_here(name))?;
        Ok(Self { name: name.into(), netns: netns.map(String::from), index })
    }
}

/// Returns the number of an interface of this thread's network namespace.
fn index_here(name: &str) -> Result<u32, AfXdpError> {
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let any = any.map_err(|e| failed("search for an interface")(e.into()))?;
    name_to_index(&any, name).map_err(|_| AfXdpError::NoInterface(name.into()))
}

/// Creates a socket in this thread's network namespace.
///
/// # Errors
/// A system error; `EAFNOSUPPORT` if the kernel lacks AF_XDP.
fn unbound() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None)?)
}

/// Socket of a queue, for an [`AfXdpPort`].
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

/// Binds a socket to a queue. The kernel uses the driver's zero-copy mode if there is one, and
/// copies otherwise.
fn bind_to(interface: u32, queue: u32, socket: Socket) -> io::Result<Socket> {
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
