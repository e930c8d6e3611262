//! What a disk is kept in: named by a [`Disk`], opened as an [`Image`], served by engines.
//!
//! | module | holds |
//! |---|---|
//! | [`spec`] | the one string that names what a disk is kept in |
//! | [`options`], [`disk`] | how it is to be served; both together |
//! | `raw`, [`qcow2`], `vmdk`, [`vhd`] | the formats of files |
//! | `overlay` | a disk that is never changed, under one that is |
//! | `lock`, `file` | opening files so that nobody else writes them |
//! | `reference` | files that an image header names, confined to image roots |
//! | `polled`, `device` | whether a disk can be polled; what the kernel says of a device |
//! | `direct` | what `O_DIRECT` asks for |
//! | `shown` | names of files as text |
//! | [`content`] | what is wrong with an image, before it can do harm |
//! | [`inspect`] | what can be told of a disk without serving it |

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
use pvio_uring::{IoBuf, LogLimit, PrivateBuf};
use reference::ReferencePolicy;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
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
    kept: Storage,
    geometry: Geometry,
    flushes: Arc<FlushState>,
    /// What flushes a disk that is written and not only in memory.
    flusher: Option<Arc<Flusher>>,
    /// One for all engines, as what they share is measured by it.
    clock: Monotonic,
    share: Option<Arc<SharedLimit>>,
    faults: Option<(Arc<FaultSwitch>, AtomicU64)>,
    trace: Option<Arc<Trace>>,
    record: Option<Arc<Record>>,
    io: IoMode,
    /// What is polled for, if anything is.
    limits: TransferLimits,
    /// Held for as long as any I/O may be under way.
    fence: Option<OwnedFd>,
    load: Arc<Load>,
    /// How often pages could not be registered with the kernel.
    unregistered: Arc<LogLimit>,
}

/// Where the data is.
enum Storage {
    /// In a file or block device, reached through each engine's io_uring.
    File {
        /// The file.
        file: File,
        /// What discards, if it is a device that can.
        discards: Option<Arc<ThreadPool>>,
    },
    /// In memory.
    Ram(Arc<RamDisk>),
    /// At the end of a socket.
    Nbd(Arc<NbdLink>),
    /// Where blocking calls get it from.
    Store(Arc<dyn Store>),
    /// The same, with threads to call.
    ThreadPool(Arc<ThreadPool>),
}

impl Storage {
    /// The same through blocking calls.
    fn into_store(self) -> io::Result<Arc<dyn Store>> {
        Ok(match self {
            Self::File { file, .. } => {
                // Calls come from memory of any alignment.
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
    /// What is to be called to flush it, if it is not only in memory.
    fn flushing(&self) -> io::Result<Option<Arc<dyn Store>>> {
        Ok(Some(match self {
            // The same open file: its error is this one's to see.
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

    /// Opens a disk of any kind, and locks the files it is in: one writer, or any number of
    /// readers.
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

    /// Opens a disk with those of its options that say how: all but limits, faults, the trace, and
    /// what is offered to the frontend.
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

    /// Holds the write end of a [fence](pvio_recordfile::Fence) for as long as any I/O may be under way,
    /// also after this process is dead.
    #[must_use]
    pub fn fenced(self, fence: OwnedFd) -> Self {
        Self { fence: Some(fence), ..self }
    }

    /// Keeps the disk to limits, which may be changed later.
    #[must_use]
    pub fn throttled(self, share: Arc<SharedLimit>) -> Self {
        Self { share: Some(share), ..self }
    }

    /// Makes it slow and failing, by a seed, as long as the switch is on.
    #[must_use]
    pub fn with_faults(self, switch: Arc<FaultSwitch>, seed: u64) -> Self {
        Self { faults: Some((switch, AtomicU64::new(seed))), ..self }
    }

    /// Keeps all that is written in memory, for tests of what a loss of power leaves.
    #[must_use]
    pub fn recorded(self, record: Arc<Record>) -> Self {
        Self { record: Some(record), ..self }
    }

    /// Writes down what is asked of it, for fio to replay on `name`.
    ///
    /// # Errors
    /// What writing says.
    pub fn traced(self, out: Box<dyn Write + Send>, name: &str) -> io::Result<Self> {
        let trace = Arc::new(Trace::new(out, name, &self.clock)?);
        Ok(Self { trace: Some(trace), ..self })
    }

    /// What the disk looks like.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether a flush has failed since it was opened, on any of its engines.
    #[must_use]
    pub fn flush_failed(&self) -> bool {
        self.flushes.has_failed()
    }

    /// Makes every flush fail from now on: an earlier process that had the same disk open saw one fail.
    pub fn mark_flush_failed(&self) {
        self.flushes.mark_failed();
    }

    /// Flushes what an earlier process has written, where the fence tells nothing of it: at a server. Waits.
    ///
    /// # Errors
    /// What the flush reports, which is remembered like any that fails.
    pub(crate) fn settle(&self) -> io::Result<()> {
        match (&self.kept, &self.flusher) {
            (Storage::Nbd(_), Some(flusher)) => Blocking(flusher.clone()).flush(),
            _ => Ok(()),
        }
    }

    /// What all its engines share to know whether a flush has failed.
    #[must_use]
    pub fn flush_state(&self) -> &Arc<FlushState> {
        &self.flushes
    }

    /// Another descriptor of the file or block device it is in, if it is in one that is served as it is.
    #[must_use]
    pub(crate) fn served_file(&self) -> Option<io::Result<File>> {
        match &self.kept {
            Storage::File { file, .. } => Some(file.try_clone()),
            _ => None,
        }
    }

    /// An engine over the disk, for one queue. To be called by the thread that will use it.
    ///
    /// # Errors
    /// What the system says when it has no descriptor or no io_uring to give.
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

    /// Puts around an engine what the disk has around it.
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

    /// Limits and faults know the engine's type: where they are idle they cost next to nothing.
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

    /// Where the first byte is that is not zero; all of the disk is read until then.
    ///
    /// # Errors
    /// What reading says.
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

/// A store, and what the disk in it looks like.
type Opened = (Arc<dyn Store>, Geometry);

/// Opens what a disk is kept in.
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

/// Opens a disk to be read, and puts one to be written over it.
fn open_overlay(
    below: &Spec,
    options: ImageOptions,
    policy: &ReferencePolicy,
    meter: &Meter,
) -> Result<Opened, ImageError> {
    // Copies of the data are made in memory of any alignment.
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
