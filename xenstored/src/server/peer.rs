//! Input and output of one connection.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::vec::Vec;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::id::ConnId;
use crate::store::Store;
use pvio_xenbus::wire::{HEADER_LEN, PAYLOAD_MAX, decode};

/// Number of requests executed for one connection before other connections are served.
const REQUESTS_A_TURN: usize = 32;
/// Bytes of unsent output above which no more is taken from the store.
const OUTPUT_LIMIT: usize = 16 * 1024;
const INPUT_LIMIT: usize = 2 * (HEADER_LEN + PAYLOAD_MAX);

/// The connection is closed or unusable.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

#[derive(Debug)]
pub(super) struct Peer {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Number of bytes of `output` that are sent.
    sent: usize,
    at_end: bool,
    /// Whether it is a connection through the listening socket.
    pub from_socket: bool,
}

impl Peer {
    pub const fn new(stream: UnixStream, from_socket: bool) -> Self {
        Self { stream, input: Vec::new(), output: Vec::new(), sent: 0, at_end: false, from_socket }
    }

    /// Returns the events to wait for. A connection that is not read from has unsent output, so the
    /// set is never empty, and a closed peer is detected by sending.
    pub fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        if self.may_take() && self.input.len() < INPUT_LIMIT && !self.at_end {
            flags |= PollFlags::IN;
        }
        if !self.output.is_empty() {
            flags |= PollFlags::OUT;
        }
        flags
    }

    /// Receives what is available, as far as there is room.
    pub fn receive(&mut self) -> Result<(), Gone> {
        let room = INPUT_LIMIT.saturating_sub(self.input.len());
        let mut chunk = [0_u8; INPUT_LIMIT];
        let Some(into) = chunk.get_mut(..room).filter(|c| !c.is_empty()) else {
            return Ok(());
        };
        match recv(&self.stream, &mut *into, RecvFlags::empty()) {
            Ok((0, _)) => self.at_end = true,
            Ok((n, _)) => self.input.extend_from_slice(into.get(..n).unwrap_or(&[])),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Err(Gone),
        }
        Ok(())
    }

    /// Executes the requests of one turn; returns whether requests are left that could be executed
    /// now.
    pub fn work(&mut self, conn: ConnId, store: &mut Store) -> Result<bool, Gone> {
        let mut taken = 0_usize;
        let mut left = false;
        for done in 0..=REQUESTS_A_TURN {
            // After an oversize message, the boundaries of later messages are unknown: the
            // connection cannot continue.
            let rest = self.input.get(taken..).unwrap_or(&[]);
            let Some(frame) = decode(rest).map_err(|_| Gone)? else {
                break;
            };
            if !self.may_take() || !store.can_accept(conn) {
                break;
            }
            if done == REQUESTS_A_TURN {
                left = true;
                break;
            }
            taken = taken.saturating_add(frame.wire_len());
            store.handle(conn, &frame.header, frame.payload).map_err(|_| Gone)?;
        }
        self.input.drain(..taken);
        Ok(left)
    }

    /// Sends output. After the end of the input, output that cannot be sent immediately is
    /// discarded.
    pub fn flush(&mut self, conn: ConnId, store: &mut Store) -> Result<(), Gone> {
        loop {
            if self.may_take() {
                store.take_output(conn, &mut self.output, OUTPUT_LIMIT);
            }
            let rest = self.output.get(self.sent..).unwrap_or(&[]);
            if rest.is_empty() {
                self.output.clear();
                self.sent = 0;
                break;
            }
            match send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(n) => self.sent = self.sent.saturating_add(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return Err(Gone),
            }
            if self.sent >= self.output.len() {
                self.output.clear();
                self.sent = 0;
                if !store.has_output(conn) {
                    break;
                }
            }
        }
        if self.at_end && (!self.has_request() || !self.output.is_empty()) {
            Err(Gone)
        } else {
            Ok(())
        }
    }

    /// Returns whether a complete request is in the buffer and would be accepted now.
    pub fn could_work(&self, conn: ConnId, store: &Store) -> bool {
        self.may_take() && store.can_accept(conn) && self.has_request()
    }

    fn has_request(&self) -> bool {
        matches!(decode(&self.input), Ok(Some(_)))
    }

    fn may_take(&self) -> bool {
        self.output.len() < OUTPUT_LIMIT
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
