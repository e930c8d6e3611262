use pvio_grant_table::DomId;
use pvio_recordfile::DirError;
use pvio_xenbus::XsError;
use std::io;
use std::path::PathBuf;

/// Why the hypervisor could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another one is alive in that directory.
    #[error("a pvio hypervisor already runs in {0}; stop it or name another directory")]
    Running(PathBuf),
    /// Socket paths are at most 107 bytes long on Linux.
    #[error("{0} is too long a path for sockets to lie in; choose a shorter one")]
    PathTooLong(PathBuf),
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirError),
    /// A socket could not be made.
    #[error("{path}: {source}")]
    Io {
        /// What could not be made.
        path: PathBuf,
        /// Why.
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

/// Why a domain could not be created or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// The name is taken.
    #[error("a domain named {0:?} exists already")]
    NameInUse(String),
    /// The number is taken.
    #[error("domain {0} exists already")]
    IdInUse(DomId),
    /// The name is not 1 to 64 letters, digits, or any of `-_.`.
    #[error("{0:?} is not a domain name: 1 to 64 letters, digits, '-', '_' or '.'")]
    BadName(String),
    /// A size is out of range.
    #[error("{what} is {given}, not {least} to {most}")]
    OutOfRange {
        /// The field of [`DomainConfig`](crate::DomainConfig).
        what: &'static str,
        /// What it is.
        given: u32,
        /// The least it may be.
        least: u32,
        /// The most it may be.
        most: u32,
    },
    /// No number is left.
    #[error("every domain number is taken")]
    OutOfIds,
    /// There is no such domain.
    #[error("there is no domain {0}")]
    NoDomain(DomId),
    /// Its memory could not be made.
    #[error("no memory for the domain: {0}")]
    Memory(#[from] io::Error),
    /// Its home could not be made.
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

/// Why a process could not become a domain.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody listens there.
    #[error("no pvio hypervisor runs in {0}; start it first")]
    NoHypervisor(PathBuf),
    /// There is no such domain.
    #[error("the hypervisor has no domain {0}")]
    NoDomain(DomId),
    /// Another process is that domain.
    #[error("a process is domain {0} already")]
    Taken(DomId),
    /// The hypervisor runs under another user.
    #[error("the hypervisor there runs under another user")]
    OtherUser,
    /// The hypervisor went away, refused this process, or answered nonsense.
    #[error("the hypervisor hung up")]
    Lost,
    /// The socket or a mapping could not be made.
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

/// Why a domain got no connection to xenstore.
#[derive(Debug, thiserror::Error)]
pub enum XenstoreError {
    /// The hypervisor went away.
    #[error("the hypervisor hung up")]
    Lost,
    /// The hypervisor gives out no more connections.
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
