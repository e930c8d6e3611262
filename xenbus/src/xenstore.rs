//! The interface to xenstore that devices use: one trait for every implementation.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use pvio_ring::DomId;
use pvio_ring::error::Remedy;

use crate::wire::{Op, PAYLOAD_MAX, Perm, XsErrno, split_string, strings};

/// Maximum number of attempts of a [`transaction`].
pub const TRANSACTION_RETRIES: usize = 64;

/// Maximum number of parts (of nearly 4 KiB each) of a list of children that
/// [`Xenstore::directory`] reads, and maximum number of restarts when the list changes during the
/// reads.
const DIRECTORY_PARTS: usize = 256;
const DIRECTORY_RETRIES: usize = 16;

/// Something changed at or below a watched path, or the watch was just registered. Events may be
/// merged and may be spurious: read the store to find out what changed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WatchEvent {
    /// The path that changed, relative if the watch was; or the watched path itself.
    pub path: String,
    /// The token the watch was registered with.
    pub token: String,
}

/// Why an operation failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum XsError {
    /// The server rejected the request.
    #[error("{op:?} of `{path}` was rejected: {errno}")]
    Refused {
        /// The operation.
        op: Op,
        /// The path of the operation: the payload's first string, for the operator.
        path: Box<str>,
        /// The server's error.
        errno: XsErrno,
    },
    /// The connection ended.
    #[error("the connection to xenstore is closed")]
    Closed,
    /// The connection failed; the system's error text.
    #[error("the connection to xenstore failed: {0}")]
    Transport(Box<str>),
    /// The server cannot serve the connection, or has reported an error and ignores it since then.
    #[error("xenstored does not serve the connection: {0}")]
    Server(Box<str>),
    /// The server violated the protocol; the connection is unusable.
    #[error("xenstored violated the protocol: {0}")]
    Protocol(&'static str),
    /// The request does not fit into one message of 4096 bytes.
    #[error("the request is longer than 4096 bytes")]
    TooLong,
    /// A transaction met a conflict at every attempt ([`TRANSACTION_RETRIES`]).
    #[error("a transaction had a conflict at every attempt")]
    Conflict,
}

impl Remedy for XsError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Closed | Self::Transport(_) => Some("check that xenstored is running".into()),
            Self::Refused { .. }
            | Self::Server(_)
            | Self::Protocol(_)
            | Self::TooLong
            | Self::Conflict => None,
        }
    }
}

impl XsError {
    /// Returns the error for a rejected request whose payload has these parts.
    #[must_use]
    pub fn refused(op: Op, parts: &[&[u8]], errno: XsErrno) -> Self {
        let path = parts.first().map_or("", |p| core::str::from_utf8(p).unwrap_or(""));
        Self::Refused { op, path: path.into(), errno }
    }

    /// Returns the server's error, if the server rejected the request.
    #[must_use]
    pub const fn errno(&self) -> Option<XsErrno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Returns whether the connection is unusable. All other errors (a transaction with a conflict
    /// at every attempt, a value that is too long) concern one request.
    #[must_use]
    pub const fn is_connection_lost(&self) -> bool {
        matches!(self, Self::Closed | Self::Transport(_) | Self::Server(_) | Self::Protocol(_))
    }

    /// Returns whether the node does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(XsErrno::NoEnt)
    }

    /// Returns whether the node does not exist, or may not be read. If a peer's node is gone
    /// together with its directory, xenstored reports only the latter: this domain may not read the
    /// nodes above it.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self.errno(), Some(XsErrno::NoEnt | XsErrno::Acces))
    }
}

/// A connection to xenstore.
///
/// Only [`request`](Self::request) and the two methods that return events must be implemented; the
/// others are built on them. Paths are absolute, or relative to the connection's domain. Inside
/// [`transaction`], the same operations are part of the transaction.
pub trait Xenstore {
    /// Sends one request of the given transaction (0: none), with the concatenation of `parts` as
    /// its payload, and returns the payload of the response.
    ///
    /// # Errors
    /// [`XsError::Refused`] if the server rejects the request; other variants if there is no
    /// response.
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError>;

    /// Returns an event if one is available; never waits.
    ///
    /// # Errors
    /// If the connection has ended and no event is left.
    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError>;

    /// Waits for an event: without limit if `timeout` is `None`, otherwise until it expires. A
    /// connection on which no event can occur while the caller waits (a store in the same thread)
    /// returns immediately.
    ///
    /// # Errors
    /// If the connection has ended and no event is left.
    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError>;

    /// Returns the transaction that operations belong to: 0, except for the `tx` inside
    /// [`transaction`].
    fn tx_id(&self) -> u32 {
        0
    }

    /// Reads a node's value, at most 4096 bytes.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `ENOENT` if there is no such node.
    fn read(&mut self, path: &str) -> Result<Vec<u8>, XsError> {
        self.request(Op::Read, self.tx_id(), &[path.as_bytes(), NUL])
    }

    /// Reads a node's value, if there is such a node.
    ///
    /// # Errors
    /// As [`Xenstore::read`], without `ENOENT`.
    fn read_opt(&mut self, path: &str) -> Result<Option<Vec<u8>>, XsError> {
        match self.read(path) {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Reads a node of a peer, which may be gone together with the permission to read it.
    ///
    /// # Errors
    /// As [`Xenstore::read`], without `ENOENT` and `EACCES`.
    fn read_peer(&mut self, path: &str) -> Result<Option<Vec<u8>>, XsError> {
        match self.read(path) {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.is_absent() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes a node's value, creating it and the nodes above as needed.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), XsError> {
        self.request(Op::Write, self.tx_id(), &[path.as_bytes(), NUL, value]).map(drop)
    }

    /// Creates a node if it does not exist.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn mkdir(&mut self, path: &str) -> Result<(), XsError> {
        self.request(Op::Mkdir, self.tx_id(), &[path.as_bytes(), NUL]).map(drop)
    }

    /// Removes a node and everything below it; succeeds if it does not exist.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn rm(&mut self, path: &str) -> Result<(), XsError> {
        match self.request(Op::Rm, self.tx_id(), &[path.as_bytes(), NUL]) {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }

    /// Lists the names of a node's children.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `ENOENT` if there is no such node.
    fn directory(&mut self, path: &str) -> Result<Vec<String>, XsError> {
        match self.request(Op::Directory, self.tx_id(), &[path.as_bytes(), NUL]) {
            Ok(list) => Ok(names(&list)),
            Err(e) if e.errno() == Some(XsErrno::TooBig) => directory_in_parts(self, path),
            Err(e) => Err(e),
        }
    }

    /// Reads a node's permissions; the first names its owner.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn get_perms(&mut self, path: &str) -> Result<Vec<Perm>, XsError> {
        let list = self.request(Op::GetPerms, self.tx_id(), &[path.as_bytes(), NUL])?;
        strings(&list)
            .map(|p| Perm::parse(p).map_err(|_| XsError::Protocol("a permission that is none")))
            .collect()
    }

    /// Replaces a node's permissions; only its owner and dom0 may do that, and only dom0 may change
    /// the owner.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn set_perms(&mut self, path: &str, perms: &[Perm]) -> Result<(), XsError> {
        let list: String = perms.iter().map(|p| format!("{p}\0")).collect();
        self.request(Op::SetPerms, self.tx_id(), &[path.as_bytes(), NUL, list.as_bytes()]).map(drop)
    }

    /// Watches a path and everything below it; the first event arrives immediately. The same path
    /// may be watched again with another token.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `EEXIST` if the watch exists.
    fn watch(&mut self, path: &str, token: &str) -> Result<(), XsError> {
        self.request(Op::Watch, 0, &[path.as_bytes(), NUL, token.as_bytes(), NUL]).map(drop)
    }

    /// Removes a watch. Events that were already sent may still arrive.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `ENOENT` if there is no such watch.
    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), XsError> {
        self.request(Op::Unwatch, 0, &[path.as_bytes(), NUL, token.as_bytes(), NUL]).map(drop)
    }

    /// Opens a transaction and returns its number. Prefer [`transaction`].
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn transaction_start(&mut self) -> Result<u32, XsError> {
        let response = self.request(Op::TransactionStart, 0, &[NUL])?;
        let id = split_string(&response).and_then(|(id, _)| crate::wire::parse_u32(id));
        id.filter(|&id| id != 0).ok_or(XsError::Protocol("a transaction without a number"))
    }

    /// Commits or aborts a transaction.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `EAGAIN` if something it depends on has changed.
    fn transaction_end(&mut self, tx_id: u32, commit: bool) -> Result<(), XsError> {
        let how: &[u8] = if commit { b"T\0" } else { b"F\0" };
        self.request(Op::TransactionEnd, tx_id, &[how]).map(drop)
    }

    /// Returns a domain's home path.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn domain_path(&mut self, domid: DomId) -> Result<String, XsError> {
        let response = self.request(Op::GetDomainPath, 0, &[domid.to_string().as_bytes(), NUL])?;
        let path = split_string(&response).map_or(&*response, |(path, _)| path);
        String::from_utf8(path.to_vec()).map_err(|_| XsError::Protocol("a path that is not text"))
    }
}

impl<X: Xenstore + ?Sized> Xenstore for &mut X {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        (**self).request(op, tx_id, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        (**self).poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        (**self).wait_event(timeout)
    }

    fn tx_id(&self) -> u32 {
        (**self).tx_id()
    }
}

/// Runs `work` in one transaction and commits it, or aborts it if `work` fails. On a conflict
/// everything is repeated, so `work` may run several times, at most [`TRANSACTION_RETRIES`].
///
/// Inside another transaction, `work` becomes part of that one.
///
/// # Errors
/// The error of `work`; [`XsError`] from starting or committing, [`XsError::Conflict`] if the
/// retries are used up.
pub fn transaction<X, R, E>(
    xs: &mut X,
    mut work: impl FnMut(&mut Tx<'_, X>) -> Result<R, E>,
) -> Result<R, E>
where
    X: Xenstore + ?Sized,
    E: From<XsError>,
{
    let outer = xs.tx_id();
    if outer != 0 {
        return work(&mut Tx { xs, tx_id: outer });
    }
    for _ in 0..TRANSACTION_RETRIES {
        let tx_id = xs.transaction_start()?;
        match work(&mut Tx { xs, tx_id }) {
            Ok(value) => match xs.transaction_end(tx_id, true) {
                Ok(()) => return Ok(value),
                Err(e) if e.errno() == Some(XsErrno::Again) => {}
                Err(e) => return Err(e.into()),
            },
            Err(e) => {
                // The first error is the one to report.
                let _ = xs.transaction_end(tx_id, false);
                return Err(e);
            }
        }
    }
    Err(XsError::Conflict.into())
}

/// An open transaction: a [`Xenstore`] whose operations belong to it. See [`transaction`].
#[derive(Debug)]
pub struct Tx<'a, X: Xenstore + ?Sized> {
    xs: &'a mut X,
    tx_id: u32,
}

impl<X: Xenstore + ?Sized> Xenstore for Tx<'_, X> {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        self.xs.request(op, tx_id, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.xs.poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.xs.wait_event(timeout)
    }

    fn tx_id(&self) -> u32 {
        self.tx_id
    }
}

/// Concatenates the parts of a request's payload.
///
/// # Errors
/// [`XsError::TooLong`] beyond [`PAYLOAD_MAX`] bytes.
pub fn concat_payload(parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
    let bytes = parts.concat();
    if bytes.len() > PAYLOAD_MAX { Err(XsError::TooLong) } else { Ok(bytes) }
}

/// Converts an `ERROR` response into an error of its request.
pub(crate) fn refusal(op: Op, parts: &[&[u8]], response: &[u8]) -> XsError {
    let name = split_string(response).map_or(response, |(name, _)| name);
    // An undefined error is still a rejection.
    XsError::refused(op, parts, XsErrno::from_name(name).unwrap_or(XsErrno::Inval))
}

const NUL: &[u8] = b"\0";

fn names(list: &[u8]) -> Vec<String> {
    strings(list).map(|n| String::from_utf8_lossy(n).into_owned()).collect()
}

/// Lists children that do not fit into one message, part by part.
fn directory_in_parts<X: Xenstore + ?Sized>(
    xs: &mut X,
    path: &str,
) -> Result<Vec<String>, XsError> {
    'again: for _ in 0..DIRECTORY_RETRIES {
        let mut generation: Option<Vec<u8>> = None;
        let mut list = Vec::new();
        for _ in 0..DIRECTORY_PARTS {
            let offset = list.len().to_string();
            let response = xs.request(
                Op::DirectoryPart,
                xs.tx_id(),
                &[path.as_bytes(), NUL, offset.as_bytes(), NUL],
            )?;
            let (now, part) =
                split_string(&response).ok_or(XsError::Protocol("a list without a generation"))?;
            if generation.as_deref().is_some_and(|then| then != now) {
                continue 'again;
            }
            generation = Some(now.to_vec());
            // The last part ends in an empty name.
            let last = part == NUL || part.ends_with(b"\0\0");
            let part =
                if last { part.get(..part.len().saturating_sub(1)).unwrap_or(&[]) } else { part };
            list.extend_from_slice(part);
            if last {
                return Ok(names(&list));
            }
            if part.is_empty() {
                return Err(XsError::Protocol("an empty part of a list"));
            }
        }
        return Err(XsError::Protocol("a list without an end"));
    }
    Err(XsError::Conflict)
}
