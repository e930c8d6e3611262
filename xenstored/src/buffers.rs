//! Input and output of one connection, between a transport and the store.

use alloc::vec::Vec;

use pvio_xenbus::wire::{FrameError, HEADER_LEN, PAYLOAD_MAX, decode};

use crate::id::ConnId;
use crate::store::{Store, StoreError};

/// Number of requests executed for one connection before other connections are served.
const REQUESTS_A_TURN: usize = 32;
/// Bytes of unsent output above which no more is taken from the store.
const OUTPUT_LIMIT: usize = 16 * 1024;
/// Bytes of input that are buffered.
pub(crate) const INPUT_LIMIT: usize = 2 * (HEADER_LEN + PAYLOAD_MAX);

/// Why requests cannot be executed any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// After an oversize message, the boundaries of later messages are unknown.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection is gone from the store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Bytes received and not yet executed, and responses and events not yet sent.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    input: Vec<u8>,
    output: Vec<u8>,
    /// Number of bytes of `output` that are sent.
    sent: usize,
}

impl Buffers {
    /// Returns the number of bytes that may be received now.
    pub fn room(&self) -> usize {
        INPUT_LIMIT.saturating_sub(self.input.len())
    }

    /// Adds received bytes.
    pub fn received(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Executes the requests of one turn; returns whether requests are left that could be executed
    /// now.
    pub fn execute(&mut self, conn: ConnId, store: &mut Store) -> Result<bool, Unusable> {
        let mut taken = 0_usize;
        let mut left = false;
        for done in 0..=REQUESTS_A_TURN {
            let rest = self.input.get(taken..).unwrap_or(&[]);
            let Some(frame) = decode(rest)? else {
                break;
            };
            if !self.has_room_for_output() || !store.can_accept(conn) {
                break;
            }
            if done == REQUESTS_A_TURN {
                left = true;
                break;
            }
            taken = taken.saturating_add(frame.wire_len());
            store.handle(conn, &frame.header, frame.payload)?;
        }
        self.input.drain(..taken);
        Ok(left)
    }

    /// Takes output from the store if there is room, and returns the bytes to be sent.
    pub fn unsent(&mut self, conn: ConnId, store: &mut Store) -> &[u8] {
        if self.has_room_for_output() {
            store.take_output(conn, &mut self.output, OUTPUT_LIMIT);
        }
        self.output.get(self.sent..).unwrap_or(&[])
    }

    /// Records that the first `count` bytes of [`unsent`](Self::unsent) are sent. Returns whether
    /// all are.
    pub fn sent(&mut self, count: usize) -> bool {
        self.sent = self.sent.saturating_add(count);
        let all = self.sent >= self.output.len();
        if all {
            self.output.clear();
            self.sent = 0;
        }
        all
    }

    /// Returns whether output is left to be sent.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Returns whether there is room for the output of further requests.
    pub fn has_room_for_output(&self) -> bool {
        self.output.len() < OUTPUT_LIMIT
    }

    /// Returns whether a complete request is in the buffer.
    pub fn has_request(&self) -> bool {
        matches!(decode(&self.input), Ok(Some(_)))
    }

    /// Returns whether a complete request is in the buffer and would be accepted now.
    pub fn could_execute(&self, conn: ConnId, store: &Store) -> bool {
        self.has_room_for_output() && store.can_accept(conn) && self.has_request()
    }
}
