//! The reasons why a disk cannot be served. `remedy.rs` has what an operator can do about each.

use super::Format;
use super::escaped::EscapedPath;
use super::metadata::ContentError;
use crate::engine::nbd::NbdError;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::io;
use std::path::PathBuf;

/// The reason why an image cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The image does not exist.
    #[error("disk image {p0} does not exist", p0 = EscapedPath::new(.0))]
    Missing(PathBuf),
    /// The image cannot be opened for lack of permission.
    #[error("disk image {p0} cannot be opened{1}: permission denied", p0 = EscapedPath::new(.0))]
    Permission(PathBuf, &'static str),
    /// The path is a directory, a socket or the like.
    #[error("{p0} is neither a file nor a block device", p0 = EscapedPath::new(.0))]
    NotADisk(PathBuf),
    /// The size is not a positive multiple of the sector size.
    #[error(
        "disk image {path} has {size} bytes, which is not a positive multiple of {unit}",
        path = EscapedPath::new(.path)
    )]
    OddSize {
        /// Path of the image.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
        /// The size must be a multiple of this, in bytes.
        unit: u32,
    },
    /// The image is in use by another program.
    #[error("disk image {p0} is in use by another program", p0 = EscapedPath::new(.0))]
    Busy(PathBuf),
    /// I/O of an earlier process may be in flight.
    #[error("waiting for the I/O of an earlier process for {disk} failed")]
    Fence {
        /// Name of the disk.
        disk: String,
        /// The error of waiting for the fence.
        #[source]
        error: io::Error,
    },
    /// The file system does not support bypassing the page cache.
    #[error(
        "disk image {p0} cannot be opened with O_DIRECT: its file system does not support it",
        p0 = EscapedPath::new(.0)
    )]
    NoDirect(PathBuf),
    /// The disk's size is not a multiple of the sector size that `O_DIRECT` requires.
    #[error(
        "disk image {path} cannot be served with O_DIRECT: its {size} bytes are not a multiple of \
         its storage's sectors of {unit} bytes", path = EscapedPath::new(.path)
    )]
    DirectSize {
        /// Path of the image.
        path: PathBuf,
        /// The disk's size in bytes.
        size: u64,
        /// The size must be a multiple of this, in bytes.
        unit: u32,
    },
    /// The content of the image cannot be served.
    #[error(
        "disk image {path} cannot be opened as {word}", path = EscapedPath::new(.path), word = format.word()
    )]
    Content {
        /// Path of the image, or of the file below it.
        path: PathBuf,
        /// The expected format.
        format: Format,
        /// The problem.
        #[source]
        error: ContentError,
    },
    /// A backing file's name cannot be resolved.
    #[error("the backing file {below} of disk image {path} cannot be opened: {what}", path = EscapedPath::new(.path))]
    Chain {
        /// Path of the image whose header has the name.
        path: PathBuf,
        /// The name in the header.
        below: String,
        /// The reason.
        what: &'static str,
        /// What the operator can do next.
        remedy: &'static str,
    },
    /// The header of an image names a file that is not opened.
    #[error(
        "disk image {image} refers to {name}, which cannot be opened",
        image = EscapedPath::new(.image), name = EscapedPath::new(.name)
    )]
    Reference {
        /// Path of the image.
        image: PathBuf,
        /// The name in the header.
        name: PathBuf,
        /// The reason.
        #[source]
        problem: ReferenceProblem,
    },
    /// The snapshot does not exist.
    #[error("disk image {path} has no snapshot {name:?}", path = EscapedPath::new(.path))]
    NoSnapshot {
        /// Path of the image.
        path: PathBuf,
        /// Name of the requested snapshot.
        name: String,
        /// The existing snapshots, separated by commas.
        there: String,
    },
    /// The image has its data in another file, so its internal snapshots cannot be served.
    #[error(
        "disk image {p0} has its data in another file: its internal snapshots hold no data",
        p0 = EscapedPath::new(.0)
    )]
    SnapshotOfDataFile(PathBuf),
    /// This kind of image is not supported for writing.
    #[error("{0} cannot be opened for writing: not supported")]
    OnlyRead(String),
    /// An error of the network block device.
    #[error(transparent)]
    Nbd(#[from] NbdError),
    /// The sector size in the options is not possible for the disk.
    #[error(
        "the disk {disk} cannot have sectors of {sector_size} bytes: its {size} bytes are not a \
         multiple, or its storage has larger sectors ({least} bytes)"
    )]
    Sectors {
        /// Name of the disk.
        disk: String,
        /// The requested size in bytes.
        sector_size: u32,
        /// The sector size of the storage, in bytes.
        least: u32,
        /// The disk's size in bytes.
        size: u64,
    },
    /// The `io` option applies only to disks that are served through io_uring: files and block
    /// devices.
    #[error("the option io={0} is not supported for {1}: only for raw disks and fixed VHD images")]
    NoIoMode(&'static str, String),
    /// The kernel does not provide an io_uring with a submission thread.
    #[error("an io_uring with a submission thread (io=sqpoll) cannot be set up")]
    SqPoll(#[source] io::Error),
    /// I/O through the page cache cannot be polled.
    #[error("the disk {0} cannot be polled: it is served through the host's page cache")]
    PollBuffered(String),
    /// The kernel, the file system or the device does not support polling.
    #[error("the disk {disk} cannot be polled")]
    NoPoll {
        /// Name of the disk.
        disk: String,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// The trace cannot be created.
    #[error("the trace {path} cannot be created", path = EscapedPath::new(.path))]
    Trace {
        /// Path of the trace.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// There is not enough memory for a disk in memory.
    #[error("a disk of {0} bytes in memory cannot be created: not enough memory")]
    Memory(u64),
    /// The image, or a file below it, is not as it was when another process resolved it.
    #[error("disk image {path} has changed since it was resolved: {what}", path = EscapedPath::new(.path))]
    Changed {
        /// Path of the image.
        path: PathBuf,
        /// The difference.
        what: &'static str,
    },
    /// Any other error.
    #[error("disk image {path} cannot be used", path = EscapedPath::new(.path))]
    Other {
        /// Path of the image.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
}

impl ImageError {
    /// Returns a short stable code for logs and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Missing(_) => "image-missing",
            Self::Permission(..) => "image-permission",
            Self::NotADisk(_) => "image-not-a-disk",
            Self::OddSize { .. } => "image-odd-size",
            Self::Busy(_) => "image-busy",
            Self::Fence { .. } => "image-fence",
            Self::NoDirect(_) => "image-no-direct",
            Self::DirectSize { .. } => "image-direct-size",
            Self::Content { error, .. } => match error {
                ContentError::NotThis(_) => "image-other-format",
                ContentError::Corrupt(_) => "image-corrupt",
                ContentError::Truncated(_) => "image-truncated",
                ContentError::Encrypted(_) => "image-encrypted",
                ContentError::Parent | ContentError::Extent | ContentError::Unsupported(_) => {
                    "image-feature"
                }
                ContentError::Io(_) => "image-error",
            },
            Self::Chain { .. } => "image-chain",
            Self::Reference { problem, .. } => problem.code(),
            Self::NoSnapshot { .. } => "image-no-snapshot",
            Self::SnapshotOfDataFile(_) => "image-feature",
            Self::OnlyRead(_) => "image-only-read",
            Self::Sectors { .. } => "image-sectors",
            Self::NoIoMode(..) => "image-io-mode",
            Self::SqPoll(_) => "image-sqpoll",
            Self::PollBuffered(_) => "image-iopoll-buffered",
            Self::NoPoll { .. } => "image-iopoll",
            Self::Trace { .. } => "image-trace",
            Self::Nbd(error) => error.code(),
            Self::Memory(_) => "image-memory",
            Self::Changed { .. } => "image-changed",
            Self::Other { .. } => "image-error",
        }
    }
}

/// The reason why a file that an image header names is not opened.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceProblem {
    /// It is not below an image root.
    #[error("it is below no image root ({})", listed(.0))]
    Outside(Vec<PathBuf>),
    /// It is a symbolic link from below a root to a file elsewhere.
    #[error("a symbolic link leads out of its image root, to a file that is not a block device")]
    LinkOutside,
    /// An image root cannot be opened.
    #[error("the image root {p0} cannot be opened", p0 = EscapedPath::new(.0))]
    Root(PathBuf, #[source] io::Error),
    /// It does not exist.
    #[error("it does not exist")]
    Missing,
    /// It is a directory, a socket or the like.
    #[error("it is neither a file nor a block device")]
    NotADisk,
    /// It would be written, and its name does not derive from the image's name.
    #[error(
        "it would be written, and its name does not derive from the image's (as a-flat.vmdk and \
         a-s001.vmdk from a.vmdk)"
    )]
    NotDerived,
    /// It would be written through a symbolic link.
    #[error("it would be written, and is a symbolic link to a file")]
    WrittenLink,
    /// The kernel cannot confine a name to a directory.
    #[error(
        "this system cannot confine names to image roots (the system call openat2 of Linux 5.6 is \
         missing or filtered)"
    )]
    NoOpenat2,
    /// Any other error.
    #[error(transparent)]
    System(io::Error),
}

impl ReferenceProblem {
    const fn code(&self) -> &'static str {
        match self {
            Self::Outside(_) | Self::LinkOutside => "image-outside-root",
            Self::Root(..) => "image-root",
            Self::Missing => "image-missing",
            Self::NotADisk => "image-not-a-disk",
            Self::NotDerived | Self::WrittenLink => "image-extent-name",
            Self::NoOpenat2 => "image-no-openat2",
            Self::System(_) => "image-permission",
        }
    }
}

fn listed(roots: &[PathBuf]) -> String {
    let roots: Vec<String> = roots.iter().map(|root| EscapedPath::new(root).to_string()).collect();
    if roots.is_empty() { "there is none".into() } else { roots.join(", ") }
}
