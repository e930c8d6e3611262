//! What a disk is kept in: named by a [`Spec`], opened as an [`Image`], served by engines.
//!
//! | module | holds |
//! |---|---|
//! | [`spec`] | the one string that names a disk |
//! | `raw`, [`qcow2`] | the formats of files |
//! | `lock`, `file` | opening files so that nobody else writes them |
//! | [`content`] | what is wrong with an image, before it can do harm |

pub mod content;
mod error;
mod file;
mod format;
mod library;
mod lock;
pub mod qcow2;
mod raw;
pub mod spec;
mod vmdk;

pub use error::ImageError;
pub use format::Format;
pub use lock::LockState;
pub use spec::{Spec, SpecError};

use crate::engine::Geometry;
use crate::engine::nbd::{NbdLink, NbdOptions};
use crate::engine::offload::{Executor, Offload};
use crate::engine::pool::Pool;
use crate::engine::ram::{RamDisk, RamEngine};
use crate::engine::store::Store;
use crate::engine::uring::UringEngine;
use crate::engine::wait::{DiskEngine, Waiting};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use pvio_ring::shm::SharedMemory;
use pvio_uring::IoBuf;
use std::fs::File;
use std::io;
use std::path::Path;

/// Threads that do the operations of a disk whose format's library blocks.
const POOL: usize = 4;

/// How to open an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ImageOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// A disk that is open, checked, and locked against other users for as long as it lives. All its
/// queues have engines over the one.
pub struct Image {
    kept: Kept,
    geometry: Geometry,
}

/// Where the data is.
enum Kept {
    /// In a file, reached through each engine's io_uring.
    File(File),
    /// In memory.
    Ram(Arc<RamDisk>),
    /// Wherever others get it from.
    Elsewhere(Arc<dyn Executor>),
}

impl Image {
    /// Opens and locks a raw image.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn open(path: &Path, options: ImageOptions) -> Result<Self, ImageError> {
        Self::open_disk(&Spec::file(Format::Raw, path), options)
    }

    /// Opens a disk of any kind, and locks the files it is in: one writer, or any number of
    /// readers.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn open_disk(spec: &Spec, options: ImageOptions) -> Result<Self, ImageError> {
        match spec {
            Spec::File { format: Format::Raw, path, .. } => {
                let (file, geometry) = raw::open(path, options)?;
                Ok(Self { kept: Kept::File(file), geometry })
            }
            Spec::File { format: Format::Qcow2, path, snapshot } => {
                Self::of_store(path, qcow2::open(path, snapshot.as_deref(), options)?)
            }
            Spec::File { format: Format::Vmdk, path, .. } => {
                Self::of_store(path, vmdk::open(path, options)?)
            }
            Spec::Ram { bytes } => {
                let disk = RamDisk::new(*bytes).ok_or(ImageError::Memory(*bytes))?;
                let geometry = disk.geometry(options.read_only);
                Ok(Self { kept: Kept::Ram(Arc::new(disk)), geometry })
            }
            Spec::Nbd(nbd) => {
                let nbd_options =
                    NbdOptions { read_only: options.read_only, ..NbdOptions::default() };
                let link = NbdLink::connect(nbd, nbd_options)?;
                let geometry = link.geometry(options.read_only);
                Ok(Self { kept: Kept::Elsewhere(Arc::new(link)), geometry })
            }
            other => {
                let error = io::ErrorKind::Unsupported.into();
                Err(ImageError::Other { path: alloc::format!("{other}").into(), error })
            }
        }
    }

    fn of_store(path: &Path, (store, geometry): Opened) -> Result<Self, ImageError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let pool = Pool::start(&name, POOL, store)
            .map_err(|error| ImageError::Other { path: path.to_path_buf(), error })?;
        Ok(Self { kept: Kept::Elsewhere(Arc::new(pool)), geometry })
    }

    /// What the disk looks like.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// An engine over the disk, for one queue. To be called by the thread that will use it.
    ///
    /// # Errors
    /// What the system says when it has no descriptor or no io_uring to give.
    pub fn engine<B>(&self, depth: u32) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
    {
        Ok(match &self.kept {
            Kept::File(file) => {
                Box::new(UringEngine::new(file.try_clone()?.into(), self.geometry, depth)?)
            }
            Kept::Ram(disk) => {
                let engine = RamEngine::new(Arc::clone(disk), self.geometry);
                Box::new(Waiting::new(engine, None)?)
            }
            Kept::Elsewhere(executor) => {
                let engine = Offload::new(Arc::clone(executor), self.geometry, depth)?;
                let completions = engine.completions()?;
                Box::new(Waiting::new(engine, Some(completions))?)
            }
        })
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// A store, and what the disk in it looks like.
type Opened = (Arc<dyn Store>, Geometry);
