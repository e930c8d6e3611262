//! A client of the Network Block Device (NBD) protocol.
//!
//! Implements `doc/proto.md` of the NBD project: the fixed newstyle handshake with `NBD_OPT_GO`,
//! structured replies if the server has them, any number of requests in flight. Encryption is not
//! supported.
//!
//! # Loss of the connection
//! The client reconnects and **sends every request without a reply again**, in the original order.
//! The guest sees no error during that time. If the server does not return within a [bounded
//! time](NbdOptions::patience), the waiting requests fail, and the next request starts a new
//! attempt.
//!
//! Two failures cannot be handled by a client: a server that lost writes which it had completed but
//! not flushed (a crash of its machine), and a server that still executes a request of the old
//! connection after the new connection took over.

#[cfg(fuzzing)]
pub mod fuzz;
mod handshake;
mod link;
mod requests;
mod stream;
mod wire;

pub use handshake::Export;
pub use link::NbdLink;
pub(crate) use link::{dial, negotiate};
pub use stream::{Dial, Network};

use alloc::borrow::Cow;
use alloc::string::String;
use pvio_ring::error::Remedy;
use std::io;
use std::time::Duration;

/// Options of a connection to a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NbdOptions {
    /// Reject writes.
    pub read_only: bool,
    /// Time for which requests wait for a lost server before they fail.
    pub patience: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self { read_only: false, patience: Duration::from_secs(30) }
    }
}

/// The reason why a network block device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The server cannot be reached.
    #[error("the NBD server at {server} cannot be reached")]
    Unreachable {
        /// Address of the server.
        server: String,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// The server does not speak NBD, or violates the protocol.
    #[error("the NBD server at {server} violated the protocol: {what}")]
    Protocol {
        /// Address of the server.
        server: String,
        /// The violation.
        what: &'static str,
    },
    /// The export does not exist.
    #[error("the NBD server at {server} has no export {export:?}")]
    NoExport {
        /// Address of the server.
        server: String,
        /// Name of the requested export.
        export: String,
    },
    /// The server rejects the connection or an option.
    #[error("the NBD server at {server} cannot be used: {what}")]
    Refused {
        /// Address of the server.
        server: String,
        /// The reason.
        what: String,
        /// What the operator can do next, if anything.
        remedy: Option<&'static str>,
    },
    /// The export is read-only.
    #[error("the export {export:?} of {server} cannot be opened for writing: it is read-only")]
    ReadOnly {
        /// Address of the server.
        server: String,
        /// Name of the requested export.
        export: String,
    },
    /// The export's size or block size is not usable for a disk.
    #[error(
        "the export {export:?} of {server} with {size} bytes in blocks of {block} cannot be used: {what}"
    )]
    Shape {
        /// Address of the server.
        server: String,
        /// Name of the requested export.
        export: String,
        /// Its size in bytes.
        size: u64,
        /// Minimum length of its requests, in bytes.
        block: u32,
        /// The reason.
        what: &'static str,
    },
}

impl NbdError {
    /// Returns a short stable code for logs and `error` nodes.
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

impl Remedy for NbdError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        let remedy = match self {
            Self::Unreachable { .. } => "check that the NBD server is running",
            Self::Protocol { .. } => "check that an NBD server listens at this address",
            Self::NoExport { .. } => "list the exports it has with nbdinfo --list",
            Self::Refused { remedy, .. } => (*remedy)?,
            Self::ReadOnly { .. } => "attach the disk read-only",
            Self::Shape { .. } => "change the server's settings of the export",
        };
        Some(remedy.into())
    }
}
