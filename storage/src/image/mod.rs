//! Disk images: defined by a [`Disk`], opened as an [`Image`], served by engines.
//!
//! | module | contents |
//! |---|---|
//! | [`spec`] | the string that names a disk's storage |
//! | [`options`], [`disk`] | the options of a disk; both together |
//! | `open`, `storage` | opens what a specification names; the result |
//! | `raw`, [`qcow2`], `vmdk`, [`vhd`] | image formats |
//! | `overlay` | a writable layer over a disk that is not changed |
//! | `engines`, `counters` | the engines of an open image; its counters and budgets |
//! | `lock`, `file`, `files` | opening and locking files; what other processes know about them |
//! | `provider` | where files come from: the file system, or descriptors handed over |
//! | `reference` | files that an image header names, confined to image roots |
//! | [`metadata`] | bounded reading of image metadata, and its errors |
//! | `library` | images opened with `imago` |
//! | `escaped` | file names as text |
//! | [`inspect`] | inspection of a disk without serving it |

mod counters;
pub mod disk;
mod engines;
mod error;
mod escaped;
mod file;
mod files;
mod format;
#[cfg(fuzzing)]
pub mod fuzz;
pub mod inspect;
mod library;
mod lock;
pub mod metadata;
mod open;
pub mod options;
mod overlay;
mod provider;
pub mod qcow2;
mod raw;
mod reference;
mod remedy;
pub mod spec;
mod storage;
pub mod vhd;
mod vmdk;

pub use disk::{Disk, DiskError};
pub use error::{ImageError, ReferenceProblem};
pub use escaped::EscapedPath;
pub use files::{DeviceProperties, FileRecord};
pub use format::Format;
pub use lock::LockState;
pub use options::{DiskOptions, IoMode, OptionError};
pub use provider::{DiskDescription, HandedFiles, HandedRecord, Resolved, image_roots, resolve};
pub use spec::{Spec, SpecError};

use crate::engine::clock::Monotonic;
use crate::engine::faults::FaultSwitch;
use crate::engine::flusher::Flusher;
use crate::engine::offload::{Blocking, BudgetUsage, ThreadPool};
use crate::engine::pause::PauseState;
use crate::engine::record::Record;
use crate::engine::store::Store;
use crate::engine::throttle::SharedLimit;
use crate::engine::trace::Trace;
use crate::engine::uring::{TransferLimits, UringEngine};
use crate::engine::{FlushState, Geometry};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::ToString;
use alloc::sync::Arc;
use core::sync::atomic::AtomicU64;
use metadata::Meter;
use provider::{DiskFiles, LocalFiles};
use pvio_runtime::{LogLimit, PrivateBuf};
use reference::ReferencePolicy;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use storage::{BLOCKING_THREADS, Storage};

/// Options for opening an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ImageOptions {
    /// Reject writes.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

impl ImageOptions {
    /// Options of the disk below an overlay. The overlay copies data with buffers of any alignment.
    const BELOW_OVERLAY: Self = Self { read_only: true, direct: false };
}

/// An open disk, checked, and locked against other users until it is dropped. All its queues have
/// engines over the same image.
pub struct Image {
    storage: Storage,
    geometry: Geometry,
    flushes: Arc<FlushState>,
    /// Flushes a disk that is writable and not in memory.
    flusher: Option<Arc<Flusher>>,
    /// Shared by all engines, because shared limits are measured with it.
    clock: Monotonic,
    share: Option<Arc<SharedLimit>>,
    faults: Option<(Arc<FaultSwitch>, AtomicU64)>,
    trace: Option<Arc<Trace>>,
    record: Option<Arc<Record>>,
    pauses: Arc<PauseState>,
    io: IoMode,
    /// Limits of polled transfers, if there are any.
    limits: TransferLimits,
    /// Held while any I/O may be in flight.
    fence: Option<OwnedFd>,
    usage: Arc<BudgetUsage>,
    /// Counts pages that could not be registered with the kernel.
    unregistered: Arc<LogLimit>,
    /// The descriptors that hold the locks, if other processes have opened them.
    _handed: Option<HandedFiles>,
}

impl Image {
    /// Opens and locks a raw image.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn open(path: &Path, options: ImageOptions) -> Result<Self, ImageError> {
        Self::open_disk(&Spec::file(Format::Raw, path), options)
    }

    /// Opens a disk of any kind and locks its files: one writer, or any number of readers.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn open_disk(spec: &Spec, options: ImageOptions) -> Result<Self, ImageError> {
        Self::open_from(spec, options, &LocalFiles(&ReferencePolicy::default()))
    }

    fn open_from(
        spec: &Spec,
        options: ImageOptions,
        files: &dyn DiskFiles,
    ) -> Result<Self, ImageError> {
        let meter = Meter::default();
        let (storage, geometry) = open::open(spec, options, files, &meter)?;
        let other = |error| ImageError::Other { path: format!("{spec}").into(), error };
        let flushes: Arc<FlushState> = Arc::default();
        let storage = match storage {
            Storage::Store(store) => {
                if let Some(inner) = store.flush_state() {
                    let outer = Arc::clone(&flushes);
                    inner.on_failure(move || outer.mark_failed());
                }
                Storage::ThreadPool(Arc::new(
                    ThreadPool::start("disk", BLOCKING_THREADS, store).map_err(other)?,
                ))
            }
            other => other,
        };
        let flusher = match (geometry.read_only, storage.flushing().map_err(other)?) {
            (false, Some(store)) => {
                let flusher = Flusher::start(store, Arc::clone(&flushes)).map_err(other)?;
                Some(Arc::new(flusher))
            }
            _ => None,
        };
        Ok(Self {
            storage,
            geometry,
            flushes,
            flusher,
            clock: Monotonic::default(),
            share: None,
            faults: None,
            trace: None,
            record: None,
            pauses: Arc::new(PauseState::new(format!("{spec}"))),
            io: IoMode::Normal,
            limits: TransferLimits::default(),
            fence: None,
            usage: Arc::new(BudgetUsage::new(meter.retained())),
            unregistered: Arc::default(),
            _handed: None,
        })
    }

    /// Opens a disk with those of its options that affect opening: all but limits, faults, the
    /// trace, and the features advertised to the frontend.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn open_as(disk: &Disk) -> Result<Self, ImageError> {
        Self::open_as_from(disk, &LocalFiles(&disk.options.references()))
    }

    /// Opens a disk as [`open_as`](Self::open_as) does, from descriptors that other processes have
    /// opened. Opens no file, makes no connection, and takes no lock.
    ///
    /// # Errors
    /// Any [`ImageError`]; [`ImageError::Changed`] if the disk needs a file that was not handed
    /// over, or has another geometry than `expected` (apart from the size of a raw disk, which may
    /// change at any time).
    pub fn open_handed(
        disk: &Disk,
        files: HandedFiles,
        expected: &Geometry,
    ) -> Result<Self, ImageError> {
        let image = Self::open_as_from(disk, &files)?;
        // A raw file or block device may have any size at any time.
        let is_raw = matches!(disk.storage_spec(), Spec::File { format: Format::Raw, .. });
        let sectors = if is_raw { image.geometry.sectors } else { expected.sectors };
        if image.geometry != (Geometry { sectors, ..*expected }) {
            let path = disk.spec.path().unwrap_or(Path::new("")).into();
            return Err(ImageError::Changed { path, what: "its geometry is another one" });
        }
        // Its connection has an owner, which closes it when it is lost.
        Ok(Self { _handed: Some(files.lasting()), ..image })
    }

    fn open_as_from(disk: &Disk, files: &dyn DiskFiles) -> Result<Self, ImageError> {
        let options = &disk.options;
        let image = Self::open_from(&disk.storage_spec(), options.image_options(), files)?;
        let io = options.io.unwrap_or_default();
        let mut limits = TransferLimits::default();
        match (io, &image.storage) {
            (IoMode::Normal, _) => {}
            (IoMode::SqPoll, Storage::File { .. }) => {
                UringEngine::<PrivateBuf>::probe(io).map_err(ImageError::SqPoll)?;
            }
            (IoMode::IoPoll, Storage::File { file, properties, .. }) => {
                limits = raw::poll::check(file, properties, disk)?;
            }
            _ => return Err(ImageError::NoIoMode(io.word(), disk.spec.to_string())),
        }
        let geometry = raw::with_sector_options(image.geometry, disk)?;
        Ok(Self { geometry, io, limits, ..image })
    }

    /// Holds the write end of a [fence](pvio_recordfile::Fence) while any I/O may be in flight,
    /// also after the death of this process.
    #[must_use]
    pub fn fenced(self, fence: OwnedFd) -> Self {
        Self { fence: Some(fence), ..self }
    }

    /// Applies rate limits, which can be changed later.
    #[must_use]
    pub fn throttled(self, share: Arc<SharedLimit>) -> Self {
        Self { share: Some(share), ..self }
    }

    /// Injects delays and failures by a seed, while the switch is on.
    #[must_use]
    pub fn with_faults(self, switch: Arc<FaultSwitch>, seed: u64) -> Self {
        Self { faults: Some((switch, AtomicU64::new(seed))), ..self }
    }

    /// Records all writes in memory, for tests of the state after a power loss.
    #[must_use]
    pub fn recorded(self, record: Arc<Record>) -> Self {
        Self { record: Some(record), ..self }
    }

    /// Writes a trace of its operations that fio can replay on `name`.
    ///
    /// # Errors
    /// The error of writing.
    pub fn traced(self, out: Box<dyn Write + Send>, name: &str) -> io::Result<Self> {
        let trace = Arc::new(Trace::new(out, name, &self.clock)?);
        Ok(Self { trace: Some(trace), ..self })
    }

    /// Returns the disk's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Returns whether a flush has failed since it was opened, on any of its engines.
    #[must_use]
    pub fn flush_failed(&self) -> bool {
        self.flushes.has_failed()
    }

    /// Makes all further flushes fail, because an earlier process with the same disk open saw one
    /// fail.
    pub fn mark_flush_failed(&self) {
        self.flushes.mark_failed();
    }

    /// Flushes the writes of an earlier process where the fence does not cover them: at a server.
    /// Blocks.
    ///
    /// # Errors
    /// The error of the flush, which is recorded like that of any flush.
    pub(crate) fn settle(&self) -> io::Result<()> {
        match (&self.storage, &self.flusher) {
            (Storage::Nbd(_), Some(flusher)) => Blocking::new(flusher.clone(), 1)?.flush(),
            _ => Ok(()),
        }
    }

    /// Returns the flush state that all its engines share.
    #[must_use]
    pub fn flush_state(&self) -> &Arc<FlushState> {
        &self.flushes
    }

    /// Returns the state of pauses while the storage is full, which all its engines share.
    #[must_use]
    pub fn pauses(&self) -> &Arc<PauseState> {
        &self.pauses
    }

    /// Returns another descriptor of the file or block device, if it is served directly.
    #[must_use]
    pub(crate) fn served_file(&self) -> Option<io::Result<File>> {
        match &self.storage {
            Storage::File { file, .. } => Some(file.try_clone()),
            _ => None,
        }
    }

    /// Returns the offset of the first byte that is not zero. Reads the disk up to there.
    ///
    /// # Errors
    /// The error of reading.
    pub fn first_data(self) -> io::Result<Option<u64>> {
        const PART: u64 = 1 << 20;
        let (size, store) = (self.geometry.sectors * 512, self.storage.into_store()?);
        let mut part = alloc::vec![0; PART as usize];
        for at in (0..size).step_by(PART as usize) {
            let part = part.get_mut(..PART.min(size - at) as usize).unwrap_or_default();
            store.read(at, part)?;
            if let Some(first) = part.iter().position(|byte| *byte != 0) {
                return Ok(Some(at + first as u64));
            }
        }
        Ok(None)
    }
}
