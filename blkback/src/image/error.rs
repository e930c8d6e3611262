//! Why a disk cannot be served, in words for whoever has to mend it.

use super::Format;
use super::content::ContentError;
use crate::engine::nbd::NbdError;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::io;
use std::path::PathBuf;

/// Why an image cannot be served. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is none.
    #[error(
        "disk image {0} does not exist; check the path, and that the file system it is on is mounted"
    )]
    Missing(PathBuf),
    /// It may not be opened.
    #[error("disk image {0} may not be opened{1}; check its owner and mode with ls -l")]
    Permission(PathBuf, &'static str),
    /// It is a directory, a socket …
    #[error("{0} is neither a file nor a block device; name a disk image")]
    NotADisk(PathBuf),
    /// Its size is no number of sectors.
    #[error(
        "the disk in {path} has {size} bytes, which is not a positive multiple of {unit}; see \
         whether it was copied whole, and if so copy it to a larger one"
    )]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What the size must be a multiple of.
        unit: u32,
    },
    /// Somebody else uses it.
    #[error(
        "disk image {0} is in use by another program; stop that first, \
         or open it read-only in both"
    )]
    Busy(PathBuf),
    /// The file system cannot bypass its cache.
    #[error("disk image {0} cannot be opened with O_DIRECT on this file system; leave that out")]
    NoDirect(PathBuf),
    /// What is in it cannot be served.
    #[error("disk image {path} {}", explain(.format, .error))]
    Content {
        /// The image, or the file it rests on.
        path: PathBuf,
        /// What it was to be.
        format: Format,
        /// What is wrong.
        error: ContentError,
    },
    /// A file that an image rests on is named in a way that cannot be followed.
    #[error("disk image {path} rests on {below}, {what}")]
    Chain {
        /// The image that names it.
        path: PathBuf,
        /// As it is named.
        below: String,
        /// Why not, and what to do.
        what: &'static str,
    },
    /// The header of an image names a file that is not opened.
    #[error("disk image {image} names {name}, {problem}")]
    Reference {
        /// The image.
        image: PathBuf,
        /// As its header has it.
        name: PathBuf,
        /// Why not, and what to do.
        problem: ReferenceProblem,
    },
    /// There is no such snapshot.
    #[error("disk image {path} has no snapshot {name:?}; it has {there}")]
    NoSnapshot {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// What there is.
        there: String,
    },
    /// This kind can only be read.
    #[error("{0} can only be read; serve it read-only, or as overlay:{0}")]
    OnlyRead(String),
    /// The network block device.
    #[error(transparent)]
    Nbd(#[from] NbdError),
    /// It cannot have such sectors.
    #[error(
        "the disk {disk} of {size} bytes cannot have sectors of {sector_size} bytes; its size \
         must be a multiple, and its medium's sectors ({least} bytes) no larger"
    )]
    Sectors {
        /// The disk.
        disk: String,
        /// What was asked for, in bytes.
        sector_size: u32,
        /// What its medium has, in bytes.
        least: u32,
        /// Its size in bytes.
        size: u64,
    },
    /// Only files and block devices are reached through io_uring.
    #[error("io={0} is for raw disks and fixed VHD images, not for {1}; leave that out")]
    NoIoMode(&'static str, String),
    /// The kernel gives no such io_uring.
    #[error("this kernel gives no io_uring with a thread of its own ({0}); leave io=sqpoll out")]
    SqPoll(io::Error),
    /// What goes through the page cache cannot be polled.
    #[error(
        "io=iopoll is for disks around the host's page cache, and {0} is not opened so; \
         write [io=iopoll,direct], or leave io=iopoll out"
    )]
    PollBuffered(String),
    /// The kernel, the file system or the device does not do it.
    #[error(
        "the disk {disk} cannot be polled ({error}); give its device's driver queues for that \
         (nvme.poll_queues=2 or virtio_blk.poll_queues=1 on the kernel's command line), \
         or leave io=iopoll out"
    )]
    NoPoll {
        /// The disk.
        disk: String,
        /// What the system said.
        error: io::Error,
    },
    /// The trace cannot be written.
    #[error("the trace {path} cannot be made: {error}; name a new file, or a directory")]
    Trace {
        /// Where.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// There is too little memory for it.
    #[error("there is no memory for a disk of {0} bytes; make it smaller")]
    Memory(u64),
    /// Anything else.
    #[error("disk image {path}: {error}")]
    Other {
        /// The image.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl ImageError {
    /// A short stable code for logs and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Missing(_) => "image-missing",
            Self::Permission(..) => "image-permission",
            Self::NotADisk(_) => "image-not-a-disk",
            Self::OddSize { .. } => "image-odd-size",
            Self::Busy(_) => "image-busy",
            Self::NoDirect(_) => "image-no-direct",
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
            Self::OnlyRead(_) => "image-only-read",
            Self::Sectors { .. } => "image-sectors",
            Self::NoIoMode(..) => "image-io-mode",
            Self::SqPoll(_) => "image-sqpoll",
            Self::PollBuffered(_) => "image-iopoll-buffered",
            Self::NoPoll { .. } => "image-iopoll",
            Self::Trace { .. } => "image-trace",
            Self::Nbd(error) => error.code(),
            Self::Memory(_) => "image-memory",
            Self::Other { .. } => "image-error",
        }
    }
}

/// Why a file that an image header names is not opened.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceProblem {
    /// It is not below an image root.
    #[error(
        "which is below no image root ({}); if this image may use that file, name the file's \
         directory with --image-root DIR or [image-root=DIR]", listed(.0)
    )]
    Outside(Vec<PathBuf>),
    /// It is a symbolic link from a root to a file elsewhere.
    #[error(
        "and a symbolic link leads from there out of its image root to what is no block device; if \
         this image may use that, name the directory the link leads to with --image-root DIR or \
         [image-root=DIR]"
    )]
    LinkOutside,
    /// An image root cannot be opened.
    #[error(
        "and the image root {0} cannot be opened: {1}; check --image-root and [image-root=DIR]"
    )]
    Root(PathBuf, io::Error),
    /// There is no such file.
    #[error(
        "which does not exist; put it back from where this image comes from, or check that the \
         file system it is on is mounted"
    )]
    Missing,
    /// It is a directory, a socket …
    #[error("which is neither a file nor a block device; see what made this image")]
    NotADisk,
    /// It would be written, and its name is not the image's own.
    #[error(
        "which would be written, and its name does not derive from the image's (as a-flat.vmdk, \
         a-s001.vmdk from a.vmdk); serve it read-only, or allow it with [write-extents=any] if \
         you trust the image"
    )]
    NotDerived,
    /// It would be written through a symbolic link.
    #[error(
        "which would be written and is a symbolic link to a file; serve it read-only, or allow it \
         with [write-extents=any] if you trust the image"
    )]
    WrittenLink,
    /// The kernel cannot confine a name to a directory.
    #[error(
        "and this system does not let names be confined to image roots (the system call openat2 of \
         Linux 5.6 is missing or filtered); allow openat2 in the container's seccomp profile, or \
         serve an image that names no other file"
    )]
    NoOpenat2,
    /// Anything else.
    #[error("which cannot be opened: {0}; check its owner and mode with ls -l")]
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
    let roots: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
    if roots.is_empty() { "there is none".into() } else { roots.join(", ") }
}

/// What is wrong with an image's content, and what to do about it.
fn explain(format: &Format, error: &ContentError) -> String {
    let word = format.word();
    match error {
        // A fixed one is told by its end alone.
        ContentError::NotThis("vhd") => {
            "does not end like a vhd image; if it was cut short copy it again, whole, and if it is \
             a raw one, name it raw:PATH"
                .into()
        }
        ContentError::NotThis(_) => {
            format!("does not begin like a {word} image; if it is a raw one, name it raw:PATH")
        }
        ContentError::Corrupt(what) => {
            format!("is a corrupt {word} image: {what}; see qemu-img check, or restore a backup")
        }
        ContentError::Truncated(what) => {
            format!("is a {word} image that was cut short: {what}; copy it again, whole")
        }
        ContentError::Encrypted(how) => format!(
            "is a {word} image encrypted with {how}, which is not supported; decrypt it with \
             qemu-img convert, or let the guest encrypt its disk"
        ),
        ContentError::Parent => {
            // QEMU reads a VHD without its parent and says nothing.
            let by = match format {
                Format::Vhd => "Merge-VHD of Hyper-V or vhd-util coalesce",
                _ => "vmkfstools -i or vmware-vdiskmanager -r",
            };
            format!(
                "is a {word} image, and {error}, which is not supported; merge both with what made \
                 them ({by}): qemu-img convert may leave out all that is in the parent"
            )
        }
        ContentError::Extent => format!(
            "is a {word} file without a descriptor: {error} of a disk; name the file with the \
             descriptor, which names them all"
        ),
        ContentError::Unsupported(what) => {
            format!(
                "is a {word} image with {what}, which is not supported; make another of it: \
                     qemu-img convert -O qcow2 OLD NEW.qcow2"
            )
        }
        ContentError::Io(error) => format!("cannot be read: {error}"),
    }
}
