//! Serves vbds from disk images, with one thread per queue, as a driver domain does.

mod fence;
mod opening;
mod size;

pub use fence::UNMAPPING;
pub use opening::BUSY;

use crate::budgets::MappingBudgets;
use crate::engine::faults::{FaultPlan, FaultSwitch};
use crate::engine::offload::BudgetUsage;
use crate::engine::throttle::{SharedLimit, Throttles};
use crate::engine::{FlushState, Geometry};
use crate::image::{Disk, DiskOptions, Format, Image, ImageError, Spec};
use crate::worker::{self, Worker};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::task::Poll;
use opening::{Deadlines, Pending};
use pvio_blkback::Config;
use pvio_blkback::queue::{QueueFault, QueueParts};
use pvio_blkback::vbd::{Opening, VbdServer};
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::DomId;
use pvio_grant_table::policy::MappingBudget;
use pvio_recordfile::{RecordDir, RecordFile, RecordStore};
use pvio_runtime::{LogLimit, Notify, Task};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::{Backing, Mode, ToolstackBack};
use size::ImageSize;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Named limits that the disks of a driver domain can share.
#[derive(Clone, Debug, Default)]
pub struct Groups(Arc<Mutex<BTreeMap<String, Weak<Throttles>>>>);

impl Groups {
    /// Returns the limits of that name: those that other disks use, or new ones, initially
    /// unlimited.
    #[must_use]
    pub fn named(&self, name: &str) -> Arc<Throttles> {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = groups.get(name).and_then(Weak::upgrade) {
            return group;
        }
        let group = Arc::default();
        groups.insert(name.into(), Arc::downgrade(&group));
        group
    }
}

/// Serves a vbd from the disk image that its `params` name.
pub struct ImageServer {
    /// Default options of disks.
    usual: DiskOptions,
    groups: Groups,
    budgets: MappingBudgets,
    wake: Notify,
    records: RecordStore,
    /// Whether pages that an earlier process mapped for single requests may still be mapped.
    mapped_before: bool,
    /// The disk whose fence exists.
    fenced: Option<String>,
    /// The disk's definition in effect, once it is known.
    disk: Option<Disk>,
    open: Option<Open>,
    /// The disk being opened, and its definition.
    pending: Option<(Pending, Disk)>,
    closing: Option<Task<()>>,
    /// Count of failures to determine the image's size.
    unsized_images: Arc<LogLimit>,
}

/// An open disk and its settings that can change at runtime.
struct Open {
    image: Arc<Image>,
    /// Whether it is a raw file or a block device, whose size may change at any time.
    grows: bool,
    size: ImageSize,
    share: Arc<SharedLimit>,
    faults: Arc<FaultSwitch>,
}

impl ImageServer {
    /// Creates a server. `wake` is called, on any thread, when an event occurs that the driver
    /// waits for, or when a worker ends because of a fault. The driver must then be stepped.
    pub fn new(wake: Notify) -> Self {
        Self::with(DiskOptions::default(), Groups::default(), wake)
    }

    /// Creates a server with default options for its disk, and with limits that disks can share.
    pub fn with(usual: DiskOptions, groups: Groups, wake: Notify) -> Self {
        Self {
            usual,
            groups,
            budgets: MappingBudgets::default(),
            wake,
            records: RecordStore::default(),
            mapped_before: false,
            fenced: None,
            disk: None,
            open: None,
            pending: None,
            closing: None,
            unsized_images: Arc::default(),
        }
    }

    /// Sets the budgets of cached mappings of guest pages.
    #[must_use]
    pub fn within(mut self, budgets: MappingBudgets) -> Self {
        self.budgets = budgets;
        self
    }

    /// Makes sessions resumable by another process, which finds their in-flight records in the same
    /// directory.
    #[must_use]
    pub fn recorded_in(mut self, records: RecordDir) -> Self {
        self.records = RecordStore::in_dir(records);
        self
    }

    /// Returns the rate-limited log events of the disk, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events =
            Vec::from([("size-unknown", Arc::clone(&self.unsized_images)), self.records.event()]);
        events.extend(self.open.iter().flat_map(|open| open.image.events()));
        events
    }

    /// Returns the usage of the budgets of the open disk.
    pub fn load(&self) -> Option<&Arc<BudgetUsage>> {
        self.open.as_ref().map(|open| open.image.usage())
    }

    /// Parses the definition of a disk. Options in its own xenstore node take precedence over those
    /// in its name, and these over the default options.
    fn read(&self, told: &ToolstackBack) -> Result<Disk, Fault> {
        let disk = match told.backing() {
            _ if told.is_empty_drive() => Ok(Spec::Ram { bytes: 0 }.into()),
            Backing::Own(text) => Disk::from_bytes(text),
            Backing::Format(format, rest) => Disk::with_format(format, rest),
        };
        let mut disk = disk.map_err(|e| Fault::of(e.code(), &e))?;
        let words = told.options.as_deref().unwrap_or_default();
        let said = DiskOptions::from_bytes(words).map_err(|e| Fault::of("disk-options", &e))?;
        disk.options = said.or(disk.options).or(self.usual.clone());
        let options = &mut disk.options;
        options.read_only = Some(told.mode == Mode::ReadOnly || options.read_only == Some(true));
        options.direct = options.direct.or(Some(told.direct_io_safe));
        Ok(disk)
    }

    /// Starts to open a disk, after the previous one is closed.
    fn begin(&mut self, told: &ToolstackBack) -> Result<(Pending, Disk), Fault> {
        let disk = self.read(told)?;
        let name = format!("vbd-{}-{}", told.frontend_id, told.dev.replace('/', "_"));
        let busy = disk.options.busy_timeout.unwrap_or(BUSY);
        let (groups, named) = (self.groups.clone(), name.clone());
        let (device, opened) = (told.physical_device_path.clone(), disk.clone());
        let deadlines = Deadlines::of(busy);
        let (records, fenced) = (self.records.dir().cloned(), name.clone());
        let mapped = self.mapped_before;
        let fence = move || {
            let fence =
                records.map(|dir| fence::pass(&dir, &fenced, deadlines.fence)).transpose()?;
            if mapped {
                // A frontend that finds a page still mapped after the response disables the disk
                // (XSA-396).
                std::thread::sleep(UNMAPPING);
            }
            Ok(fence)
        };
        let unsized_images = Arc::clone(&self.unsized_images);
        let open = move |fence: &Option<OwnedFd>| {
            let disk = backed_by(opened.clone(), device.as_ref());
            let size = ImageSize::new(Arc::clone(&unsized_images));
            Open::new(disk, &groups, fence.as_ref(), size, &named)
        };
        self.fenced = Some(name.clone());
        let (before, wake) = (self.open.take(), Arc::clone(&self.wake));
        Ok((Pending::begin(&name, deadlines, before, fence, open, wake)?, disk))
    }

    fn opened(&mut self, disk: Disk, open: Open) -> Geometry {
        let geometry = open.image.geometry();
        let wake = Arc::clone(&self.wake);
        open.image.flush_state().on_failure(move || wake());
        (self.disk, self.open) = (Some(disk), Some(open));
        // An image that is opened later was not open in the earlier process.
        self.mapped_before = false;
        geometry
    }
}

impl Open {
    fn new(
        disk: Disk,
        groups: &Groups,
        fence: Option<&OwnedFd>,
        size: ImageSize,
        name: &str,
    ) -> Result<Self, ImageError> {
        let options = &disk.options;
        let limits = options.limits();
        let throttles = match &options.group {
            Some(group) => {
                let group = groups.named(group);
                if options.says_limits() && group.limits() != limits {
                    group.set(limits);
                }
                group
            }
            None => Arc::new(Throttles::new(limits)),
        };
        let share = Arc::new(SharedLimit::new(throttles));
        let faults = Arc::new(FaultSwitch::new(options.faults()));
        let image = Image::open_as(&disk)?
            .throttled(Arc::clone(&share))
            .with_faults(Arc::clone(&faults), options.seed.unwrap_or_default());
        let image = match fence {
            Some(fence) => {
                let failed = |error| ImageError::Other { path: name.into(), error };
                image.fenced(fence.try_clone().map_err(failed)?)
            }
            None => image,
        };
        let image = match &options.trace {
            Some(path) => traced(image, path, &disk.spec, name)?,
            None => image,
        };
        let grows = matches!(disk.storage_spec(), Spec::File { format: Format::Raw, .. });
        tracing::info!(disk = name, image = %disk, "disk opened");
        Ok(Self { image: Arc::new(image), grows, size, share, faults })
    }
}

/// Returns the disk with its path replaced by the device that the toolstack's script created for
/// it.
fn backed_by(mut disk: Disk, device: Option<&Vec<u8>>) -> Disk {
    if let (Some(device), Spec::File { format: Format::Raw, path, .. }) = (device, &disk.spec)
        && !path.is_file()
    {
        // If the path is a file, the device is a loop device, which would only add overhead.
        disk.spec = Spec::file(Format::Raw, OsStr::from_bytes(device));
    }
    disk
}

impl Drop for ImageServer {
    fn drop(&mut self) {
        self.open = None;
        if let (Some(records), Some(disk)) = (self.records.dir(), &self.fenced) {
            fence::remove(records, disk);
        }
    }
}

/// Adds a trace in a new file; an existing file is never overwritten.
fn traced(image: Image, path: &Path, spec: &Spec, name: &str) -> Result<Image, ImageError> {
    const MOST: u32 = 1000;
    let base = if path.is_dir() { path.join(format!("{name}.iolog")) } else { path.into() };
    let failed = |error| ImageError::Trace { path: base.clone(), error };
    let numbered = (1..MOST).map(|n| {
        let mut name = base.clone().into_os_string();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    });
    let exists = || io::ErrorKind::AlreadyExists.into();
    let file = core::iter::once(base.clone())
        .chain(numbered)
        .map(File::create_new)
        .find(|made| !matches!(made, Err(e) if e.kind() == io::ErrorKind::AlreadyExists))
        .unwrap_or_else(|| Err(exists()));
    // The name of the disk for a replay; fio separates the fields of a line by blanks.
    let place = spec.path().and_then(Path::to_str);
    let place = place.filter(|path| path.starts_with('/') && !path.contains(char::is_whitespace));
    let place = place.map_or_else(|| format!("/dev/{name}"), Into::into);
    image.traced(Box::new(file.map_err(failed)?), &place).map_err(failed)
}

fn not_started(error: io::Error) -> Fault {
    Fault::new("worker", format!("the queue's worker cannot start: {error}"))
}

impl<P> VbdServer<P> for ImageServer
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
{
    type Running = Worker;
    type Record = RecordFile;

    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<RecordFile, Fault> {
        self.records.open(device, len, resumed).map_err(|e| Fault::of(e.code(), &e))
    }

    fn mapped_before(&mut self, mapped: bool) {
        self.mapped_before = mapped;
    }

    fn remove_record(&mut self, device: &str) {
        self.records.remove(device);
    }

    fn configure(&mut self, told: &ToolstackBack, usual: Config) -> Result<Config, Fault> {
        let disk = self.read(told)?;
        let config = disk.options.config(usual);
        self.disk = Some(disk);
        Ok(config)
    }

    fn open(&mut self, told: &ToolstackBack) -> Result<Geometry, Fault> {
        let (mut pending, disk) = self.begin(told)?;
        let open = pending.wait()?;
        Ok(self.opened(disk, open))
    }

    fn poll_open(&mut self, told: &ToolstackBack) -> Result<Opening, Fault> {
        let (mut pending, disk) = match self.pending.take() {
            Some(begun) => begun,
            None => self.begin(told)?,
        };
        match pending.poll() {
            Poll::Ready(open) => Ok(Opening::Done(self.opened(disk, open?))),
            Poll::Pending => {
                let busy = pending.busy();
                self.pending = Some((pending, disk));
                Ok(busy.map_or(Opening::Pending, Opening::Busy))
            }
        }
    }

    fn close(&mut self) -> Poll<()> {
        self.pending = None;
        if let Some(open) = self.open.take() {
            self.closing = opening::close(open, Arc::clone(&self.wake));
        }
        if self.closing.as_mut().is_some_and(|closing| closing.poll().is_pending()) {
            return Poll::Pending;
        }
        self.closing = None;
        Poll::Ready(())
    }

    fn refresh(&mut self, told: &ToolstackBack) -> Result<(), Fault> {
        let disk = self.read(told)?;
        let Some(open) = &self.open else { return Ok(()) };
        if let Some(before) = &mut self.disk {
            if before.options.fixed() != disk.options.fixed() {
                tracing::warn!(
                    current = %before.options.fixed(),
                    requested = %disk.options.fixed(),
                    "some options take effect when the disk is attached again"
                );
            }
            before.options = disk.options.live().or(before.options.fixed());
        }
        let throttles = open.share.throttles();
        let limits = disk.options.limits();
        let said = disk.options.group.is_none() || disk.options.says_limits();
        if said && throttles.limits() != limits {
            throttles.set(limits);
        }
        open.faults.set(disk.options.faults());
        // Delayed operations may be due now.
        open.share.wake();
        Ok(())
    }

    fn flush_state(&self) -> Arc<FlushState> {
        self.open.as_ref().map(|open| Arc::clone(open.image.flush_state())).unwrap_or_default()
    }

    fn mapping_budget(&self, guest: DomId) -> Arc<MappingBudget> {
        self.budgets.guest(guest)
    }

    fn look_up_size(&mut self) {
        let Some(open) = self.open.as_ref().filter(|open| open.grows) else { return };
        // If no descriptor is free now, the next lookup may have one.
        if let Some(Ok(file)) = open.image.served_file() {
            let wake = Arc::clone(&self.wake);
            open.size.look_up(file, move || wake());
        }
    }

    fn sectors(&mut self) -> Option<u64> {
        let open = self.open.as_ref()?;
        // Rounded down to logical sectors: a file that is being appended to may have any length.
        let unit = u64::from(open.image.geometry().sector_size);
        Some(open.size.bytes()? / unit * (unit / 512))
    }

    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel, RecordFile>,
    ) -> Result<Self::Running, Fault> {
        let Some(open) = &self.open else {
            return Err(Fault::new("image-missing", "no image is open"));
        };
        open.share.lift(false);
        let faults = self.disk.as_ref().map(|disk| disk.options.faults());
        open.faults.set(faults.unwrap_or_default());
        worker::spawn(name, parts, Arc::clone(&open.image), Arc::clone(&self.wake))
            .map_err(not_started)
    }

    fn ready(&mut self, running: &mut Worker) -> Result<Poll<()>, Fault> {
        match running.ready() {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(e)) => Err(not_started(e)),
        }
    }

    fn fault(&mut self, running: &mut Worker) -> Option<QueueFault> {
        running.fault()
    }

    fn stop(&mut self, running: &mut Worker) -> Poll<()> {
        if let Some(open) = &self.open {
            // Operations in flight complete as fast as the disk can.
            open.faults.set(FaultPlan::default());
            open.share.lift(true);
        }
        running.stop()
    }
}
