use pvio_grant_table::DomId;
use pvio_recordfile::DirError;
use pvio_xenbus::XsError;
use std::io;
use std::path::PathBuf;

/// Reason why the hypervisor could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another hypervisor runs in that directory.
    #[error("a pvio hypervisor already runs in {0}; stop it or name another directory")]
    Running(PathBuf),
    /// The path is too long: socket paths have at most 107 bytes on Linux.
    #[error("{0} is too long a path for sockets to lie in; choose a shorter one")]
    PathTooLong(PathBuf),
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirError),
    /// A socket could not be created.
    #[error("{path}: {source}")]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

impl StartError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Running(_) => "hosted-running",
            Self::PathTooLong(_) => "hosted-path-too-long",
            Self::Directory(why) => why.code(),
            Self::Io { .. } => "hosted-start-io",
        }
    }
}

/// Reason why a domain could not be created or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// The name is in use.
    #[error("a domain named {0:?} exists already")]
    NameInUse(String),
    /// The domain id is in use.
    #[error("domain {0} exists already")]
    IdInUse(DomId),
    /// The name is not 1 to 64 letters, digits, or any of `-_.`.
    #[error("{0:?} is not a domain name: 1 to 64 letters, digits, '-', '_' or '.'")]
    BadName(String),
    /// A size is out of range.
    #[error("{what} is {given}, not {least} to {most}")]
    OutOfRange {
        /// Field of [`DomainConfig`](crate::DomainConfig).
        what: &'static str,
        /// Given value.
        given: u32,
        /// Smallest valid value.
        least: u32,
        /// Largest valid value.
        most: u32,
    },
    /// No domain id is free.
    #[error("every domain number is taken")]
    OutOfIds,
    /// There is no such domain.
    #[error("there is no domain {0}")]
    NoDomain(DomId),
    /// Its memory could not be created.
    #[error("no memory for the domain: {0}")]
    Memory(#[from] io::Error),
    /// Its xenstore directory could not be created.
    #[error("making the domain's home in xenstore: {0}")]
    Xenstore(#[source] XsError),
}

impl DomainError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NameInUse(_) => "domain-name-in-use",
            Self::IdInUse(_) => "domain-id-in-use",
            Self::BadName(_) => "domain-bad-name",
            Self::OutOfRange { .. } => "domain-out-of-range",
            Self::OutOfIds => "domain-out-of-ids",
            Self::NoDomain(_) => "domain-unknown",
            Self::Memory(_) => "domain-no-memory",
            Self::Xenstore(_) => "domain-xenstore",
        }
    }
}

/// Reason why a process could not join as a domain.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No hypervisor runs there.
    #[error("no pvio hypervisor runs in {0}; start it first")]
    NoHypervisor(PathBuf),
    /// There is no such domain.
    #[error("the hypervisor has no domain {0}")]
    NoDomain(DomId),
    /// Another process has joined as that domain.
    #[error("a process is domain {0} already")]
    Taken(DomId),
    /// The hypervisor runs under another user.
    #[error("the hypervisor there runs under another user")]
    OtherUser,
    /// The hypervisor has closed the connection, rejected this process, or sent an invalid reply.
    #[error("the hypervisor hung up")]
    Lost,
    /// The socket or a mapping could not be created.
    #[error("joining the hypervisor: {0}")]
    Io(#[from] io::Error),
}

impl JoinError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoHypervisor(_) => "join-no-hypervisor",
            Self::NoDomain(_) => "join-no-domain",
            Self::Taken(_) => "join-taken",
            Self::OtherUser => "join-other-user",
            Self::Lost => "join-lost",
            Self::Io(_) => "join-io",
        }
    }
}

/// Reason why a domain could not connect to xenstore.
#[derive(Debug, thiserror::Error)]
pub enum XenstoreError {
    /// The hypervisor has closed the connection.
    #[error("the hypervisor hung up")]
    Lost,
    /// The limit of connections is reached.
    #[error("the hypervisor has no more connections to xenstore to give; close one")]
    TooMany,
    /// The stream could not be used.
    #[error("connecting to xenstore: {0}")]
    Io(#[from] io::Error),
}

impl XenstoreError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Lost => "xenstore-lost",
            Self::TooMany => "xenstore-too-many",
            Self::Io(_) => "xenstore-io",
        }
    }
}
