//! A disk at the end of a socket: a client of the Network Block Device protocol.
//!
//! After `doc/proto.md` of the NBD project: the fixed newstyle handshake with `NBD_OPT_GO`,
//! structured replies where the server has them, any number of requests in flight. No encryption.
//!
//! # When the server goes away
//! The connection is made again, and **every request without an answer is sent again**, in its old
//! order. Nothing is reported to the guest meanwhile. If the server is not back after a
//! [bounded time](NbdOptions::patience), what waits fails, and the next request begins to try anew.
//!
//! Two things no client can make good: a server that lost writes which it had answered and not yet
//! flushed (a crash of its whole machine), and one that still carries out a request of the old
//! connection after the new one took over.

mod handshake;
mod link;
mod requests;
mod stream;
mod wire;

pub use link::NbdLink;

use alloc::string::String;
use std::io;
use std::time::Duration;

/// How to talk to a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NbdOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// How long requests wait for a server that went away before they fail.
    pub patience: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self { read_only: false, patience: Duration::from_secs(30) }
    }
}

/// Why a network block device cannot be used. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// Nobody answers.
    #[error("the NBD server at {server} cannot be reached: {error}; is it running?")]
    Unreachable {
        /// Where it should be.
        server: String,
        /// What the system says.
        error: io::Error,
    },
    /// What answers speaks something else, or breaks the rules.
    #[error("the NBD server at {server} broke the protocol: {what}; is it one?")]
    Protocol {
        /// Where it is.
        server: String,
        /// What it did.
        what: &'static str,
    },
    /// There is no such export.
    #[error(
        "the NBD server at {server} has no export {export:?}; nbdinfo --list tells which it has"
    )]
    NoExport {
        /// Where it is.
        server: String,
        /// What was asked for.
        export: String,
    },
    /// It says no.
    #[error("the NBD server at {server} refuses: {what}")]
    Refused {
        /// Where it is.
        server: String,
        /// Why, and what to do.
        what: String,
    },
    /// The export cannot be written.
    #[error("the export {export:?} of {server} is read-only; attach it so")]
    ReadOnly {
        /// Where it is.
        server: String,
        /// What was asked for.
        export: String,
    },
    /// The export is no disk of whole sectors.
    #[error("the export {export:?} of {server} has {size} bytes in blocks of {block}; {what}")]
    Shape {
        /// Where it is.
        server: String,
        /// What was asked for.
        export: String,
        /// Its size in bytes.
        size: u64,
        /// The smallest piece it reads or writes, in bytes.
        block: u32,
        /// What would be right.
        what: &'static str,
    },
}

impl NbdError {
    /// A short stable code for logs and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "nbd-unreachable",
            Self::Protocol { .. } => "nbd-protocol",
            Self::NoExport { .. } => "nbd-no-export",
            Self::Refused { .. } => "nbd-refused",
            Self::ReadOnly { .. } => "nbd-read-only",
            Self::Shape { .. } => "nbd-shape",
        }
    }
}
