//! Where the files and connections of a disk come from: the file system and the network, or the
//! descriptors that another process has opened.
//!
//! | provider | process | opens |
//! |---|---|---|
//! | [`LocalFiles`] | without isolation | everything |
//! | [`HandedFiles::open_named`] | supervisor | the file that the operator names, unread |
//! | [`resolve`](crate::image::resolve) | image helper | the files that image headers name |
//! | [`HandedFiles`] | device process | nothing |
//!
//! Everything that this crate opens for a disk is opened by a provider. All of them run the same
//! code of the formats, which names files in the same way, so that a disk that was resolved opens
//! from the descriptors. A file that was not handed over is an error
//! ([`ImageError::Changed`]): the image was changed in between.
//!
//! # Locks
//! The process that opens a file takes its lock (`flock` and open-file-description locks). Both
//! belong to the open file description, so they pass with the descriptor, and end when the last
//! duplicate is closed: also that of an io_uring whose process was killed. A device process takes
//! and releases no lock. While the supervisor keeps duplicates, the disk stays locked when the
//! device process dies, and its successor serves from the same descriptions.

mod handed;
mod local;
mod resolver;

pub use handed::{HandedFiles, HandedRecord};
pub(super) use local::LocalFiles;
pub use resolver::{DiskDescription, Resolved, image_roots, resolve};

use super::error::ImageError;
use super::file::FileHandle;
use crate::engine::nbd::{NbdLink, NbdOptions};
use crate::image::spec::NbdSpec;
use alloc::boxed::Box;
use std::fs::File;
use std::path::Path;

/// Opens the files of images.
pub(super) trait ImageFiles {
    /// Returns the file that the operator names.
    ///
    /// # Errors
    /// Any [`ImageError`] of opening.
    fn named(&self, path: &Path) -> Result<FileHandle, ImageError>;

    /// Returns the files that the header of this image, and those of the images below it, may name.
    ///
    /// # Errors
    /// The image roots cannot be determined.
    fn references(&self, image: &FileHandle) -> Result<Box<dyn References + '_>, ImageError>;
}

/// Opens everything that a disk needs to be served.
pub(super) trait DiskFiles: ImageFiles {
    /// Returns an unnamed file that is deleted when it is closed.
    ///
    /// # Errors
    /// The system's error.
    fn scratch(&self) -> Result<File, ImageError>;

    /// Connects to a server of network block devices.
    ///
    /// # Errors
    /// The server cannot be reached or used.
    fn link(&self, spec: &NbdSpec, options: NbdOptions) -> Result<NbdLink, ImageError>;
}

/// The files that the headers of a disk's images may name. A relative name is relative to the
/// directory of the image.
pub(super) trait References {
    /// Returns a file that the header of `image` names, for reading.
    ///
    /// # Errors
    /// [`ImageError::Reference`] if the file is not allowed or does not exist.
    fn find(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError>;

    /// Returns a file that the header of `image` names, for writing.
    ///
    /// # Errors
    /// [`ImageError::Reference`] if the file is not allowed or does not exist.
    fn find_written(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError>;
}
