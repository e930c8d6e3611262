//! The reasons why a disk cannot be served, with a remedy in each message.

use super::Format;
use super::content::ContentError;
use super::shown::Shown;
use crate::engine::nbd::NbdError;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::io;
use std::path::PathBuf;

/// The reason why an image cannot be served. Each message states a remedy.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The image does not exist.
    #[error(
        "disk image {p0} does not exist; check the path, and that the file system it is on is mounted", p0 = Shown::new(.0)
    )]
    Missing(PathBuf),
    /// The image cannot be opened for lack of permission.
    #[error("disk image {p0} may not be opened{1}; check its owner and mode with ls -l", p0 = Shown::new(.0))]
    Permission(PathBuf, &'static str),
    /// The path is a directory, a socket or the like.
    #[error("{p0} is neither a file nor a block device; name a disk image", p0 = Shown::new(.0))]
    NotADisk(PathBuf),
    /// The size is not a positive multiple of the sector size.
    #[error(
        "disk image {path} has {size} bytes, which is not a positive multiple of {unit}; check that it \
         was copied whole, then make it larger, to {larger} bytes (truncate -s {larger} for a raw file, \
         qemu-img resize for others)", larger = larger(.size, .unit), path = Shown::new(.path)
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
    #[error(
        "disk image {p0} is in use by another program; stop that first, \
         or open it read-only in both", p0 = Shown::new(.0)
    )]
    Busy(PathBuf),
    /// I/O of an earlier process may be in flight.
    #[error(
        "the I/O that an earlier process began for {disk} is not known to have ended: {error}; see whether \
         its storage hangs, then detach the disk and attach it again"
    )]
    Fence {
        /// Name of the disk.
        disk: String,
        /// The error of waiting for the fence.
        error: io::Error,
    },
    /// The file system does not support bypassing the page cache.
    #[error("disk image {p0} cannot be opened with O_DIRECT on this file system; leave that out", p0 = Shown::new(.0))]
    NoDirect(PathBuf),
    /// The disk's size is not a multiple of the sector size that `O_DIRECT` requires.
    #[error(
        "the disk in {path} has {size} bytes, which is no multiple of the {unit} that its storage \
         reads and writes at once with O_DIRECT; leave direct out, or copy it to a larger disk \
         whose size is a multiple", path = Shown::new(.path)
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
    #[error("disk image {path} {}", explain(.format, .error), path = Shown::new(.path))]
    Content {
        /// Path of the image, or of the file below it.
        path: PathBuf,
        /// The expected format.
        format: Format,
        /// The problem.
        error: ContentError,
    },
    /// A backing file's name cannot be resolved.
    #[error("disk image {path} rests on {below}, {what}", path = Shown::new(.path))]
    Chain {
        /// Path of the image whose header has the name.
        path: PathBuf,
        /// The name in the header.
        below: String,
        /// The reason, and the remedy.
        what: &'static str,
    },
    /// The header of an image names a file that is not opened.
    #[error("disk image {image} names {name}, {problem}", image = Shown::new(.image), name = Shown::new(.name))]
    Reference {
        /// Path of the image.
        image: PathBuf,
        /// The name in the header.
        name: PathBuf,
        /// The reason, and the remedy.
        problem: ReferenceProblem,
    },
    /// The snapshot does not exist.
    #[error("disk image {path} has no snapshot {name:?}; it has {there}", path = Shown::new(.path))]
    NoSnapshot {
        /// Path of the image.
        path: PathBuf,
        /// Name of the requested snapshot.
        name: String,
        /// The existing snapshots.
        there: String,
    },
    /// The image has its data in another file, so its internal snapshots cannot be served.
    #[error(
        "disk image {p0} has its data in another file, and internal snapshots of such an image hold no data; \
         serve the image itself, or restore a backup of what the snapshot was made for", p0 = Shown::new(.0)
    )]
    SnapshotOfDataFile(PathBuf),
    /// This kind of image is not supported for writing.
    #[error("{0} can only be read; serve it read-only, or as overlay:{0}")]
    OnlyRead(String),
    /// An error of the network block device.
    #[error(transparent)]
    Nbd(#[from] NbdError),
    /// The sector size in the options is not possible for the disk.
    #[error(
        "the disk {disk} of {size} bytes cannot have sectors of {sector_size} bytes; its size \
         must be a multiple, and its medium's sectors ({least} bytes) no larger"
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
    #[error("io={0} is for raw disks and fixed VHD images, not for {1}; leave that out")]
    NoIoMode(&'static str, String),
    /// The kernel does not provide an io_uring with a submission thread.
    #[error("this kernel gives no io_uring with a thread of its own ({0}); leave io=sqpoll out")]
    SqPoll(io::Error),
    /// I/O through the page cache cannot be polled.
    #[error(
        "io=iopoll is for disks around the host's page cache, and {0} is not opened so; \
         write [io=iopoll,direct], or leave io=iopoll out"
    )]
    PollBuffered(String),
    /// The kernel, the file system or the device does not support polling.
    #[error(
        "the disk {disk} cannot be polled ({error}); give its device's driver queues for that \
         (nvme.poll_queues=2 or virtio_blk.poll_queues=1 on the kernel's command line), \
         or leave io=iopoll out"
    )]
    NoPoll {
        /// Name of the disk.
        disk: String,
        /// The system's error.
        error: io::Error,
    },
    /// The trace cannot be created.
    #[error("the trace {path} cannot be made: {error}; name a new file, or a directory", path = Shown::new(.path))]
    Trace {
        /// Path of the trace.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// There is not enough memory for a disk in memory.
    #[error("there is no memory for a disk of {0} bytes; make it smaller")]
    Memory(u64),
    /// Any other error.
    #[error("disk image {path}: {error}", path = Shown::new(.path))]
    Other {
        /// Path of the image.
        path: PathBuf,
        /// The system's error.
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
            Self::Other { .. } => "image-error",
        }
    }
}

/// The reason why a file that an image header names is not opened.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceProblem {
    /// It is not below an image root.
    #[error(
        "which is below no image root ({}); if this image may use that file, name the file's \
         directory with --image-root DIR or [image-root=DIR]", listed(.0)
    )]
    Outside(Vec<PathBuf>),
    /// It is a symbolic link from below a root to a file elsewhere.
    #[error(
        "and a symbolic link leads from there out of its image root to what is no block device; if \
         this image may use that, name the directory the link leads to with --image-root DIR or \
         [image-root=DIR]"
    )]
    LinkOutside,
    /// An image root cannot be opened.
    #[error(
        "and the image root {p0} cannot be opened: {1}; check --image-root and [image-root=DIR]", p0 = Shown::new(.0)
    )]
    Root(PathBuf, io::Error),
    /// It does not exist.
    #[error(
        "which does not exist; put it back from where this image comes from, or check that the \
         file system it is on is mounted"
    )]
    Missing,
    /// It is a directory, a socket or the like.
    #[error("which is neither a file nor a block device; see what made this image")]
    NotADisk,
    /// It would be written, and its name does not derive from the image's name.
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
    /// Any other error.
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

/// Returns the smallest valid size of an image that is not smaller than its current one.
fn larger(size: &u64, unit: &u32) -> u64 {
    size.next_multiple_of((*unit).into()).max((*unit).into())
}

fn listed(roots: &[PathBuf]) -> String {
    let roots: Vec<String> = roots.iter().map(|root| Shown::new(root).to_string()).collect();
    if roots.is_empty() { "there is none".into() } else { roots.join(", ") }
}

/// Describes a problem with an image's content and its remedy.
fn explain(format: &Format, error: &ContentError) -> String {
    let word = format.word();
    match error {
        // A fixed VHD image is recognized by its end alone.
        ContentError::NotThis("vhd") => {
            "does not end like a vhd image; if it was cut short copy it again, whole, and if it is \
             a raw one, name it raw:PATH"
                .into()
        }
        ContentError::NotThis(_) => {
            format!("does not begin like a {word} image; if it is a raw one, name it raw:PATH")
        }
        ContentError::Corrupt(what) => {
            format!(
                "is a corrupt {word} image: {what}; restore a backup, or look at \
                 a copy with qemu-img check"
            )
        }
        ContentError::Truncated(what) => {
            format!("is a {word} image that was cut short: {what}; copy it again, whole")
        }
        ContentError::Encrypted(how) => format!(
            "is a {word} image encrypted with {how}, which is not supported; decrypt it into a \
             new image with qemu-img convert, or let the guest encrypt its disk"
        ),
        ContentError::Parent => {
            // `qemu-img` reads a VHD without its parent and reports no error.
            let by = match format {
                // Merging into the parent is not suggested, because other images may depend on it.
                Format::Vhd => "Convert-VHD of Hyper-V",
                _ => "vmkfstools -i or vmware-vdiskmanager -r",
            };
            format!(
                "is a {word} image, and {error}, which is not supported; make a new image of \
                 both with what made them ({by}): qemu-img convert may leave out all that is in the parent"
            )
        }
        ContentError::Extent => format!(
            "is a {word} file without a descriptor: {error} of a disk; name the file with the \
             descriptor, which names them all"
        ),
        ContentError::Unsupported(what) => {
            // The format is given explicitly, because a detected format is under the guest's
            // control.
            let qemu = if *format == Format::Vhd { "vpc" } else { word };
            format!(
                "is a {word} image with {what}, which is not supported; make another of it: \
                 qemu-img convert -f {qemu} -O qcow2 OLD NEW.qcow2 (internal snapshots stay in the old one: \
                 keep it)"
            )
        }
        ContentError::Io(error) => format!("cannot be read: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Spec, SpecError};

    /// Returns every message with a remedy for an image's content.
    fn remedies() -> Vec<String> {
        let mut texts = Vec::new();
        for format in [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhd] {
            for error in [
                ContentError::NotThis(format.word()),
                ContentError::corrupt("x"),
                ContentError::truncated("x"),
                ContentError::Encrypted("LUKS"),
                ContentError::Parent,
                ContentError::Extent,
                ContentError::unsupported("x"),
            ] {
                let path = "/a".into();
                texts.push(ImageError::Content { path, format, error }.to_string());
            }
        }
        texts.push(ImageError::OddSize { path: "/a".into(), size: 513, unit: 512 }.to_string());
        texts.push(ImageError::DirectSize { path: "/a".into(), size: 512, unit: 4096 }.to_string());
        texts.push(ImageError::SnapshotOfDataFile("/a".into()).to_string());
        for problem in [ReferenceProblem::Missing, ReferenceProblem::NotADisk] {
            let (image, name) = ("/a".into(), "b".into());
            texts.push(ImageError::Reference { image, name, problem }.to_string());
        }
        for format in ["vhdx", "vdi", "qed", "parallels"] {
            let refused: Result<Spec, SpecError> = format!("{format}:/a").parse();
            texts.push(refused.unwrap_err().to_string());
        }
        texts
    }

    #[test]
    fn no_remedy_destroys_data_or_loses_a_parent() {
        for text in remedies() {
            // Commands that change an image in place, or create an empty one in place of a missing
            // one.
            for word in
                ["-r all", "coalesce", "Merge-VHD", "qemu-img create", "commit", "amend", "dd "]
            {
                assert!(!text.contains(word), "{word} in: {text}");
            }
            // A conversion leaves the old image unchanged.
            if let Some((_, how)) = text.split_once("-O qcow2") {
                assert!(how.starts_with(" OLD NEW.qcow2"), "{text}");
            }
            if text.contains("truncate -s") {
                assert!(text.contains("truncate -s 1024 "), "it is made larger: {text}");
            }
        }
        for format in [Format::Vhd, Format::Vmdk] {
            let error = ContentError::Parent;
            let text = ImageError::Content { path: "/a".into(), format, error }.to_string();
            assert!(!text.contains("-O qcow2") && text.contains("a new image of both"), "{text}");
        }
        let content = |format| {
            let error = ContentError::unsupported("x");
            ImageError::Content { path: "/a".into(), format, error }.to_string()
        };
        for (format, word) in [(Format::Vhd, "-f vpc "), (Format::Qcow2, "-f qcow2 ")] {
            assert!(
                content(format).contains(word),
                "the format is not guessed: {}",
                content(format)
            );
        }
    }
}
