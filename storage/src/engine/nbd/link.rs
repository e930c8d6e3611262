//! The thread that communicates with the server for all queues of a disk. It has one connection,
//! and reconnects whenever that is lost.

use super::handshake::{self, Export};
use super::requests::{Lost, Requests};
use super::stream::{Dial, Network, Stream};
use super::wire::{self, cmd, export};
use super::{NbdError, NbdOptions};
use crate::engine::offload::{Executor, Job};
use crate::engine::{Discard, EngineError, Geometry, threads};
use crate::image::spec::NbdSpec;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use crossbeam_channel::{Receiver, Sender, unbounded};
use pvio_ring::error::Report;
use pvio_runtime::{EventFd, LogLimit};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Size of the receive buffer, in bytes.
const IN: usize = 256 << 10;
/// Time without data after which a server that owes replies is considered lost.
const SILENCE: Duration = Duration::from_secs(60);
/// Initial and maximum delay between attempts to connect; it doubles with each attempt.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
const EIO: i32 = 5;

/// A connection to a server, shared by all queues of a disk. Dropping it disconnects from the
/// server.
pub struct NbdLink {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    export: Export,
}

struct Shared {
    /// Written when the channel has jobs, and to stop the thread.
    wake: EventFd,
    stop: AtomicBool,
    /// Counters of lost connections, reconnects, and servers given up.
    losses: Arc<LogLimit>,
    reconnects: Arc<LogLimit>,
    failures: Arc<LogLimit>,
}

impl NbdLink {
    /// Connects to a server.
    ///
    /// # Errors
    /// Any [`NbdError`]; this includes a server that cannot be reached.
    pub fn connect(spec: &NbdSpec, options: NbdOptions) -> Result<Self, NbdError> {
        Self::connect_by(spec, options, Arc::new(Network))
    }

    /// Connects to a server with `dial`, now and whenever the connection is lost.
    ///
    /// # Errors
    /// Any [`NbdError`]; this includes a server that cannot be reached.
    pub fn connect_by(
        spec: &NbdSpec,
        options: NbdOptions,
        dial: Arc<dyn Dial>,
    ) -> Result<Self, NbdError> {
        let (stream, export) = negotiate(spec, options, &*dial)?;
        Self::start(spec, options, Some(stream), export, dial)
    }

    /// Continues a connection after its handshake, and reconnects with `dial` whenever it is lost.
    /// Without a connection, the first request makes one; the server must still have the export.
    ///
    /// # Errors
    /// [`NbdError`] if the export cannot be used, or the socket or a thread cannot be set up.
    pub fn resume(
        spec: &NbdSpec,
        options: NbdOptions,
        socket: Option<OwnedFd>,
        export: Export,
        dial: Arc<dyn Dial>,
    ) -> Result<Self, NbdError> {
        let system = |error| NbdError::Unreachable { server: handshake::name(&spec.server), error };
        let export = check_mode(spec, options, handshake::check(spec, export)?)?;
        let stream = socket.map(|socket| Stream::new(&spec.server, socket)).transpose();
        let stream = stream.map_err(system)?;
        stream.as_ref().map_or(Ok(()), Stream::set_nonblocking).map_err(system)?;
        Self::start(spec, options, stream, export, dial)
    }

    fn start(
        spec: &NbdSpec,
        options: NbdOptions,
        stream: Option<Stream>,
        export: Export,
        dial: Arc<dyn Dial>,
    ) -> Result<Self, NbdError> {
        let server = handshake::name(&spec.server);
        let system = |error| NbdError::Unreachable { server: server.clone(), error };
        let shared = Arc::new(Shared {
            wake: EventFd::new().map_err(system)?,
            stop: AtomicBool::new(false),
            losses: Arc::default(),
            reconnects: Arc::default(),
            failures: Arc::default(),
        });
        let (jobs, incoming) = unbounded();
        let mut client = Client {
            spec: spec.clone(),
            dial,
            server: server.clone(),
            patience: options.patience,
            shared: Arc::clone(&shared),
            jobs: incoming,
            requests: Requests::new(export),
            export,
            stream,
            bytes: alloc::vec![0; IN],
            have: 0,
            lost: None,
        };
        let thread = threads::start("nbd", move || client.serve());
        Ok(Self { jobs, shared, thread: Some(thread.map_err(system)?), export })
    }

    /// Returns the disk's geometry.
    #[must_use]
    pub fn geometry(&self, read_only: bool) -> Geometry {
        self.export.geometry(read_only)
    }

    /// Returns the rate-limited log events of a server, by name: connection lost, reconnected,
    /// given up.
    #[must_use]
    pub fn events(&self) -> [(&'static str, Arc<LogLimit>); 3] {
        let Shared { losses, reconnects, failures, .. } = &*self.shared;
        [
            ("server-lost", Arc::clone(losses)),
            ("server-back", Arc::clone(reconnects)),
            ("server-given-up", Arc::clone(failures)),
        ]
    }
}

/// Connects to a server, before the handshake.
pub(crate) fn dial(spec: &NbdSpec, dial: &dyn Dial) -> Result<OwnedFd, NbdError> {
    let server = || handshake::name(&spec.server);
    dial.dial(&spec.server).map_err(|error| NbdError::Unreachable { server: server(), error })
}

/// Connects to a server and negotiates an export that can be used as `options` require.
pub(crate) fn negotiate(
    spec: &NbdSpec,
    options: NbdOptions,
    dial: &dyn Dial,
) -> Result<(Stream, Export), NbdError> {
    let (stream, export) = handshake::connect(spec, dial)?;
    Ok((stream, check_mode(spec, options, export)?))
}

fn check_mode(spec: &NbdSpec, options: NbdOptions, export: Export) -> Result<Export, NbdError> {
    if export.can(export::READ_ONLY) && !options.read_only {
        let server = handshake::name(&spec.server);
        return Err(NbdError::ReadOnly { server, export: spec.export.clone() });
    }
    Ok(export)
}

impl Export {
    /// Returns the geometry of the disk.
    #[must_use]
    pub fn geometry(&self, read_only: bool) -> Geometry {
        let sector_size = if self.min_block > 512 { 4096 } else { 512 };
        let trims = self.can(export::SEND_TRIM) && !read_only;
        Geometry {
            sectors: self.size / 512,
            sector_size,
            physical_sector_size: 4096,
            copied: false,
            read_only,
            discard: trims.then_some(Discard {
                granularity: sector_size,
                alignment: 0,
                secure: false,
            }),
        }
    }
}

impl Executor for NbdLink {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        for job in jobs {
            // If the thread has ended, the job is dropped, which completes it with an error.
            let _ = self.jobs.send(job);
        }
        self.shared.wake.notify();
    }
}

impl Drop for NbdLink {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.notify();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of an NBD connection panicked");
        }
    }
}

/// The reason why a connection is no longer usable.
enum Broken {
    Stop,
    Lost(Lost),
    Io(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Lost> for Broken {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

struct Client {
    spec: NbdSpec,
    dial: Arc<dyn Dial>,
    server: String,
    patience: Duration,
    shared: Arc<Shared>,
    jobs: Receiver<Job>,
    requests: Requests,
    export: Export,
    stream: Option<Stream>,
    /// Received data: the first `have` bytes are an incomplete message.
    bytes: alloc::vec::Vec<u8>,
    have: usize,
    /// Time at which the server was lost; `None` after it has replied to a request again.
    lost: Option<Instant>,
}

impl Client {
    fn serve(&mut self) {
        loop {
            if let Some(mut stream) = self.stream.take() {
                let why = match self.run(&mut stream) {
                    Broken::Stop => {
                        let leave = wire::Request::new(cmd::DISCONNECT, 0, 0, 0);
                        let _ = stream.write_all(leave.as_bytes());
                        break;
                    }
                    Broken::Lost(Lost(what)) => String::from(what),
                    Broken::Io(error) => alloc::format!("{error}"),
                };
                if let Some(unlogged) = self.shared.losses.admit() {
                    let server = &self.server;
                    tracing::warn!(server, why, unlogged, "NBD server disconnected");
                }
            }
            if !self.reconnect() {
                break;
            }
        }
        for job in self.jobs.try_iter() {
            self.requests.add(job);
        }
        self.requests.fail(EngineError::Os(EIO));
    }

    /// Sends and receives until the connection fails.
    fn run(&mut self, stream: &mut Stream) -> Broken {
        self.have = 0;
        let mut last_received = Instant::now();
        loop {
            match self.exchange(stream, &mut last_received) {
                Ok(()) => {}
                Err(broken) => return broken,
            }
        }
    }

    /// Sends, waits for the socket or for jobs, and receives.
    fn exchange(&mut self, stream: &mut Stream, last_received: &mut Instant) -> Result<(), Broken> {
        if self.shared.stop.load(Ordering::Acquire) {
            return Err(Broken::Stop);
        }
        if self.requests.is_empty() {
            *last_received = Instant::now();
        }
        for job in self.jobs.try_iter() {
            self.requests.add(job);
        }
        let outgoing = !self.send(stream)?;
        let silent = last_received.elapsed();
        if !self.requests.is_empty() && silent > SILENCE {
            return Err(Broken::Lost(Lost("it does not reply within the timeout")));
        }
        let timeout = (!self.requests.is_empty()).then(|| SILENCE - silent.min(SILENCE));
        let flags = if outgoing { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let (socket, woken) = wait(stream.as_fd(), flags, &self.shared.wake, timeout)?;
        if woken {
            self.shared.wake.clear();
        }
        if socket && self.receive(stream)? {
            *last_received = Instant::now();
            self.lost = None;
        }
        Ok(())
    }

    /// Sends as much as the socket accepts. Returns whether everything was sent.
    fn send(&mut self, stream: &mut Stream) -> Result<bool, Broken> {
        loop {
            let bytes = self.requests.outgoing();
            if bytes.is_empty() {
                return Ok(true);
            }
            match stream.write(bytes) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(n) => self.requests.sent(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Receives available data. Returns whether there was any.
    fn receive(&mut self, stream: &mut Stream) -> Result<bool, Broken> {
        let mut any = false;
        loop {
            let room = self.bytes.get_mut(self.have..).unwrap_or_default();
            match stream.read(room) {
                Ok(0) => return Err(Lost("it closed the connection").into()),
                Ok(n) => self.have += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            }
            any = true;
            let rest = self.requests.incoming(&self.bytes[..self.have])?.len();
            // The rest is an incomplete header, far smaller than the buffer.
            self.bytes.copy_within(self.have - rest..self.have, 0);
            self.have = rest;
        }
    }

    /// Reconnects when there is something to send. Returns whether to continue.
    fn reconnect(&mut self) -> bool {
        let mut pause = PAUSE.0;
        if self.lost.is_some() {
            // The server accepts connections but does not reply to requests.
            sleep(&self.shared.wake, Some(PAUSE.1));
        }
        loop {
            for job in self.jobs.try_iter() {
                self.requests.add(job);
            }
            if self.shared.stop.load(Ordering::Acquire) {
                return false;
            }
            if self.requests.is_empty() {
                // No request is waiting: reconnecting is deferred to the next request.
                self.lost = None;
                sleep(&self.shared.wake, None);
                continue;
            }
            let lost = *self.lost.get_or_insert_with(Instant::now);
            let too_long = || lost.elapsed() >= self.patience;
            let error = match handshake::connect(&self.spec, &*self.dial) {
                Ok((stream, export)) if !too_long() && self.is_the_same(export) => {
                    self.export = export;
                    self.requests.requeue(export);
                    self.stream = Some(stream);
                    if let Some(unlogged) = self.shared.reconnects.admit() {
                        tracing::info!(server = self.server, unlogged, "NBD server reconnected");
                    }
                    return true;
                }
                Ok((_, export)) => NbdError::Refused {
                    server: self.server.clone(),
                    what: if self.is_the_same(export) {
                        "it does not respond".into()
                    } else {
                        "the export has changed".into()
                    },
                    remedy: None,
                },
                Err(error) => error,
            };
            if too_long() {
                if let Some(unlogged) = self.shared.failures.admit() {
                    let (server, error) = (&self.server, Report(&error));
                    tracing::error!(server, %error, unlogged, "NBD server given up: its requests fail");
                }
                self.requests.fail(EngineError::Os(EIO));
                continue;
            }
            sleep(&self.shared.wake, Some(pause));
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Returns whether an export is compatible with the disk that the guest uses.
    fn is_the_same(&self, now: Export) -> bool {
        let lasting = export::READ_ONLY | export::SEND_FLUSH | export::SEND_TRIM;
        now.size == self.export.size
            && now.min_block <= self.export.min_block
            && now.max_block >= self.export.max_block
            && now.flags & lasting == self.export.flags & lasting
    }
}

/// Waits for the socket or for jobs. Returns which of them is ready.
fn wait(
    socket: impl AsFd,
    flags: PollFlags,
    wake: &EventFd,
    timeout: Option<Duration>,
) -> io::Result<(bool, bool)> {
    let mut files = [PollFd::new(&socket, flags), PollFd::new(wake, PollFlags::IN)];
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    match poll(&mut files, timeout.as_ref()) {
        Ok(_) => {
            let [socket, wake] = files.map(|file| !file.revents().is_empty());
            Ok((socket, wake))
        }
        Err(Errno::INTR) => Ok((false, false)),
        Err(e) => Err(e.into()),
    }
}

/// Waits for jobs, at most for `timeout`.
fn sleep(wake: &EventFd, timeout: Option<Duration>) {
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    let mut files = [PollFd::new(wake, PollFlags::IN)];
    if poll(&mut files, timeout.as_ref()).is_ok_and(|ready| ready > 0) {
        wake.clear();
    }
}
