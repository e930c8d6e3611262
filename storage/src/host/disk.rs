//! An open disk: an image, and the settings that can change while it is served.

use super::size::ImageSize;
use super::trace::TraceFile;
use crate::engine::faults::{FaultPlan, FaultSwitch};
use crate::engine::offload::BudgetUsage;
use crate::engine::throttle::{SharedLimit, Throttles};
use crate::engine::{FlushState, Geometry};
use crate::image::{Disk, DiskOptions, Format, Image, ImageError, Spec};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_runtime::{LogLimit, Notify};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The parts of an [`OpenDisk`].
pub struct DiskParts {
    /// The image.
    pub image: Image,
    /// Its limits, which other disks may share.
    pub throttles: Arc<Throttles>,
    /// The write end of a [fence](pvio_recordfile::Fence), which is held while any I/O may be in
    /// flight.
    pub fence: Option<OwnedFd>,
    /// The file of the trace, if the options require one.
    pub trace: Option<TraceFile>,
    /// Rate limit of the log lines for failures to determine the image's size.
    pub unsized_images: Arc<LogLimit>,
}

/// An open disk and its settings that can change at runtime: limits and injected faults.
pub struct OpenDisk {
    image: Arc<Image>,
    /// Whether it is a raw file or a block device, whose size may change at any time.
    grows: bool,
    size: ImageSize,
    share: Arc<SharedLimit>,
    faults: Arc<FaultSwitch>,
    /// The configured faults. While a session stops, none are injected.
    plan: Mutex<FaultPlan>,
    /// Whether operations are held while the storage is full.
    pauses: AtomicBool,
}

impl OpenDisk {
    /// Applies a disk's options to its image: limits, faults and the trace. [`Image::open_as`]
    /// applies the others.
    ///
    /// # Errors
    /// [`ImageError::Trace`] if the trace cannot be written.
    pub fn new(disk: &Disk, parts: DiskParts) -> Result<Self, ImageError> {
        let DiskParts { image, throttles, fence, trace, unsized_images } = parts;
        let options = &disk.options;
        let share = Arc::new(SharedLimit::new(throttles));
        let plan = options.faults();
        let faults = Arc::new(FaultSwitch::new(plan));
        let image = image
            .throttled(Arc::clone(&share))
            .with_faults(Arc::clone(&faults), options.seed.unwrap_or_default());
        let image = match fence {
            Some(fence) => image.fenced(fence),
            None => image,
        };
        let image = match trace {
            Some(TraceFile { file, path, target }) => image
                .traced(Box::new(file), &target)
                .map_err(|error| ImageError::Trace { path, error })?,
            None => image,
        };
        let grows = matches!(disk.storage_spec(), Spec::File { format: Format::Raw, .. });
        let size = ImageSize::new(unsized_images);
        let plan = Mutex::new(plan);
        let pauses = AtomicBool::new(options.pause_when_full.unwrap_or(true));
        Ok(Self { image: Arc::new(image), grows, size, share, faults, plan, pauses })
    }

    /// Returns the geometry of the image.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    /// Returns whether a flush of the image has failed.
    #[must_use]
    pub fn flush_state(&self) -> &Arc<FlushState> {
        self.image.flush_state()
    }

    /// Returns the usage of the image's budgets.
    #[must_use]
    pub fn load(&self) -> &Arc<BudgetUsage> {
        self.image.usage()
    }

    /// Returns the rate-limited log events of the image, by name.
    #[must_use]
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        self.image.events()
    }

    /// Returns the image.
    #[must_use]
    pub const fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Applies changed options: limits and faults. The limits of a group change only if the options
    /// contain limits.
    pub fn refresh(&self, options: &DiskOptions) {
        let throttles = self.share.throttles();
        let limits = options.limits();
        let said = options.group.is_none() || options.says_limits();
        if said && throttles.limits() != limits {
            throttles.set(limits);
        }
        let plan = options.faults();
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = plan;
        self.faults.set(plan);
        let pauses = options.pause_when_full.unwrap_or(true);
        self.pauses.store(pauses, Ordering::Relaxed);
        self.image.pauses().set_holds(pauses);
        // Delayed operations may be due now.
        self.share.wake();
    }

    /// Starts to look up the current size of the image, if it can change, without blocking.
    /// `changed` is called, on another thread, if it differs from the previous one.
    pub fn look_up_size(&self, changed: Notify) {
        if !self.grows {
            return;
        }
        // If no descriptor is free now, the next lookup may have one.
        if let Some(Ok(file)) = self.image.served_file() {
            self.size.look_up(file, move || changed());
        }
    }

    /// Returns the size in sectors of 512 bytes as of the last lookup, if there was one.
    #[must_use]
    pub fn sectors(&self) -> Option<u64> {
        // Rounded down to logical sectors: a file that is being appended to may have any length.
        let unit = u64::from(self.image.geometry().sector_size);
        Some(self.size.bytes()? / unit * (unit / 512))
    }

    /// Notes that no later process will complete the operations of the session.
    pub fn abandon(&self) {
        self.image.pauses().set_abandoned(true);
    }

    /// Applies limits and faults, before a queue starts.
    pub(super) fn restrain(&self) {
        self.share.lift(false);
        self.image.pauses().set_holds(self.pauses.load(Ordering::Relaxed));
        self.image.pauses().set_abandoned(false);
        self.faults.set(*self.plan.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Suspends limits and faults while queues stop: operations in flight complete as fast as the
    /// storage allows.
    pub(super) fn hasten(&self) {
        self.faults.set(FaultPlan::default());
        self.share.lift(true);
    }
}
