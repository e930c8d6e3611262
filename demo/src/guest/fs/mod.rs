//! Read-only access to the file system of an image: ext2/3/4 or FAT.
//!
//! The image is untrusted. Every operation ends with a result or an [`FsError`]: sizes are checked
//! against the disk before a library uses them, each request has a budget of bytes that it may read
//! ([`cache`]), the number of symlinks per path is limited, and a panic in a library fails only one
//! request.
//!
//! | module | contents |
//! |---|---|
//! | [`block`] | [`BlockRead`], the interface to a disk |
//! | [`cache`] | chunks of the disk in memory, with read-ahead and a budget for each request |
//! | [`probe`] | detection of the file system, and whether it fits the disk |
//! | [`ext`], [`fat`] | the two families |
//! | [`thread`] | the disk thread, which processes requests |
//!
//! ```
//! use pvio_demo::guest::fs::{Disk, MemDisk, Target, thread::FsThread};
//!
//! let image = pvio_demo::image::image_bytes(8 << 20)?;
//! let (fs, answers) = FsThread::start(Disk::new(MemDisk::new(image)), Box::new(|| ()))?;
//! fs.visit(1, b"/hello.txt".to_vec(), false)?;
//! let answer = answers.recv()?;
//! assert!(matches!(answer.visited()?, Target::File { .. }));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod block;
pub mod cache;
pub mod ext;
pub mod fat;
pub mod probe;
pub mod thread;

pub use block::{BlockRead, Disk, FileDisk, MemDisk};

use std::io;

/// Maximum number of listed entries of a directory; further entries are only counted.
pub const MAX_ENTRIES: usize = 4096;
/// Maximum number of open files.
pub const MAX_OPEN: usize = 64;
/// Maximum length of a path in bytes, before and after symlinks are followed.
pub const MAX_PATH: usize = 4096;
/// Maximum number of symlinks in a path.
const MAX_LINKS: usize = 40;

/// An error while accessing a file or the file system.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// The path does not exist.
    #[error("no such file or directory on the disk")]
    NotFound,
    /// A device node, socket or pipe.
    #[error("neither a regular file nor a directory")]
    Special,
    /// The path is longer than [`MAX_PATH`], or has too many symlinks.
    #[error("the path is too long, or goes through too many symbolic links")]
    TooFar,
    /// The file system is inconsistent, or reading it panicked.
    #[error("the file system is damaged: {0}")]
    Corrupt(String),
    /// The file system has a feature that is not supported.
    #[error("the file system cannot be read: {0}")]
    Unsupported(String),
    /// The disk is smaller than its file system.
    #[error("the image is cut short: its file system has {needed} bytes, and the disk {size}")]
    Truncated {
        /// Size of the file system in bytes.
        needed: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The disk contains no supported file system.
    #[error("no supported file system was found: {found}")]
    Unrecognised {
        /// The contents.
        found: String,
        /// What to do next.
        remedy: &'static str,
    },
    /// The file system's journal was not replayed.
    #[error(
        "the file system cannot be read: its journal has changes that are not applied (the disk is in \
         use, or was not unmounted)"
    )]
    Journal,
    /// The disk could not be read.
    #[error("the disk cannot be read: {0}")]
    Io(String),
    /// The file was closed, or its file system was mounted again after a panic.
    #[error("the file is not open any more")]
    Stale,
    /// [`MAX_OPEN`] files are open.
    #[error("too many files are open")]
    TooManyOpen,
    /// The disk thread has ended.
    #[error("the disk thread has ended")]
    Gone,
}

impl FsError {
    /// Returns a short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotFound => "fs-not-found",
            Self::Special => "fs-special-file",
            Self::TooFar => "fs-too-far",
            Self::Corrupt(_) => "fs-corrupt",
            Self::Unsupported(_) | Self::Journal => "fs-unsupported",
            Self::Truncated { .. } => "fs-truncated",
            Self::Unrecognised { .. } => "fs-unrecognised",
            Self::Io(_) => "fs-io",
            Self::Stale => "fs-stale",
            Self::TooManyOpen => "fs-too-many-open",
            Self::Gone => "fs-gone",
        }
    }
}

impl FsError {
    /// Returns what the operator can do next, if anything.
    #[must_use]
    pub const fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Corrupt(_) => Some("check a copy of the image with fsck, or restore a backup"),
            Self::Journal => Some("let the guest unmount it, or run e2fsck -p IMAGE"),
            Self::Truncated { .. } => Some("copy the image again, whole"),
            Self::Unrecognised { remedy, .. } => Some(remedy),
            // What a client requested, or a state that passes.
            Self::NotFound | Self::Special | Self::TooFar | Self::Stale | Self::TooManyOpen => None,
            Self::Unsupported(_) | Self::Io(_) | Self::Gone => None,
        }
    }

    /// Returns the error with its remedy on one line, as `error; remedy`.
    #[must_use]
    pub fn line(&self) -> String {
        match self.remedy() {
            Some(remedy) => format!("{self}; {remedy}"),
            None => self.to_string(),
        }
    }
}

impl From<io::Error> for FsError {
    fn from(e: io::Error) -> Self {
        if e.get_ref().is_some_and(|e| e.is::<cache::DiskFailed>()) {
            return Self::Io(e.to_string());
        }
        match e.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            // The cache's error when a request has read more than any valid file system requires.
            io::ErrorKind::QuotaExceeded => Self::Corrupt(e.to_string()),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
                Self::Corrupt(e.to_string())
            }
            _ => Self::Io(e.to_string()),
        }
    }
}

/// The type of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symlink; the target is resolved when it is visited.
    Link,
    /// A device node, socket or pipe.
    Special,
}

/// Size and modification time of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Size in bytes.
    pub len: u64,
    /// Modification time in seconds since 1970, UTC; FAT's local time is interpreted as UTC.
    pub modified: Option<i64>,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name: on ext any bytes except `/` and NUL, on FAT UTF-8.
    pub name: Vec<u8>,
    /// Its type.
    pub kind: Kind,
    /// Its size and modification time.
    pub meta: Meta,
}

/// An open file; numbers are not reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub u64);

/// The result of visiting a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file, opened.
    File {
        /// Handle for reads.
        handle: Handle,
        /// Its size and modification time.
        meta: Meta,
        /// It is the `index.html` of the requested directory.
        is_index: bool,
    },
    /// A directory.
    Dir {
        /// Sorted by name, directories first; at most [`MAX_ENTRIES`].
        entries: Vec<Entry>,
        /// Number of further entries.
        left_out: usize,
    },
}

/// The mounted file system.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FsInfo {
    /// `ext4`, `ext2`, `FAT12`, `FAT16`, `FAT32`.
    pub kind: &'static str,
    /// The volume's label, as text.
    pub label: String,
    /// Bytes of the disk.
    pub size: u64,
    /// An identifier of the volume.
    pub id: String,
}

/// A mounted file system, used only by the disk thread.
trait Mounted {
    fn info(&self) -> FsInfo;
    /// Opens a file or lists a directory; with `index`, opens a directory's `index.html` instead if
    /// it has one.
    fn visit(&mut self, path: &[u8], index: bool, handle: Handle) -> Result<Target, FsError>;
    /// Fills `buf` from `offset` on, at most to the end of the file; returns the number of bytes
    /// read.
    fn read(&mut self, handle: Handle, offset: u64, buf: &mut [u8]) -> Result<usize, FsError>;
    fn close(&mut self, handle: Handle);
}

fn sort_entries(entries: &mut [Entry]) {
    entries.sort_by(|a, b| (a.kind != Kind::Dir, &a.name).cmp(&(b.kind != Kind::Dir, &b.name)));
}

/// Returns the components of a path, with `.` and empty ones removed and `..` resolved lexically.
fn components(path: &[u8]) -> Vec<&[u8]> {
    let mut names = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    names
}

#[cfg(test)]
mod remedy_tests {
    use super::*;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let text = || String::from("x");
        let all = [
            FsError::NotFound,
            FsError::Special,
            FsError::TooFar,
            FsError::Corrupt(text()),
            FsError::Unsupported(text()),
            FsError::Journal,
            FsError::Truncated { needed: 2, size: 1 },
            FsError::Unrecognised { found: text(), remedy: "y" },
            FsError::Io(text()),
            FsError::Stale,
            FsError::TooManyOpen,
            FsError::Gone,
        ];
        assert!(all.iter().all(|error| !error.to_string().contains("; ")));
        let none: Vec<&str> =
            all.iter().filter(|error| error.remedy().is_none()).map(FsError::code).collect();
        let expected = [
            "fs-not-found",
            "fs-special-file",
            "fs-too-far",
            "fs-unsupported",
            "fs-io",
            "fs-stale",
            "fs-too-many-open",
            "fs-gone",
        ];
        assert_eq!(none, expected);
    }
}
