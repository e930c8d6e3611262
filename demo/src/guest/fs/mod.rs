//! A read-only view of the file system an image holds: ext2/3/4 or FAT.
//!
//! The image is hostile. Whatever it says, an answer comes or an [`FsError`]: sizes are checked
//! against the disk before a library sees them, each request may read only so much ([`cache`]),
//! symlinks are followed here with a bound, and a panic in a library costs the one request.
//!
//! | module | holds |
//! |---|---|
//! | [`block`] | [`BlockRead`], what is below: a disk |
//! | [`cache`] | chunks of the disk in memory, with read-ahead and a budget for each request |
//! | [`probe`] | which file system it is, and whether it fits the disk |
//! | [`ext`], [`fat`] | the two families |
//! | [`thread`] | the disk thread: requests in, answers out |
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

/// Entries of one directory that are listed; the rest are counted only.
pub const MAX_ENTRIES: usize = 4096;
/// Files open at once.
pub const MAX_OPEN: usize = 64;
/// Bytes of one path, before and after following symlinks.
pub const MAX_PATH: usize = 4096;
/// Symlinks followed for one path.
const MAX_LINKS: usize = 40;

/// Why something on the disk could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// There is nothing of that name.
    #[error("no such file or directory on the disk")]
    NotFound,
    /// A device node, socket or pipe.
    #[error("neither a regular file nor a directory")]
    Special,
    /// The path is longer than [`MAX_PATH`], or its symlinks are too many.
    #[error("the path is too long, or goes through too many symbolic links")]
    TooFar,
    /// The file system contradicts itself, or reading it panicked.
    #[error("the file system is damaged: {0}")]
    Corrupt(String),
    /// The file system uses something that cannot be read here.
    #[error("the file system cannot be read: {0}")]
    Unsupported(String),
    /// The disk is smaller than its file system says.
    #[error("the image is cut short: its file system is {needed} bytes long, the disk {size}")]
    Truncated {
        /// Bytes the file system says it has.
        needed: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// The disk holds no file system known here.
    #[error("{0}")]
    Unrecognised(String),
    /// The disk could not be read.
    #[error("the disk could not be read: {0}")]
    Io(String),
    /// The handle's file was closed, or went with a damaged file system.
    #[error("the file is not open any more")]
    Stale,
    /// [`MAX_OPEN`] files are open.
    #[error("too many files are open at once")]
    TooManyOpen,
    /// The disk thread is gone.
    #[error("the disk thread has ended")]
    Gone,
}

impl FsError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotFound => "fs-not-found",
            Self::Special => "fs-special-file",
            Self::TooFar => "fs-too-far",
            Self::Corrupt(_) => "fs-corrupt",
            Self::Unsupported(_) => "fs-unsupported",
            Self::Truncated { .. } => "fs-truncated",
            Self::Unrecognised(_) => "fs-unrecognised",
            Self::Io(_) => "fs-io",
            Self::Stale => "fs-stale",
            Self::TooManyOpen => "fs-too-many-open",
            Self::Gone => "fs-gone",
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
            // What the cache says when a request read more than any sound file system needs.
            io::ErrorKind::QuotaExceeded => Self::Corrupt(e.to_string()),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
                Self::Corrupt(e.to_string())
            }
            _ => Self::Io(e.to_string()),
        }
    }
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symlink; where it leads is found out when it is visited.
    Link,
    /// A device node, socket or pipe.
    Special,
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Bytes.
    pub len: u64,
    /// Seconds since 1970, UTC, of the last change; FAT's local time is taken as UTC.
    pub modified: Option<i64>,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name: any bytes but `/` and NUL on ext, UTF-8 on FAT.
    pub name: Vec<u8>,
    /// What it stands for.
    pub kind: Kind,
    /// Its size and time.
    pub meta: Meta,
}

/// An open file; the number is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub u64);

/// What a path led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file, opened.
    File {
        /// To read it by.
        handle: Handle,
        /// Its size and time.
        meta: Meta,
        /// It is the `index.html` of the directory that was asked for.
        is_index: bool,
    },
    /// A directory.
    Dir {
        /// Sorted by name, directories first; at most [`MAX_ENTRIES`].
        entries: Vec<Entry>,
        /// How many entries were left out.
        left_out: usize,
    },
}

/// What kind of file system is mounted.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FsInfo {
    /// `ext4`, `ext2`, `FAT12`, `FAT16`, `FAT32`.
    pub kind: &'static str,
    /// The volume's label, as text.
    pub label: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Tells one volume from another.
    pub id: String,
}

/// A mounted file system; lives on the disk thread.
trait Mounted {
    fn info(&self) -> FsInfo;
    /// Opens a file, or lists a directory; with `index`, a directory's `index.html` instead.
    fn visit(&mut self, path: &[u8], index: bool, handle: Handle) -> Result<Target, FsError>;
    /// Fills `buf` from `offset` on, as far as the file goes; returns the bytes read.
    fn read(&mut self, handle: Handle, offset: u64, buf: &mut [u8]) -> Result<usize, FsError>;
    fn close(&mut self, handle: Handle);
}

fn sort_entries(entries: &mut [Entry]) {
    entries.sort_by(|a, b| (a.kind != Kind::Dir, &a.name).cmp(&(b.kind != Kind::Dir, &b.name)));
}

/// The names of a path, with `.` and empty names left out and `..` resolved by name.
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
