//! What a device needs of xenstore: one trait, whoever serves it.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use pvio_ring::DomId;

use crate::wire::{Op, PAYLOAD_MAX, Perm, XsErrno, split_string, strings};

/// How often [`transaction`] starts over before it gives up.
pub const TRANSACTION_RETRIES: usize = 64;

/// How many parts of one list of children [`Xenstore::directory`] puts together at most (of
/// nearly 4 KiB each), and how often it starts over when the list changes meanwhile.
const DIRECTORY_PARTS: usize = 256;
const DIRECTORY_RETRIES: usize = 16;

/// Something changed at or below a watched path, or the watch was just registered. Events may be
/// merged and may come without cause: look at the store to know.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WatchEvent {
    /// What changed, relative if the watch was; or the watched path itself.
    pub path: String,
    /// The token the watch was registered with.
    pub token: String,
}

/// Why an operation failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum XsError {
    /// The server refused.
    #[error("{op:?} of `{path}` was refused: {errno}")]
    Refused {
        /// What was asked for.
        op: Op,
        /// What it was asked of: the payload's first string, for the operator to read.
        path: Box<str>,
        /// The server's reason.
        errno: XsErrno,
    },
    /// The connection ended.
    #[error("the connection to xenstore is closed")]
    Closed,
    /// The connection failed; the system's words for it.
    #[error("the connection to xenstore failed: {0}")]
    Transport(Box<str>),
    /// The server sent what the protocol does not allow; the connection cannot go on.
    #[error("xenstore broke the protocol: {0}")]
    Protocol(&'static str),
    /// The request does not fit into one message of 4096 bytes.
    #[error("the request is longer than 4096 bytes")]
    TooLong,
    /// A transaction met conflicts too often in a row ([`TRANSACTION_RETRIES`]).
    #[error("a transaction met too many conflicts")]
    Conflict,
}

impl XsError {
    /// Returns the refusal of a request whose payload has these parts.
    #[must_use]
    pub fn refused(op: Op, parts: &[&[u8]], errno: XsErrno) -> Self {
        let path = parts.first().map_or("", |p| core::str::from_utf8(p).unwrap_or(""));
        Self::Refused { op, path: path.into(), errno }
    }

    /// The server's reason, if it was the server that refused.
    #[must_use]
    pub const fn errno(&self) -> Option<XsErrno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the connection is of no more use. What else goes wrong (a transaction that a peer
    /// interferes with at every attempt, a value that is too long) concerns one request.
    #[must_use]
    pub const fn is_connection_lost(&self) -> bool {
        matches!(self, Self::Closed | Self::Transport(_) | Self::Protocol(_))
    }

    /// Whether this says that a node is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(XsErrno::NoEnt)
    }

    /// Whether this says that a node is not there, or may not be seen. Of a peer's node that is
    /// gone together with its directory xenstored tells only the latter: what is left above it is
    /// not for us to read.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self.errno(), Some(XsErrno::NoEnt | XsErrno::Acces))
    }
}

/// A connection to xenstore.
///
/// Only [`request`](Self::request) and the two ways to take events have to be given; the rest is
/// made of them. Paths are absolute, or relative to the connection's domain. Inside
/// [`transaction`], the same operations are part of the transaction.
pub trait Xenstore {
    /// Sends one request of the given transaction (0: none), its payload the concatenation of
    /// `parts`, and waits for the answer's payload.
    ///
    /// # Errors
    /// [`XsError::Refused`] if the server says no; the others if there is no answer.
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError>;

    /// Takes an event if one is there; never waits.
    ///
    /// # Errors
    /// If the connection ended, once no event is left.
    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError>;

    /// Waits for an event: for ever with `None`, else until the time is over. A connection on
    /// which nothing can happen while the caller waits (a store in the same thread) returns
    /// at once.
    ///
    /// # Errors
    /// If the connection ended, once no event is left.
    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError>;

    /// The transaction that operations belong to: 0, but for the `tx` inside [`transaction`].
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

    /// Reads a node of a peer's, which may be gone together with all that we may see of it.
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

    /// Makes sure that a node is there.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn mkdir(&mut self, path: &str) -> Result<(), XsError> {
        self.request(Op::Mkdir, self.tx_id(), &[path.as_bytes(), NUL]).map(drop)
    }

    /// Removes a node and all below it; that there is none is fine.
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

    /// Replaces a node's permissions; only its owner and dom0 may, and only dom0 may change the
    /// owner.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn set_perms(&mut self, path: &str, perms: &[Perm]) -> Result<(), XsError> {
        let list: String = perms.iter().map(|p| format!("{p}\0")).collect();
        self.request(Op::SetPerms, self.tx_id(), &[path.as_bytes(), NUL, list.as_bytes()]).map(drop)
    }

    /// Watches a path and all below it; the first event comes at once. The same path may be
    /// watched again under another token.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `EEXIST` if that watch is there.
    fn watch(&mut self, path: &str, token: &str) -> Result<(), XsError> {
        self.request(Op::Watch, 0, &[path.as_bytes(), NUL, token.as_bytes(), NUL]).map(drop)
    }

    /// Ends a watch. Events that are under way may still come.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `ENOENT` if there is no such watch.
    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), XsError> {
        self.request(Op::Unwatch, 0, &[path.as_bytes(), NUL, token.as_bytes(), NUL]).map(drop)
    }

    /// Opens a transaction and returns its number. [`transaction`] is the better way.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn transaction_start(&mut self) -> Result<u32, XsError> {
        let answer = self.request(Op::TransactionStart, 0, &[NUL])?;
        let id = split_string(&answer).and_then(|(id, _)| crate::wire::parse_u32(id));
        id.filter(|&id| id != 0).ok_or(XsError::Protocol("a transaction without a number"))
    }

    /// Commits or drops a transaction.
    ///
    /// # Errors
    /// As [`Xenstore::request`]; `EAGAIN` if something it depends on has changed.
    fn transaction_end(&mut self, tx_id: u32, commit: bool) -> Result<(), XsError> {
        let how: &[u8] = if commit { b"T\0" } else { b"F\0" };
        self.request(Op::TransactionEnd, tx_id, &[how]).map(drop)
    }

    /// Asks the server for a domain's home path.
    ///
    /// # Errors
    /// As [`Xenstore::request`].
    fn domain_path(&mut self, domid: DomId) -> Result<String, XsError> {
        let answer = self.request(Op::GetDomainPath, 0, &[domid.to_string().as_bytes(), NUL])?;
        let path = split_string(&answer).map_or(&*answer, |(path, _)| path);
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

/// Runs `work` in one transaction and commits it, or drops it if `work` fails. On a conflict it
/// all starts over, so `work` may run several times, at most [`TRANSACTION_RETRIES`].
///
/// Inside another transaction, `work` simply becomes part of that one.
///
/// # Errors
/// What `work` returned; [`XsError`] from starting or committing, [`XsError::Conflict`] when the
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
                // What went wrong first is what the caller should hear of.
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

/// Turns an `ERROR` answer into an error of the request it answers.
#[cfg(feature = "std")]
pub(crate) fn refusal(op: Op, parts: &[&[u8]], answer: &[u8]) -> XsError {
    let name = split_string(answer).map_or(answer, |(name, _)| name);
    // An error unknown to the protocol is still a refusal.
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
            let answer = xs.request(
                Op::DirectoryPart,
                xs.tx_id(),
                &[path.as_bytes(), NUL, offset.as_bytes(), NUL],
            )?;
            let (now, part) =
                split_string(&answer).ok_or(XsError::Protocol("a list without a generation"))?;
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
