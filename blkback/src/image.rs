//! Disk images: raw files and block devices.

use crate::engine::uring::UringEngine;
use crate::engine::{Discard, Geometry};
use pvio_uring::IoBuf;
use rustix::fs::{FlockOperation, flock, ioctl_blkpbszget, ioctl_blksszget};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// How to open an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ImageOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// A raw image that is open, checked, and locked against other users for as long as it lives.
#[derive(Debug)]
pub struct Image {
    file: File,
    geometry: Geometry,
}

/// Why an image cannot be served. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is none.
    #[error("disk image {0} does not exist; check the path, or make one: truncate -s 1G {0}")]
    Missing(PathBuf),
    /// It may not be opened.
    #[error("disk image {0} may not be opened{1}; check its owner and mode with ls -l")]
    Permission(PathBuf, &'static str),
    /// It is a directory, a socket …
    #[error("{0} is neither a file nor a block device; name a disk image")]
    NotADisk(PathBuf),
    /// Its size is no number of sectors.
    #[error(
        "disk image {path} has {size} bytes, which is not a positive multiple of {unit}; \
         round it up: truncate -s %{unit} {path}"
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
            Self::Other { .. } => "image-error",
        }
    }
}

const O_EXCL: i32 = 0o200;
const O_DIRECT: i32 = 0o40000;

impl Image {
    /// Opens and locks an image: one writer, or any number of readers.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn open(path: &Path, options: ImageOptions) -> Result<Self, ImageError> {
        let name = || path.to_path_buf();
        let wrap = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::Missing(name()),
            io::ErrorKind::PermissionDenied if options.read_only => {
                ImageError::Permission(name(), "")
            }
            io::ErrorKind::PermissionDenied => ImageError::Permission(name(), " for writing"),
            io::ErrorKind::ReadOnlyFilesystem => ImageError::Permission(name(), " for writing"),
            io::ErrorKind::ResourceBusy => ImageError::Busy(name()),
            io::ErrorKind::InvalidInput if options.direct => ImageError::NoDirect(name()),
            _ => ImageError::Other { path: name(), error },
        };
        // Asked before opening: opening a FIFO would block, and a directory has a poor message.
        let kind = std::fs::metadata(path).map_err(wrap)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::NotADisk(name()));
        }
        // On a block device O_EXCL (without O_CREAT) asks that nobody else has it so, a mount say.
        let exclusive = if kind.is_block_device() && !options.read_only { O_EXCL } else { 0 };
        let direct = if options.direct { O_DIRECT } else { 0 };
        let mut file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(exclusive | direct)
            .open(path)
            .map_err(wrap)?;
        let lock = if options.read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match flock(&file, lock) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(ImageError::Busy(name())),
            Err(e) => return Err(wrap(e.into())),
        }
        let size = file.seek(SeekFrom::End(0)).map_err(wrap)?;
        let (logical, physical) = if kind.is_block_device() {
            let system = |e: Errno| wrap(e.into());
            (ioctl_blksszget(&file).map_err(system)?, ioctl_blkpbszget(&file).map_err(system)?)
        } else {
            (512, 4096)
        };
        if size == 0 || !size.is_multiple_of(u64::from(logical)) {
            return Err(ImageError::OddSize { path: name(), size, unit: logical });
        }
        let geometry = Geometry {
            sectors: size / 512,
            sector_size: logical,
            physical_sector_size: physical.max(logical),
            read_only: options.read_only,
            discard: (!options.read_only)
                .then_some(Discard { granularity: physical.max(logical), alignment: 0 }),
        };
        Ok(Self { file, geometry })
    }

    /// What the disk looks like.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// An engine over the image, for one queue. To be called by the thread that will use it.
    ///
    /// # Errors
    /// What the system says when it has no descriptor or no io_uring to give.
    pub fn engine<B: IoBuf>(&self, depth: u32) -> io::Result<UringEngine<B>> {
        UringEngine::new(self.file.try_clone()?.into(), self.geometry, depth)
    }
}
