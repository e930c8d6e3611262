//! Disk images: defined by a [`Disk`], opened as an [`Image`], served by engines.
//!
//! | module | contents |
//! |---|---|
//! | [`spec`] | the string that names a disk's storage |
//! | [`options`], [`disk`] | the options of a disk; both together |
//! | `raw`, [`qcow2`], `vmdk`, [`vhd`] | image formats |
//! | `overlay` | a writable layer over a disk that is not changed |
//! | `lock`, `file` | opening and locking files |
//! | `reference` | files that an image header names, confined to image roots |
//! | `polled`, `device` | whether a disk can be polled; properties of block devices |
//! | `direct` | requirements of `O_DIRECT` |
//! | `shown` | file names as text |
//! | [`content`] | bounded reading of image metadata, and its errors |
//! | [`inspect`] | inspection of a disk without serving it |

pub mod content;
mod device;
mod direct;
pub mod disk;
mod error;
mod file;
mod format;
pub mod inspect;
mod library;
mod lock;
pub mod options;
mod overlay;
mod polled;
pub mod qcow2;
mod raw;
mod reference;
mod remedy;
mod shown;
pub mod spec;
pub mod vhd;
mod vmdk;
mod watched;

pub use disk::{Disk, DiskError};
pub use error::{ImageError, ReferenceProblem};
pub use format::Format;
pub use lock::LockState;
pub use options::{DiskOptions, IoMode, OptionError};
pub use shown::Shown;
pub use spec::{Spec, SpecError};

use crate::engine::clock::Monotonic;
use crate::engine::device::DeviceEngine;
use crate::engine::faults::{FaultSwitch, Faults};
use crate::engine::flusher::{Flushed, Flusher};
use crate::engine::nbd::{NbdLink, NbdOptions};
use crate::engine::offload::{Blocking, Executor, Load, Offload};
use crate::engine::ram::{RamDisk, RamEngine};
use crate::engine::record::{Record, Recorded};
use crate::engine::store::{FileStore, Store};
use crate::engine::thread_pool::ThreadPool;
use crate::engine::throttle::{SharedLimit, Throttle};
use crate::engine::trace::{Trace, Traced};
use crate::engine::uring::{TransferLimits, UringEngine};
use crate::engine::wait::{DiskEngine, WaitEngine, Waiting};
use crate::engine::{Discard, FlushState, Geometry};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::ToString;
use alloc::sync::Arc;
use content::Meter;
use core::sync::atomic::{AtomicU64, Ordering};
use overlay::Overlay;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{IoBuf, LogLimit, PrivateBuf};
use reference::ReferencePolicy;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Number of threads that execute the operations of a disk with blocking storage.
const POOL: usize = 4;

/// Options for opening an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ImageOptions {
    /// Reject writes.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// An open disk, checked, and locked against other users until it is dropped. All its queues have
/// engines over the same image.
pub struct Image {
    kept: Storage,
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
    io: IoMode,
    /// Limits of polled transfers, if there are any.
    limits: TransferLimits,
    /// Held while any I/O may be in flight.
    fence: Option<OwnedFd>,
    load: Arc<Load>,
    /// Counts pages that could not be registered with the kernel.
    unregistered: Arc<LogLimit>,
}

/// The storage of a disk.
enum Storage {
    /// A file or block device, accessed through each engine's io_uring.
    File {
        /// The file.
        file: File,
        /// Threads for discards, if it is a device that supports them.
        discards: Option<Arc<ThreadPool>>,
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
    fn into_store(self) -> io::Result<Arc<dyn Store>> {
        Ok(match self {
            Self::File { file, .. } => {
                // Buffers of the calls may have any alignment.
                fcntl_setfl(&file, fcntl_getfl(&file)?.difference(OFlags::DIRECT))?;
                Arc::new(FileStore::new(file)?)
            }
            Self::Ram(disk) => disk,
            Self::Nbd(link) => Arc::new(Blocking(link)),
            Self::Store(store) => store,
            Self::ThreadPool(pool) => Arc::new(Blocking(pool)),
        })
    }
}

impl Storage {
    /// Returns a store that flushes the storage, unless it is only in memory.
    fn flushing(&self) -> io::Result<Option<Arc<dyn Store>>> {
        Ok(Some(match self {
            // The same open file description, so that this descriptor sees its write-back errors.
            Self::File { file, .. } => Arc::new(FileStore::new(file.try_clone()?)?),
            Self::Nbd(link) => Arc::new(Blocking(link.clone())),
            Self::ThreadPool(pool) => Arc::new(Blocking(pool.clone())),
            Self::Ram(_) | Self::Store(_) => return Ok(None),
        }))
    }
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
        Self::open_within(spec, options, &ReferencePolicy::default())
    }

    fn open_within(
        spec: &Spec,
        options: ImageOptions,
        policy: &ReferencePolicy,
    ) -> Result<Self, ImageError> {
        let meter = Meter::default();
        let (kept, geometry) = open(spec, options, policy, &meter)?;
        let other = |error| ImageError::Other { path: format!("{spec}").into(), error };
        let flushes: Arc<FlushState> = Arc::default();
        let kept = match kept {
            Storage::Store(store) => {
                if let Some(inner) = store.flush_state() {
                    let outer = Arc::clone(&flushes);
                    inner.on_failure(move || outer.mark_failed());
                }
                Storage::ThreadPool(Arc::new(
                    ThreadPool::start("disk", POOL, store).map_err(other)?,
                ))
            }
            other => other,
        };
        let flusher = match (geometry.read_only, kept.flushing().map_err(other)?) {
            (false, Some(store)) => {
                let flusher = Flusher::start(store, Arc::clone(&flushes)).map_err(other)?;
                Some(Arc::new(flusher))
            }
            _ => None,
        };
        Ok(Self {
            kept,
            geometry,
            flushes,
            flusher,
            clock: Monotonic::default(),
            share: None,
            faults: None,
            trace: None,
            record: None,
            io: IoMode::Normal,
            limits: TransferLimits::default(),
            fence: None,
            load: Arc::new(Load::new(meter.kept())),
            unregistered: Arc::default(),
        })
    }

    /// Opens a disk with those of its options that affect opening: all but limits, faults, the
    /// trace, and the features advertised to the frontend.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn open_as(disk: &Disk) -> Result<Self, ImageError> {
        let options = &disk.options;
        let how = ImageOptions {
            read_only: options.read_only.unwrap_or_default(),
            direct: options.direct.unwrap_or_default(),
        };
        let image = Self::open_within(&disk.kept_in(), how, &options.references())?;
        let io = options.io.unwrap_or_default();
        let mut limits = TransferLimits::default();
        match (io, &image.kept) {
            (IoMode::Normal, _) => {}
            (IoMode::SqPoll, Storage::File { .. }) => {
                UringEngine::<PrivateBuf>::probe(io).map_err(ImageError::SqPoll)?;
            }
            (IoMode::IoPoll, Storage::File { file, .. }) => limits = polled::check(file, disk)?,
            _ => return Err(ImageError::NoIoMode(io.word(), disk.spec.to_string())),
        }
        let geometry = raw::shaped(image.geometry, disk)?;
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
        match (&self.kept, &self.flusher) {
            (Storage::Nbd(_), Some(flusher)) => Blocking(flusher.clone()).flush(),
            _ => Ok(()),
        }
    }

    /// Returns the flush state that all its engines share.
    #[must_use]
    pub fn flush_state(&self) -> &Arc<FlushState> {
        &self.flushes
    }

    /// Returns another descriptor of the file or block device, if it is served directly.
    #[must_use]
    pub(crate) fn served_file(&self) -> Option<io::Result<File>> {
        match &self.kept {
            Storage::File { file, .. } => Some(file.try_clone()),
            _ => None,
        }
    }

    /// Creates an engine for one queue. Must be called on the thread that will use it.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor or no io_uring.
    pub fn engine<B>(&self, depth: u32) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
    {
        let flushed = |others: Arc<dyn Executor>| -> Arc<dyn Executor> {
            match &self.flusher {
                Some(flusher) => Arc::new(Flushed::new(Arc::clone(flusher), others)),
                None => others,
            }
        };
        let executor = match &self.kept {
            Storage::File { file, discards } => {
                let image = file.try_clone()?.into();
                let engine = UringEngine::with(
                    image,
                    self.geometry,
                    depth,
                    self.io,
                    self.fence.as_ref().map(AsFd::as_fd),
                )?;
                let engine = engine.polling_within(self.limits).logging(&self.unregistered);
                let executor: Arc<dyn Executor> = match (discards.clone(), self.flusher.clone()) {
                    (Some(discards), _) => flushed(discards),
                    (None, Some(flusher)) => flusher,
                    (None, None) => return self.wrap(engine),
                };
                return self.wrap(DeviceEngine::new(
                    engine,
                    executor,
                    discards.is_some(),
                    depth,
                    &self.load,
                )?);
            }
            Storage::Ram(disk) => {
                let engine = RamEngine::new(Arc::clone(disk), self.geometry);
                return self.wrap(Waiting::new(engine, None)?);
            }
            Storage::Store(_) => return Err(io::ErrorKind::Unsupported.into()),
            Storage::Nbd(link) => flushed(link.clone()),
            Storage::ThreadPool(pool) => flushed(pool.clone()),
        };
        let engine = Offload::new(executor, self.geometry, depth, &self.load)?;
        let completions = engine.completions()?;
        self.wrap(Waiting::new(engine, Some(completions))?)
    }

    /// Wraps an engine with the disk's wrappers.
    fn wrap<B, E>(&self, engine: E) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
        E: WaitEngine<B> + 'static,
    {
        if let Some(record) = &self.record {
            let recorded: DiskEngine<B> = Box::new(Recorded::new(engine, Arc::clone(record)));
            return self.tune(recorded);
        }
        self.tune(engine)
    }

    /// Throttling and faults are generic over the engine's type, so that they cost almost nothing
    /// when idle.
    fn tune<B, E>(&self, engine: E) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
        E: WaitEngine<B> + 'static,
    {
        let faulty = |engine, (switch, seed): &(Arc<FaultSwitch>, AtomicU64)| {
            let seed = seed.fetch_add(1, Ordering::Relaxed);
            Faults::new(engine, Arc::clone(switch), seed, self.clock)
        };
        let engine: DiskEngine<B> = match (&self.faults, &self.share) {
            (None, None) => Box::new(engine),
            (Some(faults), None) => Box::new(faulty(engine, faults)),
            (None, Some(share)) => Box::new(Throttle::new(engine, share.clone(), self.clock)?),
            (Some(faults), Some(share)) => {
                let engine = faulty(engine, faults);
                Box::new(Throttle::new(engine, share.clone(), self.clock)?)
            }
        };
        Ok(match &self.trace {
            Some(trace) => Box::new(Traced::new(engine, Arc::clone(trace), self.clock)),
            None => engine,
        })
    }

    /// Returns the offset of the first byte that is not zero. Reads the disk up to there.
    ///
    /// # Errors
    /// The error of reading.
    pub fn first_data(self) -> io::Result<Option<u64>> {
        const PART: u64 = 1 << 20;
        let (size, store) = (self.geometry.sectors * 512, self.kept.into_store()?);
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

/// A store and the geometry of its disk.
type Opened = (Arc<dyn Store>, Geometry);

/// Opens the storage of a disk.
fn open(
    spec: &Spec,
    options: ImageOptions,
    policy: &ReferencePolicy,
    meter: &Meter,
) -> Result<(Storage, Geometry), ImageError> {
    let store = |(store, geometry): Opened| (Storage::Store(store), geometry);
    Ok(match spec {
        Spec::File { format: Format::Raw, path, .. } => raw::open(path, options)?,
        Spec::File { format: Format::Qcow2, path, snapshot } => {
            store(qcow2::open(path, snapshot.as_deref(), options, policy, meter)?)
        }
        Spec::File { format: Format::Vmdk, path, .. } => {
            store(vmdk::open(path, options, policy, meter)?)
        }
        Spec::File { format: Format::Vhd, path, .. } => vhd::open(path, options, meter)?,
        Spec::Ram { bytes } => {
            let disk = RamDisk::new(*bytes).ok_or(ImageError::Memory(*bytes))?;
            let geometry = disk.geometry(options.read_only);
            (Storage::Ram(Arc::new(disk)), geometry)
        }
        Spec::Nbd(nbd) => {
            let nbd_options = NbdOptions { read_only: options.read_only, ..NbdOptions::default() };
            let link = NbdLink::connect(nbd, nbd_options)?;
            let geometry = link.geometry(options.read_only);
            (Storage::Nbd(Arc::new(link)), geometry)
        }
        Spec::Overlay(below) => store(open_overlay(below, options, policy, meter)?),
    })
}

/// Opens a disk for reading, with a writable layer over it.
fn open_overlay(
    below: &Spec,
    options: ImageOptions,
    policy: &ReferencePolicy,
    meter: &Meter,
) -> Result<Opened, ImageError> {
    // The overlay copies data with buffers of any alignment.
    let read = ImageOptions { read_only: true, direct: false };
    let (kept, mut geometry) = open(below, read, policy, meter)?;
    let below = kept
        .into_store()
        .map_err(|error| ImageError::Other { path: format!("{below}").into(), error })?;
    geometry.read_only = options.read_only;
    geometry.discard = (!options.read_only).then_some(Discard {
        granularity: geometry.physical_sector_size,
        alignment: 0,
        secure: false,
    });
    let dir = std::env::temp_dir();
    let overlay = Overlay::new(below, geometry.sectors * 512, &dir);
    let overlay = overlay.map_err(|error| ImageError::Other { path: dir, error })?;
    Ok((Arc::new(overlay), geometry))
}
