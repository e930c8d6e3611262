//! Images opened with `imago`, which is built without its asynchronous interface: its calls block.

use super::Format;
use super::error::ImageError;
use super::file::{Access, FileHandle};
use super::metadata::ContentError;
use crate::engine::store::Store;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use imago::{FormatAccess, StorageOpenOptions};
use pvio_imagefile::{ImageFile, WriteOrdering};
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{PoisonError, RwLock};

/// The library's type of an image.
pub(super) type LibraryImage = FormatAccess<ImageFile>;

/// An image that the library has open.
pub(super) struct Library {
    image: RwLock<LibraryImage>,
    write: bool,
    /// The library has panicked: its state in memory is not reliable.
    broken: AtomicBool,
}

impl Library {
    /// Opens an image with `open`. The library was written for valid images; a panic on an invalid
    /// one must not end the process.
    pub fn open(
        path: &Path,
        format: Format,
        write: bool,
        open: impl FnOnce() -> Result<LibraryImage, ImageError>,
    ) -> Result<Self, ImageError> {
        let image = catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|_| {
            let error = ContentError::corrupt("its metadata cannot be interpreted");
            Err(ImageError::Content { path: path.into(), format, error })
        })?;
        Ok(Self { image: RwLock::new(image), write, broken: AtomicBool::new(false) })
    }

    /// Flushes the library's caches with `flush`. Returns whether the image is consistent then.
    pub fn close(&self, flush: impl FnOnce() -> io::Result<()>) -> bool {
        if self.broken.load(Ordering::Acquire) {
            return false;
        }
        match flush() {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "the cached metadata of a disk image cannot be written");
                false
            }
        }
    }

    /// Calls the library, concurrently with other calls.
    pub fn shared<T>(&self, call: impl FnOnce(&LibraryImage) -> io::Result<T>) -> io::Result<T> {
        let _guard = PanicGuard(&self.broken);
        call(&self.image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls the library exclusively.
    pub fn alone<T>(&self, call: impl FnOnce(&LibraryImage) -> io::Result<T>) -> io::Result<T> {
        let _guard = PanicGuard(&self.broken);
        call(&self.image.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Makes all writes durable: first writes the library's caches, then flushes the file.
pub(super) fn flush(image: &LibraryImage) -> io::Result<()> {
    image.flush().and_then(|()| image.sync())
}

impl Store for Library {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.shared(|image| image.read(into, at))
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.shared(|image| image.write(from, at))
    }

    fn flush(&self) -> io::Result<()> {
        if !self.write {
            return Ok(());
        }
        self.shared(flush)
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        // Formats with support for discard implement it themselves.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.shared(|image| image.write_zeroes(at, len))
    }
}

/// Records a panic during a call.
struct PanicGuard<'a>(&'a AtomicBool);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

/// Converts an error of the library.
pub(super) fn failed(path: &Path, format: Format, error: io::Error) -> ImageError {
    let error = match error.kind() {
        io::ErrorKind::InvalidData => ContentError::corrupt(alloc::format!("{error}")),
        io::ErrorKind::Unsupported => ContentError::unsupported(alloc::format!("{error}")),
        _ => error.into(),
    };
    ImageError::Content { path: path.into(), format, error }
}

/// A file that is open for writing, and the order of its writes.
pub(super) type Ordered = (File, Arc<dyn WriteOrdering>);

/// Opens a file for the library, unless it is already open.
pub(super) fn storage(
    file: &FileHandle,
    access: Access,
    ordered: Option<Ordered>,
) -> Result<ImageFile, ImageError> {
    let path = file.path();
    let (file, order) = match ordered {
        Some((file, order)) => (file, Some(order)),
        None => (file.open(access)?, None),
    };
    let Access { write, direct, .. } = access;
    let options = StorageOpenOptions::new().filename(path).write(write).direct(direct);
    ImageFile::new(file, options, order)
        .map_err(|error| ImageError::Other { path: path.to_path_buf(), error })
}
