//! The open storage of a disk.

use super::files::DeviceProperties;
use crate::engine::Geometry;
use crate::engine::nbd::NbdLink;
use crate::engine::offload::{Blocking, ThreadPool};
use crate::engine::ram::RamDisk;
use crate::engine::store::{FileStore, Store};
use alloc::sync::Arc;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io;

/// Number of threads that execute the operations of a disk with blocking storage.
pub(super) const BLOCKING_THREADS: usize = 4;

/// The storage of a disk.
pub(super) enum Storage {
    /// A file or block device, accessed through each engine's io_uring.
    File {
        /// The file.
        file: File,
        /// Threads for discards, if it is a device that supports them.
        discards: Option<Arc<ThreadPool>>,
        /// Properties of the block device, if they affect the disk.
        properties: DeviceProperties,
    },
    /// Memory.
    Ram(Arc<RamDisk>),
    /// An NBD server.
    Nbd(Arc<NbdLink>),
    /// Storage with blocking calls.
    Store(Arc<dyn Store>),
    /// Storage with blocking calls, and threads that execute them.
    ThreadPool(Arc<ThreadPool>),
}

impl Storage {
    /// Converts the storage to blocking calls.
    pub fn into_store(self) -> io::Result<Arc<dyn Store>> {
        Ok(match self {
            Self::File { file, .. } => {
                // Buffers of the calls may have any alignment.
                fcntl_setfl(&file, fcntl_getfl(&file)?.difference(OFlags::DIRECT))?;
                Arc::new(FileStore::new(file)?)
            }
            Self::Ram(disk) => disk,
            Self::Nbd(link) => Arc::new(Blocking::new(link, BLOCKING_THREADS)?),
            Self::Store(store) => store,
            Self::ThreadPool(pool) => Arc::new(Blocking::new(pool, BLOCKING_THREADS)?),
        })
    }

    /// Returns a store that flushes the storage, unless it is only in memory.
    pub fn flushing(&self) -> io::Result<Option<Arc<dyn Store>>> {
        Ok(Some(match self {
            // The same open file description, so that this descriptor sees its write-back errors.
            Self::File { file, .. } => Arc::new(FileStore::new(file.try_clone()?)?),
            Self::Nbd(link) => Arc::new(Blocking::new(link.clone(), 1)?),
            Self::ThreadPool(pool) => Arc::new(Blocking::new(pool.clone(), 1)?),
            Self::Ram(_) | Self::Store(_) => return Ok(None),
        }))
    }
}

/// What an image is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// To serve a disk from it. Opening for writing may repair the image, and marks it as open.
    Serve,
    /// To check whether it can be served. Nothing is changed.
    Check,
}

/// A store and the geometry of its disk.
pub(super) type Opened = (Arc<dyn Store>, Geometry);
