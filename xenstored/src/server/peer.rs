//! Input and output of one connection.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::buffers::{Buffers, INPUT_LIMIT};
use crate::id::ConnId;
use crate::store::Store;

/// The connection is closed or unusable.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Disconnected;

#[derive(Debug)]
pub(super) struct Peer {
    stream: UnixStream,
    buffers: Buffers,
    at_end: bool,
    /// Whether it is a connection through the listening socket.
    pub from_socket: bool,
}

impl Peer {
    pub fn new(stream: UnixStream, from_socket: bool) -> Self {
        Self { stream, buffers: Buffers::default(), at_end: false, from_socket }
    }

    /// Returns the events to wait for. A connection that is not read from has unsent output, so the
    /// set is never empty, and a closed peer is detected by sending.
    pub fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        if self.buffers.has_room_for_output() && self.buffers.room() > 0 && !self.at_end {
            flags |= PollFlags::IN;
        }
        if self.buffers.has_output() {
            flags |= PollFlags::OUT;
        }
        flags
    }

    /// Receives what is available, as far as there is room.
    pub fn receive(&mut self) -> Result<(), Disconnected> {
        let mut chunk = [0_u8; INPUT_LIMIT];
        let Some(into) = chunk.get_mut(..self.buffers.room()).filter(|c| !c.is_empty()) else {
            return Ok(());
        };
        match recv(&self.stream, &mut *into, RecvFlags::empty()) {
            Ok((0, _)) => self.at_end = true,
            Ok((n, _)) => self.buffers.received(into.get(..n).unwrap_or(&[])),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Err(Disconnected),
        }
        Ok(())
    }

    /// Executes the requests of one turn; returns whether requests are left that could be executed
    /// now.
    pub fn work(&mut self, conn: ConnId, store: &mut Store) -> Result<bool, Disconnected> {
        self.buffers.execute(conn, store).map_err(|_| Disconnected)
    }

    /// Sends output. After the end of the input, output that cannot be sent immediately is
    /// discarded.
    pub fn flush(&mut self, conn: ConnId, store: &mut Store) -> Result<(), Disconnected> {
        loop {
            let rest = self.buffers.unsent(conn, store);
            if rest.is_empty() {
                break;
            }
            match send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(n) => {
                    if self.buffers.sent(n) && !store.has_output(conn) {
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return Err(Disconnected),
            }
        }
        if self.at_end && (!self.buffers.has_request() || self.buffers.has_output()) {
            Err(Disconnected)
        } else {
            Ok(())
        }
    }

    /// Returns whether a complete request is in the buffer and would be accepted now.
    pub fn could_work(&self, conn: ConnId, store: &Store) -> bool {
        self.buffers.could_execute(conn, store)
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
