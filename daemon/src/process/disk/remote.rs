//! The supervisor's side of a disk.

use super::super::found::Search;
use super::super::messages::{FromDevice, Start};
use super::super::status::ProcessStatus;
use super::super::supervised::{Environment, Message, Supervised};
use super::dial::Dialing;
use super::plan::{DiskPlan, OpenFiles, PlanState};
use super::{DiskChange, DiskIdentity};
use pvio_blkback::engine::Geometry;
use pvio_blkback::path::DataPath;
use pvio_blkback::session::{self, Begin, SessionIdentity, SessionSpec, record_name};
use pvio_blkback::vbd::{Opening, VbdServer};
use pvio_blkback::{Config, Stats};
use pvio_event_channel::DevicePlatform;
use pvio_recordfile::{CounterFile, RecordStore};
use pvio_runtime::{LogLimit, Notify, Task};
use pvio_storage::host::{
    BUSY, Deadlines, ImageSize, OpeningTask, TraceFile, UNMAPPING, backed_by, change_live,
    definition, disk_name, pass_fence, remove_fence,
};
use pvio_storage::image::{Disk, DiskOptions, Format, Spec};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vbd::ToolstackBack;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

/// Configuration of a [`RemoteDisk`].
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The device.
    pub addr: DeviceAddr,
    /// Default options.
    pub usual: DiskOptions,
    /// Maximum number of cached mappings of its pages.
    pub cached_mappings: usize,
    /// The processes.
    pub environment: Environment,
}

/// Serves a vbd in a process of its own.
pub struct RemoteDisk<P> {
    platform: P,
    config: DiskConfig,
    wake: Notify,
    records: RecordStore,
    /// The process of an earlier supervisor.
    search: Search<DiskIdentity>,
    /// Counters of each queue, over all sessions, and where its process writes them.
    counters: Option<(OwnedFd, CounterFile)>,
    stats: Vec<Arc<Stats>>,
    mapped_before: bool,
    /// The disk whose fence exists.
    fenced: Option<String>,
    /// The disk's definition in effect, once it is known.
    disk: Option<Disk>,
    open: Option<OpenFiles>,
    opening: Option<(OpeningTask<OpenFiles>, Disk)>,
    closing: Option<Task<()>>,
    size: ImageSize,
    unsized_images: Arc<LogLimit>,
    /// What the session in progress is started with.
    plan: Option<Arc<DiskPlan<P>>>,
    flush_failed: bool,
    paused: bool,
    process: ProcessStatus,
    /// A connection to its server that the process asked for.
    dialing: Dialing,
}

impl<P: Send + Sync + 'static> RemoteDisk<P> {
    /// Creates a server. `wake` is called, on any thread, when the driver must be stepped.
    pub fn new(platform: P, config: DiskConfig, wake: Notify) -> Self {
        let records = config.environment.records.clone();
        let unsized_images: Arc<LogLimit> = Arc::default();
        Self {
            platform,
            wake,
            records: records.map(RecordStore::in_dir).unwrap_or_default(),
            config,
            search: Search::Before,
            counters: None,
            stats: Vec::from([Arc::default()]),
            mapped_before: false,
            fenced: None,
            disk: None,
            open: None,
            opening: None,
            closing: None,
            size: ImageSize::new(Arc::clone(&unsized_images)),
            unsized_images,
            plan: None,
            flush_failed: false,
            paused: false,
            process: ProcessStatus::default(),
            dialing: Dialing::default(),
        }
    }

    /// Returns whether pages that an earlier process mapped for single requests may still be mapped.
    #[must_use]
    pub const fn mapped_before(&self) -> bool {
        self.mapped_before
    }

    /// Returns the rate-limited log events of the disk, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        vec![("size-unknown", Arc::clone(&self.unsized_images)), self.records.event()]
    }

    /// Returns the memory of the counters of the queues.
    pub fn counters(&self) -> Option<&CounterFile> {
        self.counters.as_ref().map(|(_, counters)| counters)
    }

    /// Returns what is known of the process.
    #[must_use]
    pub const fn process(&self) -> &ProcessStatus {
        &self.process
    }

    fn device(&self) -> String {
        record_name(self.config.addr)
    }

    /// Starts to open a disk, after the previous one is closed.
    fn begin(&mut self, told: &ToolstackBack) -> Result<(OpeningTask<OpenFiles>, Disk), Fault> {
        let disk = definition(told, &self.config.usual)?;
        let name = disk_name(told);
        let deadlines = Deadlines::of(disk.options.busy_timeout.unwrap_or(BUSY));
        let environment = self.config.environment.clone();
        let (records, fenced) = (environment.records.clone(), name.clone());
        let mapped = std::mem::take(&mut self.mapped_before);
        let fence = move || {
            if let Some(dir) = records {
                // The process of the session holds the fence; the supervisor never does.
                drop(pass_fence(&dir, &fenced, deadlines.fence)?);
            }
            if mapped {
                // A frontend that finds a page still mapped after the response disables the disk
                // (XSA-396).
                std::thread::sleep(UNMAPPING);
            }
            Ok(())
        };
        let (device, opened) = (told.physical_device_path.clone(), disk.clone());
        let open = move |(): &()| {
            OpenFiles::open(&environment, backed_by(opened.clone(), device.as_ref()))
        };
        self.fenced = Some(name.clone());
        let before = (self.open.take(), self.plan.take());
        let wake = Arc::clone(&self.wake);
        Ok((OpeningTask::begin(&name, deadlines, before, fence, open, wake)?, disk))
    }

    fn opened(&mut self, disk: Disk, open: OpenFiles) -> Geometry {
        let geometry = open.image.geometry;
        (self.disk, self.open) = (Some(disk), Some(open));
        self.flush_failed = false;
        self.size = ImageSize::new(Arc::clone(&self.unsized_images));
        geometry
    }

    /// Returns the geometry of a disk that the process of an earlier supervisor has open.
    fn found_open(&mut self, disk: &Disk) -> Option<Geometry> {
        let Search::Known(known) = &mut self.search else { return None };
        let identity = known.session.as_ref().filter(|identity| identity.disk.spec == disk.spec)?;
        let open =
            OpenFiles { disk: identity.disk.clone(), image: identity.image.clone(), files: None };
        if let Some(file) = known.descriptors.pop() {
            self.counters = CounterFile::read(file).ok();
        }
        Some(self.opened(disk.clone(), open))
    }

    /// Returns memory for the counters of a number of queues, and of the disk after them.
    fn counters_for(&mut self, queues: usize) -> io::Result<(OwnedFd, CounterFile)> {
        let fits = |(_, counters): &&(OwnedFd, CounterFile)| counters.queues() > queues;
        if self.counters.as_ref().filter(fits).is_none() {
            let (file, counters) = CounterFile::create(queues + 1)?;
            if let Some((_, before)) = &self.counters {
                (0..before.queues() - 1)
                    .for_each(|queue| counters.publish(queue, before.words(queue)));
            }
            self.counters = Some((file, counters));
        }
        let Some((file, counters)) = &self.counters else {
            return Err(io::ErrorKind::NotFound.into());
        };
        Ok((file.try_clone()?, counters.clone()))
    }

    /// Connects to the server of the disk, for its process.
    fn redial(&mut self) {
        let spec = self.open.as_ref().map(|open| open.disk.storage_spec());
        if let Some(spec) = spec.as_ref().and_then(Spec::server) {
            self.dialing.begin(spec.server.clone(), Arc::clone(&self.wake));
        }
    }

    fn is_raw(&self) -> bool {
        let raw =
            |disk: &Disk| matches!(disk.storage_spec(), Spec::File { format: Format::Raw, .. });
        self.disk.as_ref().is_some_and(raw)
    }
}

impl<P> Drop for RemoteDisk<P> {
    fn drop(&mut self) {
        if let (Some(records), Some(disk)) = (self.records.dir(), &self.fenced) {
            remove_fence(records, disk);
        }
    }
}

impl<P> VbdServer for RemoteDisk<P>
where
    P: DevicePlatform + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    type Session = Supervised<DiskPlan<P>>;

    fn configure(&mut self, told: &ToolstackBack, usual: Config) -> Result<Config, Fault> {
        let disk = definition(told, &self.config.usual)?;
        let config = disk.options.config(usual);
        self.disk = Some(disk);
        Ok(config)
    }

    fn open(&mut self, told: &ToolstackBack) -> Result<Geometry, Fault> {
        let (mut opening, disk) = self.begin(told)?;
        let open = opening.wait()?;
        Ok(self.opened(disk, open))
    }

    fn poll_open(&mut self, told: &ToolstackBack) -> Result<Opening, Fault> {
        let (mut opening, disk) = match self.opening.take() {
            Some(begun) => begun,
            None => {
                let (device, environment) = (self.device(), &self.config.environment);
                let found =
                    self.search.poll(&device, &environment.found, &environment.hub, &self.wake);
                if found.is_pending() {
                    return Ok(Opening::Pending);
                }
                let disk = definition(told, &self.config.usual)?;
                if let Some(geometry) = self.found_open(&disk) {
                    return Ok(Opening::Done(geometry));
                }
                if let Search::Known(known) = std::mem::replace(&mut self.search, Search::Over) {
                    tracing::warn!(
                        device,
                        pid = known.process.pid(),
                        "the device process serves another disk: it is replaced"
                    );
                    known.process.kill();
                }
                self.begin(told)?
            }
        };
        match opening.poll() {
            Poll::Ready(open) => Ok(Opening::Done(self.opened(disk, open?))),
            Poll::Pending => {
                let busy = opening.busy();
                self.opening = Some((opening, disk));
                Ok(busy.map_or(Opening::Pending, Opening::Busy))
            }
        }
    }

    fn close(&mut self) -> Poll<()> {
        self.opening = None;
        // A process of an earlier supervisor that is not continued must end: it holds the fence.
        let (device, environment) = (self.device(), &self.config.environment);
        let found = self.search.poll(&device, &environment.found, &environment.hub, &self.wake);
        if found.is_pending() {
            return Poll::Pending;
        }
        if let Search::Known(known) = std::mem::replace(&mut self.search, Search::Over) {
            known.process.kill();
        }
        if let Some(open) = self.open.take() {
            let (plan, wake) = (self.plan.take(), Arc::clone(&self.wake));
            // The last descriptor of a file may block for as long as its storage does.
            self.closing =
                Task::spawn("close-disk", move || drop((open, plan)), move || wake()).ok();
        }
        if self.closing.as_mut().is_some_and(|closing| closing.poll().is_pending()) {
            return Poll::Pending;
        }
        self.closing = None;
        Poll::Ready(())
    }

    fn refresh(&mut self, told: &ToolstackBack) -> Result<(), Fault> {
        let disk = definition(told, &self.config.usual)?;
        if self.open.is_none() {
            return Ok(());
        }
        if let Some(before) = &mut self.disk {
            change_live(&mut before.options, &disk.options);
        }
        if let Some(plan) = &self.plan {
            let mut state = plan.state();
            state.options = disk.options.clone();
            state.changed.push(DiskChange::Options(Box::new(disk.options)));
        }
        Ok(())
    }

    fn flush_failed(&self) -> bool {
        self.flush_failed
    }

    fn is_paused(&self) -> bool {
        self.paused
    }

    fn look_up_size(&mut self) {
        if !self.is_raw() {
            return;
        }
        let files = self.open.as_ref().and_then(|open| open.files.as_ref());
        let Some(fd) = files.and_then(|files| files.descriptors().next()) else { return };
        // If no descriptor is free now, the next look-up may have one.
        if let Ok(file) = fd.try_clone_to_owned() {
            let wake = Arc::clone(&self.wake);
            self.size.look_up(File::from(file), move || wake());
        }
    }

    fn sectors(&mut self) -> Option<u64> {
        let unit = u64::from(self.open.as_ref()?.image.geometry.sector_size);
        Some(self.size.bytes()? / unit * (unit / 512))
    }

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn resumable(&mut self, session: &SessionIdentity) -> Result<(), Fault> {
        let (device, len) = (record_name(session.addr), session.record_len()?);
        let record = self.records.copy(&device, len).map_err(|e| Fault::of(e.code(), &e))?;
        self.mapped_before = P::UNMAPS_LATE && session::maps_requests(session, record)?;
        Ok(())
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let Some(open) = self.open.clone() else {
            return Err(Fault::new("image-missing", "no image is open"));
        };
        if let Some(files) = self.open.as_mut().and_then(|open| open.files.as_mut()) {
            // The process owns the connection to the server.
            *files = files.lasting();
        }
        // A connection that an earlier session asked for may be one to another server.
        self.dialing = Dialing::default();
        let failed = |e: io::Error| {
            Fault::new("device-process", format!("the counters' memory cannot be created: {e}"))
        };
        let counters = self.counters_for(spec.identity.queues.len()).map_err(failed)?;
        let options = self.disk.as_ref().map(|disk| disk.options.clone()).unwrap_or_default();
        let name = self.fenced.clone().unwrap_or_else(|| spec.disk_name());
        let trace = options.trace.as_ref();
        let trace = trace.map(|path| TraceFile::create(path, &open.disk.spec, &name)).transpose();
        let plan = Arc::new(DiskPlan {
            platform: self.platform.clone(),
            environment: self.config.environment.clone(),
            spec: spec.clone(),
            name,
            counters,
            records: self.records.clone(),
            cached_mappings: self.config.cached_mappings,
            trace: trace.map_err(|e| Fault::of(e.code(), &e))?,
            state: Mutex::new(PlanState {
                open,
                options,
                sectors: spec.geometry.sectors,
                mapped_before: false,
                unmapping: Duration::ZERO,
                flush_failed: self.flush_failed,
                changed: Vec::new(),
                connection: None,
            }),
        });
        self.plan = Some(Arc::clone(&plan));
        let (device, environment) = (self.device(), &self.config.environment);
        let wake = Arc::clone(&self.wake);
        if let Search::Known(known) = std::mem::replace(&mut self.search, Search::Over) {
            let is_same = known.session.is_some_and(|identity| identity.session == spec.identity);
            if is_same && begin == Begin::Resumed {
                tracing::info!(device, pid = known.process.pid(), "device process found");
                plan.state().mapped_before = P::UNMAPS_LATE && spec.data_path == DataPath::Map;
                return Supervised::adopt(&device, environment, plan, known.process, wake);
            }
            known.process.kill();
        }
        let start = match begin {
            Begin::New => Start::New,
            Begin::Resumed => Start::Resumed,
            Begin::Again => Start::Again,
        };
        Supervised::start(&device, environment, plan, start, wake)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        let (device, mut redial) = (self.device(), false);
        let (flush_failed, process) = (&mut self.flush_failed, &mut self.process);
        let paused = &mut self.paused;
        let polled = session.poll(&mut |message: Message<DiskPlan<P>>| match message {
            FromDevice::FlushFailed => *flush_failed = true,
            FromDevice::Paused(now) => *paused = now,
            FromDevice::Confined(applied) => {
                // The first message of a process, which then reports whether it is paused.
                *paused = false;
                process.set_applied(&device, applied);
            }
            FromDevice::Redial => redial = true,
            _ => {}
        });
        if redial {
            self.redial();
        }
        if let Some(outcome) = self.dialing.poll() {
            let mut state = session.session().state();
            let error = outcome.as_ref().err().map(io::Error::to_string);
            state.connection = outcome.ok();
            state.changed.push(DiskChange::Connection(error));
            // It is sent in the next step.
            (self.wake)();
        }
        self.process.set_process(session.pid(), session.replaced());
        polled
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        let failed = self.flush_failed;
        let fault = self.ready(session).err();
        if self.flush_failed && !failed {
            session.session().state().flush_failed = true;
        }
        fault
    }

    fn resize(&mut self, session: &mut Self::Session, sectors: u64) {
        let mut state = session.session().state();
        state.sectors = sectors;
        state.changed.push(DiskChange::Resize(sectors));
        drop(state);
        (self.wake)();
    }

    fn abandon(&mut self, session: &mut Self::Session) {
        let mut state = session.session().state();
        if !state.changed.contains(&DiskChange::Abandoned) {
            state.changed.push(DiskChange::Abandoned);
        }
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn leave(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.leave();
        Poll::Ready(())
    }

    fn end(&mut self, device: DeviceAddr) {
        self.records.remove(&record_name(device));
    }
}
