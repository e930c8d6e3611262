use pvio_ring::error::Remedy;
use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

/// Reason why a directory is not suitable for private sockets and files of this user.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// It belongs to another user, who can change its contents.
    #[error("{path} belongs to user {owner}")]
    OtherOwner {
        /// The directory.
        path: PathBuf,
        /// User id of the owner.
        owner: u32,
    },
    /// Other users can write in it.
    #[error("others may write in {path} (mode {mode:o})")]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Other users can read it or access its contents.
    #[error("others may use {path} (mode {mode:o})")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Its path contains a symbolic link that another user may have created.
    #[error("{path} contains the symbolic link {link}")]
    Link {
        /// The directory.
        path: PathBuf,
        /// The link.
        link: PathBuf,
    },
    /// It could not be opened or created.
    #[error("{path} cannot be opened or created")]
    Io {
        /// The directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

impl Remedy for DirError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        let remedy = match self {
            Self::OtherOwner { .. } => "name a directory of your own",
            Self::Writable { .. } => {
                "remove the permission with chmod go-w, or name another directory"
            }
            Self::Open { .. } => "chmod go-rwx it, or name another directory",
            Self::Link { .. } => "name the path without the symbolic link",
            Self::Io { .. } => return None,
        };
        Some(remedy.into())
    }
}

impl DirError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::OtherOwner { .. } => "dir-other-owner",
            Self::Writable { .. } => "dir-writable",
            Self::Open { .. } => "dir-open",
            Self::Link { .. } => "dir-link",
            Self::Io { .. } => "dir-io",
        }
    }
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use crate::RecordError;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let path = || PathBuf::from("/a");
        let source = || io::Error::other("x");
        let none = without_remedy(&[
            &DirError::OtherOwner { path: path(), owner: 1 },
            &DirError::Writable { path: path(), mode: 0o777 },
            &DirError::Open { path: path(), mode: 0o777 },
            &DirError::Link { path: path(), link: path() },
            &DirError::Io { path: path(), source: source() },
            &RecordError::Missing { device: "d".into(), source: source() },
            &RecordError::NotStored,
            &RecordError::Io { device: "d".into(), source: source() },
        ]);
        assert_eq!(none, ["Io", "Missing", "NotStored"]);
    }
}
