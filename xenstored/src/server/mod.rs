//! A [`Store`] served over Unix sockets: the equivalent of a host's `xenstored`, inside this
//! process.
//!
//! One thread serves all connections and sleeps in `poll` when it has no work. There are two kinds
//! of connections:
//! - connections to a socket in the file system ([`Server::listen`]), for the tools of dom0: they
//!   are **privileged**, so only the socket's owner may connect (mode 0600);
//! - streams that the embedding program passes, with the domain that they belong to
//!   ([`ServerHandle::add_domain_connection`], or [`ServerHandle::connect_local`] for this process
//!   itself).
//!
//! A connection holds at most one message of input beyond the one being read, about 100 KiB of
//! output, and the events that its quota permits. Input beyond that is not read; after an error of
//! framing, the connection is closed. In each turn, a few requests of every connection are
//! executed.

mod listen;
mod peer;
mod serve;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use pvio_ring::DomId;
use rustix::event::{EventfdFlags, eventfd};

use crate::store::Store;
use listen::Listener;
use pvio_xenbus::client::Client;
use serve::Service;

/// Maximum number of concurrent connections through the listening socket; more wait.
pub const MAX_SOCKET_CONNECTIONS: usize = 512;

/// Maximum number of concurrent connections of a domain other than dom0, unless another number is
/// [set](Server::domain_connections).
pub const MAX_DOMAIN_CONNECTIONS: usize = 64;

/// A server that has not started.
#[derive(Debug)]
pub struct Server {
    store: Store,
    listener: Option<Listener>,
    domain_connections: usize,
}

impl Server {
    /// Creates a server for this store, without connections.
    #[must_use]
    pub const fn new(store: Store) -> Self {
        Self { store, listener: None, domain_connections: MAX_DOMAIN_CONNECTIONS }
    }

    /// Sets the maximum number of concurrent connections of each domain other than dom0.
    #[must_use]
    pub fn domain_connections(self, most: usize) -> Self {
        Self { domain_connections: most, ..self }
    }

    /// Listens on a socket at `path`. A stale socket there is replaced; the socket is removed when
    /// the server stops.
    ///
    /// # Errors
    /// `AddrInUse` if another process listens there or it is not a socket; otherwise the system's
    /// error.
    pub fn listen(mut self, path: impl AsRef<Path>) -> io::Result<Self> {
        self.listener = Some(Listener::bind(path.as_ref())?);
        Ok(self)
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The system's error, if no descriptor or thread is available.
    pub fn spawn(self) -> io::Result<ServerHandle> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (commands, inbox) = channel();
        let path = self.listener.as_ref().map(|l| l.path().to_owned());
        let service = Service::new(self.store, self.listener, Arc::clone(&wake), inbox)
            .domain_connections(self.domain_connections);
        let thread =
            std::thread::Builder::new().name("xenstore".into()).spawn(move || service.run())?;
        Ok(ServerHandle { commands, wake, path, thread: Some(thread) })
    }
}

/// Commands from the owner of a server to its thread.
#[derive(Debug)]
pub(super) enum Command {
    Connect { domid: DomId, stream: UnixStream, done: SyncSender<io::Result<()>> },
    Introduce { domid: DomId, done: SyncSender<bool> },
    Release { domid: DomId, done: SyncSender<bool> },
    Check { done: SyncSender<Result<(), String>> },
    Shutdown,
}

/// A running server. Dropping it stops the server, closes every connection, removes the socket
/// and waits for the thread.
///
/// All methods may be called from any thread; each has taken effect when it returns.
#[derive(Debug)]
pub struct ServerHandle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    path: Option<PathBuf>,
    thread: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// Returns the path of the listening socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Serves a connected stream as a connection of `domid`, with that domain's permissions.
    ///
    /// # Errors
    /// The system's error, if the stream cannot be made non-blocking; `QuotaExceeded` if the domain
    /// has the maximum number of connections; `BrokenPipe` if the server has stopped.
    pub fn add_domain_connection(&self, domid: DomId, stream: UnixStream) -> io::Result<()> {
        self.call(|done| Command::Connect { domid, stream, done })?
    }

    /// Connects this process to the server as `domid`, over a pair of sockets.
    ///
    /// # Errors
    /// As [`ServerHandle::add_domain_connection`], and if no pair of sockets can be created.
    pub fn connect_local(&self, domid: DomId) -> io::Result<Client> {
        let (mine, theirs) = UnixStream::pair()?;
        self.add_domain_connection(domid, theirs)?;
        Client::from_stream(mine)
    }

    /// Introduces a domain and fires `@introduceDomain`; returns whether it was not introduced
    /// before.
    ///
    /// # Errors
    /// `BrokenPipe` if the server has stopped.
    pub fn introduce(&self, domid: DomId) -> io::Result<bool> {
        self.call(|done| Command::Introduce { domid, done })
    }

    /// Releases a domain: closes its connections, removes the nodes that it owns and fires
    /// `@releaseDomain` (see [`Store::release`]). Returns whether there was any state of the
    /// domain.
    ///
    /// # Errors
    /// `BrokenPipe` if the server has stopped.
    pub fn release(&self, domid: DomId) -> io::Result<bool> {
        self.call(|done| Command::Release { domid, done })
    }

    /// Checks the store's consistency (see [`Store::check`]).
    ///
    /// # Errors
    /// `BrokenPipe` if the server has stopped; the inner result is that of [`Store::check`].
    pub fn check(&self) -> io::Result<Result<(), String>> {
        self.call(|done| Command::Check { done })
    }

    /// Stops the server and waits for its thread, as dropping it does.
    pub fn shutdown(self) {
        drop(self);
    }

    fn call<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> io::Result<T> {
        let ended = || io::Error::new(io::ErrorKind::BrokenPipe, "the xenstore server has ended");
        let (done, result) = sync_channel(1);
        self.commands.send(command(done)).map_err(|_| ended())?;
        self.wake_up();
        result.recv().map_err(|_| ended())
    }

    fn wake_up(&self) {
        // Fails only if the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Shutdown);
        self.wake_up();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
