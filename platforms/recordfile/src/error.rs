use std::io;
use std::path::PathBuf;

/// Why a directory is not one to keep sockets and files of this user in.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// It belongs to another user, who may change everything in it.
    #[error("{path} belongs to user {owner}; name a directory of your own")]
    OtherOwner {
        /// The directory.
        path: PathBuf,
        /// The user's number.
        owner: u32,
    },
    /// Others than its owner may write in it.
    #[error("others may write in {path} (mode {mode:o}); chmod go-w it, or name another directory")]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Others than its owner may look into it, or reach what is in it.
    #[error("others may use {path} (mode {mode:o}); chmod go-rwx it, or name another directory")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A symbolic link leads to it, which another user may have made.
    #[error("{path} is reached through the symbolic link {link}; name the directory itself")]
    Link {
        /// The directory.
        path: PathBuf,
        /// The link.
        link: PathBuf,
    },
    /// It could not be opened or made.
    #[error("{path}: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
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
