//! A client over a Unix socket (`/run/xenstored/socket`, or any other) or over Linux's
//! `/dev/xen/xenbus`.
//!
//! [`Client`] sends one request at a time and waits for its response. Events that arrive during the
//! wait are queued; equal ones are merged, and beyond [`EVENT_LIMIT`] they are reduced to one per
//! watch. The client is [`AsFd`], so that a thread can wait on it together with other descriptors
//! and then take all events with [`Xenstore::poll_event`]. Events may be queued although the
//! descriptor is not readable: poll for events before waiting on the descriptor.
//!
//! Over `/dev/xen/xenbus` the client is a part of the kernel's own connection to the server. This
//! differs in three ways: watching the same path with the same token twice succeeds; so does
//! removing a watch that does not exist; and [`Op::ResetWatches`] is rejected here, because it
//! would remove all watches of the kernel.

mod events;
mod transport;

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::vec::Vec;

use crate::wire::XsErrno;
use crate::wire::{Frame, HEADER_LEN, Header, Op, PAYLOAD_MAX, decode};
use crate::xenstore::{WatchEvent, Xenstore, XsError, concat_payload, refusal};
use events::{Events, parse_event};
use transport::{SendError, Transport, Wait};

pub use events::EVENT_LIMIT;

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

/// A connection to a xenstore server; see the module documentation.
#[derive(Debug)]
pub struct Client {
    transport: Transport,
    /// Bytes received and not yet parsed: less than one whole message plus the size of one read.
    input: Vec<u8>,
    events: Events,
    last_req: u32,
    /// The failure that made the connection unusable.
    broken: Option<XsError>,
}

impl Client {
    /// Connects to a server's socket, or opens a character device with the same protocol.
    ///
    /// # Errors
    /// The system's error, if the connection or the open fails.
    pub fn connect(path: impl AsRef<Path>) -> std::io::Result<Self> {
        let path = path.as_ref();
        if std::fs::metadata(path)?.file_type().is_char_device() {
            let device = OpenOptions::new().read(true).write(true).open(path)?;
            return Self::new(Transport::Device(device));
        }
        Self::from_stream(UnixStream::connect(path)?)
    }

    /// Uses a connected stream, which is made non-blocking.
    ///
    /// # Errors
    /// The system's error, if the stream cannot be made non-blocking.
    pub fn from_stream(stream: UnixStream) -> std::io::Result<Self> {
        Self::new(Transport::Socket(stream))
    }

    fn new(transport: Transport) -> std::io::Result<Self> {
        transport.set_nonblocking()?;
        Ok(Self {
            transport,
            input: Vec::new(),
            events: Events::default(),
            last_req: 0,
            broken: None,
        })
    }

    /// Sends all of `bytes`, receiving concurrently so that client and server cannot wait for each
    /// other without end.
    fn send(&mut self, mut bytes: &[u8]) -> Result<(), SendError> {
        while !bytes.is_empty() {
            match self.transport.send(bytes)? {
                Some(sent) => bytes = bytes.get(sent..).unwrap_or(&[]),
                None => {
                    self.transport.wait(Wait::ReadOrWrite, None)?;
                    // A response cannot arrive before its request was sent.
                    if self.receive()? && self.take_messages(None)?.is_some() {
                        return Err(XsError::Protocol("an answer to no request").into());
                    }
                }
            }
        }
        Ok(())
    }

    /// Receives what is available; returns whether there was anything.
    fn receive(&mut self) -> Result<bool, XsError> {
        let mut chunk = [0_u8; HEADER_LEN + PAYLOAD_MAX];
        match self.transport.receive(&mut chunk)? {
            Some(0) => Err(XsError::Closed),
            Some(n) => {
                self.input.extend_from_slice(chunk.get(..n).unwrap_or(&[]));
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Processes the complete messages received: queues events, and returns the response to
    /// `req_id`.
    fn take_messages(&mut self, req_id: Option<u32>) -> Result<Option<(Header, Vec<u8>)>, XsError> {
        loop {
            let Some(Frame { header, payload }) =
                decode(&self.input).map_err(|_| XsError::Protocol("a message that is too long"))?
            else {
                return Ok(None);
            };
            let len = HEADER_LEN.saturating_add(payload.len());
            if header.op() == Some(Op::WatchEvent) {
                let event = parse_event(payload)
                    .ok_or(XsError::Protocol("an event without a path or a token"))?;
                self.events.push(event);
                self.input.drain(..len);
                continue;
            }
            let payload = payload.to_vec();
            self.input.drain(..len);
            if req_id == Some(header.req_id) {
                return Ok(Some((header, payload)));
            }
            return Err(XsError::Protocol("an answer to no request"));
        }
    }

    fn exchange(
        &mut self,
        op: Op,
        tx_id: u32,
        parts: &[&[u8]],
        body: &[u8],
    ) -> Result<Vec<u8>, XsError> {
        self.last_req = self.last_req.wrapping_add(1);
        let req_id = self.last_req;
        let header = Header::new(op, req_id, tx_id, body.len()).map_err(|_| XsError::TooLong)?;
        let mut message = header.emit().to_vec();
        message.extend_from_slice(body);
        match self.send(&message) {
            Ok(()) => {}
            Err(SendError::Refused(errno)) => return Err(XsError::refused(op, parts, errno)),
            Err(SendError::Lost(error)) => return Err(error),
        }
        loop {
            if let Some((header, answer)) = self.take_messages(Some(req_id))? {
                return match header.op() {
                    Some(Op::Error) => Err(refusal(op, parts, &answer)),
                    Some(answered) if answered == op => Ok(answer),
                    _ => Err(XsError::Protocol("an answer of another kind")),
                };
            }
            if !self.receive()? {
                self.transport.wait(Wait::Read, None)?;
            }
        }
    }

    /// Stores a failure of the connection, which all later calls return; a rejected request is not
    /// one.
    fn note<T>(&mut self, result: Result<T, XsError>) -> Result<T, XsError> {
        if let Err(e) = &result
            && !matches!(e, XsError::Refused { .. } | XsError::TooLong)
        {
            self.broken = Some(e.clone());
        }
        result
    }

    fn next_event(
        &mut self,
        deadline: Option<Option<Instant>>,
    ) -> Result<Option<WatchEvent>, XsError> {
        loop {
            if let Some(event) = self.events.pop() {
                return Ok(Some(event));
            }
            if let Some(e) = &self.broken {
                return Err(e.clone());
            }
            // Events that arrived together with a response are in the buffer.
            self.take_messages(None)?;
            if !self.events.is_empty() || self.receive()? {
                continue;
            }
            let Some(until) = deadline else {
                return Ok(None);
            };
            let left = until.map(|t| t.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            self.transport.wait(Wait::Read, left)?;
        }
    }
}

impl Xenstore for Client {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        if let Some(e) = &self.broken {
            return Err(e.clone());
        }
        if op == Op::ResetWatches && self.transport.is_the_kernels() {
            return Err(XsError::refused(op, parts, XsErrno::Perm));
        }
        let body = concat_payload(parts)?;
        let result = self.exchange(op, tx_id, parts, &body);
        let answer = self.note(result)?;
        match op {
            Op::Watch => self.events.watched(&body),
            Op::Unwatch => self.events.unwatched(&body),
            Op::ResetWatches => self.events.reset(),
            _ => {}
        }
        Ok(answer)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        let result = self.next_event(None);
        self.note(result)
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        // A timeout beyond the range of the clock is infinite.
        let until = timeout.and_then(|t| Instant::now().checked_add(t));
        let result = self.next_event(Some(until));
        self.note(result)
    }
}

/// The descriptor becomes readable when an event or the end of the connection arrives.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}
