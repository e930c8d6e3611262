//! The file system and the network.

use super::super::error::ImageError;
use super::super::file::FileHandle;
use super::super::reference::{ImageRoots, ReferencePolicy};
use super::{DiskFiles, ImageFiles, References};
use crate::engine::nbd::{NbdLink, NbdOptions};
use crate::image::spec::NbdSpec;
use alloc::boxed::Box;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::path::Path;

/// The file system and the network, with the policy for files that image headers name.
pub(in crate::image) struct LocalFiles<'a>(pub &'a ReferencePolicy);

impl ImageFiles for LocalFiles<'_> {
    fn named(&self, path: &Path) -> Result<FileHandle, ImageError> {
        FileHandle::locate(path)
    }

    fn references(&self, image: &FileHandle) -> Result<Box<dyn References + '_>, ImageError> {
        Ok(Box::new(ImageRoots::of(image, self.0)?))
    }
}

impl DiskFiles for LocalFiles<'_> {
    fn scratch(&self) -> Result<File, ImageError> {
        scratch()
    }

    fn link(&self, spec: &NbdSpec, options: NbdOptions) -> Result<NbdLink, ImageError> {
        Ok(NbdLink::connect(spec, options)?)
    }
}

impl References for ImageRoots {
    fn find(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        Self::find(self, image, name)
    }

    fn find_written(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        Self::find_written(self, image, name)
    }
}

/// Creates an unnamed file in the directory for temporary files.
pub(super) fn scratch() -> Result<File, ImageError> {
    let dir = std::env::temp_dir();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(&dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        Err(errno) => Err(ImageError::Other { path: dir, error: errno.into() }),
    }
}
