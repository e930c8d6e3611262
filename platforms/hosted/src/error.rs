use pvio_grant_table::DomId;
use pvio_recordfile::DirError;
use pvio_ring::error::Remedy;
use pvio_xenbus::XsError;
use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

/// Reason why the hypervisor could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another hypervisor runs in that directory.
    #[error("a pvio hypervisor is running in {0} already")]
    Running(PathBuf),
    /// The path is too long: socket paths have at most 107 bytes on Linux.
    #[error("sockets cannot be created in {0}: the path is too long")]
    PathTooLong(PathBuf),
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirError),
    /// A socket could not be created.
    #[error("the socket {path} cannot be created")]
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
    #[error("invalid domain name {0:?}: expected 1 to 64 letters, digits, '-', '_' or '.'")]
    BadName(String),
    /// A size is out of range.
    #[error("{what} is {given}, expected {least} to {most}")]
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
    #[error("no domain id is free")]
    OutOfIds,
    /// There is no such domain.
    #[error("domain {0} does not exist")]
    NoDomain(DomId),
    /// Its memory could not be created.
    #[error("the domain's memory cannot be created")]
    Memory(#[from] io::Error),
    /// Its xenstore directory could not be created.
    #[error("the domain's directory in xenstore cannot be created")]
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
    #[error("no pvio hypervisor is running in {0}")]
    NoHypervisor(PathBuf),
    /// There is no such domain.
    #[error("the hypervisor has no domain {0}")]
    NoDomain(DomId),
    /// Another process has joined as that domain.
    #[error("domain {0} cannot be joined: another process has joined it")]
    Taken(DomId),
    /// The hypervisor runs under another user.
    #[error("the hypervisor cannot be joined: it runs under another user")]
    OtherUser,
    /// The hypervisor has closed the connection, rejected this process, or sent an invalid reply.
    #[error("the hypervisor closed the connection")]
    Lost,
    /// The socket or a mapping could not be created.
    #[error("the hypervisor cannot be joined")]
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

/// Reason why a device connection could not be created or used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The domain that the device belongs to does not exist.
    #[error("a device connection cannot be created: domain {0} does not exist")]
    NoFrontend(DomId),
    /// The list of ports is too long.
    #[error(
        "a device connection cannot be created: {given} ports were listed, at most {most} can be"
    )]
    Ports {
        /// Number of listed ports.
        given: usize,
        /// Largest number.
        most: usize,
    },
    /// This process has a device connection itself.
    #[error("a device process cannot create a device connection")]
    Denied,
    /// The hypervisor is out of descriptors, or the limit of device connections is reached.
    #[error("the hypervisor cannot create another device connection")]
    NoResources,
    /// The hypervisor has closed the connection, or sent an invalid reply.
    #[error("the hypervisor closed the connection")]
    Lost,
    /// The descriptors are not those of a device.
    #[error("a device has 1 descriptor, {0} were given")]
    Descriptors(usize),
}

impl DeviceError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoFrontend(_) => "device-no-frontend",
            Self::Ports { .. } => "device-ports",
            Self::Denied => "device-denied",
            Self::NoResources => "device-no-resources",
            Self::Lost => "device-lost",
            Self::Descriptors(_) => "device-descriptors",
        }
    }
}

/// Reason why a domain could not connect to xenstore.
#[derive(Debug, thiserror::Error)]
pub enum XenstoreError {
    /// The hypervisor has closed the connection.
    #[error("the hypervisor closed the connection")]
    Lost,
    /// The limit of connections is reached.
    #[error("xenstore cannot be connected: the limit of connections is reached")]
    TooMany,
    /// A device process has no xenstore.
    #[error("the connection of a device has no xenstore")]
    Denied,
    /// The stream could not be used.
    #[error("xenstore cannot be connected")]
    Io(#[from] io::Error),
}

impl XenstoreError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Lost => "xenstore-lost",
            Self::TooMany => "xenstore-too-many",
            Self::Denied => "xenstore-denied",
            Self::Io(_) => "xenstore-io",
        }
    }
}

impl Remedy for StartError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Running(_) => Some("stop it, or name another directory".into()),
            Self::PathTooLong(_) => Some("choose a shorter path".into()),
            Self::Directory(error) => error.remedy(),
            Self::Io { .. } => None,
        }
    }
}

impl Remedy for DomainError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::NameInUse(_) | Self::IdInUse(_) => {
                Some("choose another name or domain id".into())
            }
            Self::OutOfIds => Some("destroy a domain first".into()),
            Self::Xenstore(error) => error.remedy(),
            // The text names the valid values.
            Self::BadName(_) | Self::OutOfRange { .. } => None,
            Self::NoDomain(_) | Self::Memory(_) => None,
        }
    }
}

impl Remedy for JoinError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::NoHypervisor(_) => Some("start the hypervisor first".into()),
            Self::OtherUser => Some("run as the user that started the hypervisor".into()),
            Self::Taken(_) => Some("stop that process, or join another domain".into()),
            Self::NoDomain(_) | Self::Lost | Self::Io(_) => None,
        }
    }
}

impl Remedy for XenstoreError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::TooMany => Some("close a connection first".into()),
            Self::Lost | Self::Denied | Self::Io(_) => None,
        }
    }
}

impl Remedy for DeviceError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::NoResources => Some("raise the limit of open files of the hypervisor".into()),
            Self::NoFrontend(_) | Self::Ports { .. } | Self::Denied => None,
            Self::Lost | Self::Descriptors(_) => None,
        }
    }
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let (path, name) = (|| PathBuf::from("/a"), || String::from("x"));
        let (id, error) = (DomId(1), || io::Error::other("x"));
        let none = without_remedy(&[
            &StartError::Running(path()),
            &StartError::PathTooLong(path()),
            &StartError::Directory(DirError::OtherOwner { path: path(), owner: 1 }),
            &StartError::Io { path: path(), source: error() },
            &DomainError::NameInUse(name()),
            &DomainError::IdInUse(id),
            &DomainError::BadName(name()),
            &DomainError::OutOfRange { what: "x", given: 3, least: 1, most: 2 },
            &DomainError::OutOfIds,
            &DomainError::NoDomain(id),
            &DomainError::Memory(error()),
            &DomainError::Xenstore(XsError::Closed),
            &JoinError::NoHypervisor(path()),
            &JoinError::NoDomain(id),
            &JoinError::Taken(id),
            &JoinError::OtherUser,
            &JoinError::Lost,
            &JoinError::Io(error()),
            &XenstoreError::Lost,
            &XenstoreError::TooMany,
            &XenstoreError::Denied,
            &XenstoreError::Io(error()),
            &DeviceError::NoFrontend(id),
            &DeviceError::Ports { given: 2, most: 1 },
            &DeviceError::Denied,
            &DeviceError::NoResources,
            &DeviceError::Lost,
            &DeviceError::Descriptors(2),
        ]);
        let expected = [
            "Io",
            "BadName",
            "OutOfRange",
            "NoDomain",
            "Memory",
            "NoDomain",
            "Lost",
            "Io",
            "Lost",
            "Denied",
            "Io",
            "NoFrontend",
            "Ports",
            "Denied",
            "Lost",
            "Descriptors",
        ];
        assert_eq!(none, expected);
    }
}
