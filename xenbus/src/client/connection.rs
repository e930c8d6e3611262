//! The exchange of messages over any transport: requests with their responses, and events.

use alloc::vec::Vec;
use core::time::Duration;

use super::events::{Events, parse_event};
use super::transport::{SendError, Transport, Wait};
use crate::wire::{Frame, HEADER_LEN, Header, Op, PAYLOAD_MAX, XsErrno, decode};
use crate::xenstore::{WatchEvent, Xenstore, XsError, concat_payload, refusal};

/// A connection to a xenstore server over a transport.
#[derive(Debug)]
pub(super) struct Connection<T> {
    pub transport: T,
    /// Bytes received and not yet parsed: less than one whole message plus the size of one read.
    input: Vec<u8>,
    events: Events,
    last_req: u32,
    /// The failure that made the connection unusable.
    broken: Option<XsError>,
}

impl<T: Transport> Connection<T> {
    pub fn new(transport: T) -> Self {
        Self { transport, input: Vec::new(), events: Events::default(), last_req: 0, broken: None }
    }

    /// Starts over after the transport has reconnected: the server has dropped all state of the
    /// connection.
    pub fn reset(&mut self) {
        self.input.clear();
        self.events = Events::default();
        self.broken = None;
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
                        return Err(XsError::Protocol("a response to no request").into());
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
            return Err(XsError::Protocol("a response to no request"));
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
            if let Some((header, response)) = self.take_messages(Some(req_id))? {
                return match header.op() {
                    Some(Op::Error) => Err(refusal(op, parts, &response)),
                    Some(kind) if kind == op => Ok(response),
                    _ => Err(XsError::Protocol("a response of another kind")),
                };
            }
            if !self.receive()? {
                self.transport.wait(Wait::Read, None)?;
            }
        }
    }

    /// Stores a failure of the connection, which all later calls return; a rejected request is not
    /// one.
    fn remember<R>(&mut self, result: Result<R, XsError>) -> Result<R, XsError> {
        if let Err(e) = &result
            && !matches!(e, XsError::Refused { .. } | XsError::TooLong)
        {
            self.broken = Some(e.clone());
        }
        result
    }

    fn next_event(
        &mut self,
        deadline: Option<Option<T::Deadline>>,
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
            if !self.transport.wait(Wait::Read, until)? {
                return Ok(None);
            }
        }
    }
}

impl<T: Transport> Xenstore for Connection<T> {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        if let Some(e) = &self.broken {
            return Err(e.clone());
        }
        if op == Op::ResetWatches && self.transport.is_shared() {
            return Err(XsError::refused(op, parts, XsErrno::Perm));
        }
        let body = concat_payload(parts)?;
        let result = self.exchange(op, tx_id, parts, &body);
        let response = self.remember(result)?;
        match op {
            Op::Watch => self.events.watched(&body),
            Op::Unwatch => self.events.unwatched(&body),
            Op::ResetWatches => self.events.reset(),
            _ => {}
        }
        Ok(response)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        let result = self.next_event(None);
        self.remember(result)
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        // A timeout beyond the range of the clock is infinite.
        let until = timeout.and_then(|t| self.transport.deadline(t));
        let result = self.next_event(Some(until));
        self.remember(result)
    }
}
