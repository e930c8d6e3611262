//! Serves a vbd in this process: opens its image, and starts its sessions.

use super::definition::{backed_by, change_live, definition, disk_name};
use super::disk::OpenDisk;
use super::groups::Groups;
use super::opening::{self, BUSY, Deadlines, OpeningTask};
use super::queues::ImageQueues;
use super::{fence, fence::UNMAPPING};
use crate::budgets::MappingBudgets;
use crate::engine::Geometry;
use crate::engine::offload::BudgetUsage;
use crate::image::{Disk, DiskOptions};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use pvio_blkback::session::{
    self, Begin, Session, SessionIdentity, SessionParts, SessionSpec, record_name,
};
use pvio_blkback::vbd::{Opening, VbdServer};
use pvio_blkback::{Config, Stats};
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::policy::MappingBudget;
use pvio_recordfile::{RecordDir, RecordFile, RecordStore};
use pvio_runtime::{LogLimit, Notify, Task};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vbd::ToolstackBack;
use std::os::fd::{AsFd, OwnedFd};

/// Serves a vbd from the disk image that its `params` name, in this process.
pub struct ImageServer<P> {
    platform: P,
    /// Default options of disks.
    usual: DiskOptions,
    groups: Groups,
    budgets: MappingBudgets,
    wake: Notify,
    records: RecordStore,
    /// The in-flight record of the session that was started last, until it ends.
    record: Option<RecordFile>,
    /// Counters of each queue, over all sessions.
    stats: Vec<Arc<Stats>>,
    /// Whether pages that an earlier process mapped for single requests may still be mapped.
    mapped_before: bool,
    /// The disk whose fence exists.
    fenced: Option<String>,
    /// The disk's definition in effect, once it is known.
    disk: Option<Disk>,
    /// The open disk, and the budget of cached mappings of its guest.
    open: Option<(Arc<OpenDisk>, Arc<MappingBudget>)>,
    /// The disk being opened, and its definition.
    pending: Option<(OpeningTask<OpenDisk>, Disk)>,
    closing: Option<Task<()>>,
    /// Count of failures to determine the image's size.
    unsized_images: Arc<LogLimit>,
}

impl<P> ImageServer<P> {
    /// Creates a server. `wake` is called, on any thread, when an event occurs that the driver
    /// waits for, or when a worker ends because of a fault. The driver must then be stepped.
    pub fn new(platform: P, wake: Notify) -> Self {
        Self::with(platform, DiskOptions::default(), Groups::default(), wake)
    }

    /// Creates a server with default options for its disk, and with limits that disks can share.
    pub fn with(platform: P, usual: DiskOptions, groups: Groups, wake: Notify) -> Self {
        Self {
            platform,
            usual,
            groups,
            budgets: MappingBudgets::default(),
            wake,
            records: RecordStore::default(),
            record: None,
            stats: Vec::from([Arc::default()]),
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

    /// Sets whether pages that an earlier process mapped for single requests may still be mapped.
    pub fn set_mapped_before(&mut self, mapped: bool) {
        self.mapped_before = mapped;
    }

    /// Returns the rate-limited log events of the disk, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events =
            Vec::from([("size-unknown", Arc::clone(&self.unsized_images)), self.records.event()]);
        events.extend(self.open_disk().iter().flat_map(|open| open.events()));
        events
    }

    /// Returns the open disk.
    pub fn open_disk(&self) -> Option<&Arc<OpenDisk>> {
        self.open.as_ref().map(|(open, _)| open)
    }

    /// Returns the usage of the budgets of the open disk.
    pub fn load(&self) -> Option<&Arc<BudgetUsage>> {
        self.open_disk().map(|open| open.load())
    }

    /// Returns the budget of cached mappings of the guest; `None` before the disk is opened.
    pub fn mapping_budget(&self) -> Option<&Arc<MappingBudget>> {
        self.open.as_ref().map(|(_, budget)| budget)
    }

    /// Starts to open a disk, after the previous one is closed.
    fn begin(&mut self, told: &ToolstackBack) -> Result<(OpeningTask<OpenDisk>, Disk), Fault> {
        let disk = definition(told, &self.usual)?;
        let name = disk_name(told);
        let busy = disk.options.busy_timeout.unwrap_or(BUSY);
        let (groups, named) = (self.groups.clone(), name.clone());
        let (device, opened) = (told.physical_device_path.clone(), disk.clone());
        let deadlines = Deadlines::of(busy);
        let (records, fenced) = (self.records.dir().cloned(), name.clone());
        let mapped = self.mapped_before;
        let fence = move || {
            let fence =
                records.map(|dir| fence::pass_fence(&dir, &fenced, deadlines.fence)).transpose()?;
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
            opening::open(&disk, &groups, fence.as_ref(), Arc::clone(&unsized_images), &named)
                .map_err(Into::into)
        };
        self.fenced = Some(name.clone());
        let (before, wake) = (self.open.take().map(|(open, _)| open), Arc::clone(&self.wake));
        Ok((OpeningTask::begin(&name, deadlines, before, fence, open, wake)?, disk))
    }

    fn opened(&mut self, told: &ToolstackBack, disk: Disk, open: OpenDisk) -> Geometry {
        let geometry = open.geometry();
        let wake = Arc::clone(&self.wake);
        open.flush_state().on_failure(move || wake());
        let wake = Arc::clone(&self.wake);
        open.image().pauses().on_change(move || wake());
        let budget = self.budgets.guest(told.frontend_id);
        (self.disk, self.open) = (Some(disk), Some((Arc::new(open), budget)));
        // An image that is opened later was not open in the earlier process.
        self.mapped_before = false;
        geometry
    }

    /// Returns memory for the in-flight record of a session.
    fn record(&self, identity: &SessionIdentity, begin: Begin) -> Result<RecordFile, Fault> {
        if begin == Begin::Again {
            let missing = || Fault::new("record-missing", "the session was not started before");
            return self.record.clone().ok_or_else(missing);
        }
        let (device, len) = (record_name(identity.addr), identity.record_len()?);
        let record = self.records.open(&device, len, begin == Begin::Resumed);
        record.map_err(|e| Fault::of(e.code(), &e))
    }
}

impl<P> Drop for ImageServer<P> {
    fn drop(&mut self) {
        self.open = None;
        if let (Some(records), Some(disk)) = (self.records.dir(), &self.fenced) {
            fence::remove_fence(records, disk);
        }
    }
}

impl<P: BackendPlatform<Channel: AsFd> + Send + 'static> VbdServer for ImageServer<P> {
    type Session = Session<P, RecordFile, ImageQueues>;

    fn configure(&mut self, told: &ToolstackBack, usual: Config) -> Result<Config, Fault> {
        let disk = definition(told, &self.usual)?;
        let config = disk.options.config(usual);
        self.disk = Some(disk);
        Ok(config)
    }

    fn open(&mut self, told: &ToolstackBack) -> Result<Geometry, Fault> {
        let (mut pending, disk) = self.begin(told)?;
        let open = pending.wait()?;
        Ok(self.opened(told, disk, open))
    }

    fn poll_open(&mut self, told: &ToolstackBack) -> Result<Opening, Fault> {
        let (mut pending, disk) = match self.pending.take() {
            Some(begun) => begun,
            None => self.begin(told)?,
        };
        match pending.poll() {
            Poll::Ready(open) => Ok(Opening::Done(self.opened(told, disk, open?))),
            Poll::Pending => {
                let busy = pending.busy();
                self.pending = Some((pending, disk));
                Ok(busy.map_or(Opening::Pending, Opening::Busy))
            }
        }
    }

    fn close(&mut self) -> Poll<()> {
        self.pending = None;
        if let Some((open, _)) = self.open.take() {
            self.closing = opening::close(open, Arc::clone(&self.wake));
        }
        if self.closing.as_mut().is_some_and(|closing| closing.poll().is_pending()) {
            return Poll::Pending;
        }
        self.closing = None;
        Poll::Ready(())
    }

    fn refresh(&mut self, told: &ToolstackBack) -> Result<(), Fault> {
        let disk = definition(told, &self.usual)?;
        let Some((open, _)) = &self.open else { return Ok(()) };
        if let Some(before) = &mut self.disk {
            change_live(&mut before.options, &disk.options);
        }
        open.refresh(&disk.options);
        Ok(())
    }

    fn flush_failed(&self) -> bool {
        self.open_disk().is_some_and(|open| open.flush_state().has_failed())
    }

    fn is_paused(&self) -> bool {
        self.open_disk().is_some_and(|open| open.image().pauses().is_paused())
    }

    fn look_up_size(&mut self) {
        if let Some(open) = self.open_disk() {
            open.look_up_size(Arc::clone(&self.wake));
        }
    }

    fn sectors(&mut self) -> Option<u64> {
        self.open_disk()?.sectors()
    }

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn resumable(&mut self, session: &SessionIdentity) -> Result<(), Fault> {
        let record = self.record(session, Begin::Resumed)?;
        self.mapped_before = session::maps_requests(session, record)?;
        Ok(())
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let record = self.record(&spec.identity, begin)?;
        self.record = Some(record.clone());
        let Some((open, budget)) = &self.open else {
            return Err(Fault::new("image-missing", "no image is open"));
        };
        while self.stats.len() < spec.identity.queues.len() {
            self.stats.push(Arc::default());
        }
        let parts = SessionParts {
            platform: self.platform.clone(),
            record,
            flush_state: Arc::clone(open.flush_state()),
            mapping_budget: Arc::clone(budget),
            stats: self.stats.clone(),
            queues: ImageQueues::new(Arc::clone(open), Arc::clone(&self.wake)),
        };
        Session::start(spec, begin, parts)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        session.ready()
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        session.fault()
    }

    fn resize(&mut self, session: &mut Self::Session, sectors: u64) {
        session.resize(sectors);
    }

    fn abandon(&mut self, _: &mut Self::Session) {
        self.open_disk().into_iter().for_each(|open| open.abandon());
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn end(&mut self, device: DeviceAddr) {
        if let Some(record) = self.record.take() {
            session::invalidate(&record);
        }
        self.records.remove(&record_name(device));
    }
}
