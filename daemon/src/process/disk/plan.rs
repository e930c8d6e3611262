//! What a process of a session is started with.

use super::super::helper;
use super::super::messages::{Descriptor, Start};
use super::super::supervised::{Environment, Launch, Session};
use super::{DiskChange, DiskIdentity, DiskServe};
use pvio_blkback::path::DataPath;
use pvio_blkback::session::{SessionSpec, record_name};
use pvio_confinement::ProcessKind;
use pvio_event_channel::{DeviceDescriptors, DevicePlatform, DeviceScope, Port};
use pvio_recordfile::{CounterFile, RecordError, RecordStore};
use pvio_storage::engine::nbd::Network;
use pvio_storage::host::{TraceFile, UNMAPPING, fence_name};
use pvio_storage::image::{Disk, DiskDescription, DiskOptions, HandedFiles, Spec};
use pvio_xenbus::driver::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bound of the time after which the supervisor notices the death of a process: it waits for
/// nothing else.
const NOTICING: Duration = Duration::from_millis(500);
/// Lateness of the timers in the bound of [`UNMAPPING`], and the term of that bound that is constant.
const LATENESS: Duration = Duration::from_millis(25);

/// Returns how long pages of a dead process may stay mapped after its I/O has ended, which took `io`
/// after its death was noticed: less than √(10 ms · t) + 5 ms, and two jiffies ([`UNMAPPING`]).
fn unmapping_after(io: Duration) -> Duration {
    let total = (io + NOTICING).as_secs_f64();
    (Duration::from_secs_f64((0.010 * total).sqrt()) + LATENESS).min(UNMAPPING)
}

/// The files of an open disk, and what it consists of.
#[derive(Debug, Clone)]
pub struct OpenFiles {
    /// The definition, with the path of the device that a script has created.
    pub disk: Disk,
    /// Geometry and records.
    pub image: DiskDescription,
    /// The descriptors; `None` if an earlier supervisor opened them.
    pub files: Option<HandedFiles>,
}

impl OpenFiles {
    /// Opens the files of a disk: those that the operator names here, the others by a confined
    /// helper. Connects to its server, with which the helper speaks. Blocks.
    ///
    /// # Errors
    /// Any of opening an image.
    pub fn open(
        environment: &Environment,
        disk: Disk,
    ) -> Result<Self, pvio_storage::host::OpenFailure> {
        let named = HandedFiles::open_named(&disk)?.connected(&disk, &Network)?;
        let program = environment.program.with_command(helper::COMMAND);
        let resolved = helper::resolve_confined(&program, &environment.confinement, &disk, &named)?;
        let geometry = resolved.geometry;
        let files = named.lasting().with(resolved.files);
        let image = DiskDescription { geometry, files: Vec::new(), export: files.export() };
        Ok(Self { disk, image, files: Some(files) })
    }

    /// Returns whether the contents are those of memory, and end with the process.
    #[must_use]
    pub fn is_volatile(&self) -> bool {
        match self.disk.storage_spec() {
            Spec::Ram { bytes } => bytes > 0,
            Spec::Overlay(_) => true,
            _ => false,
        }
    }
}

/// A session, and what its processes are started with.
pub struct DiskPlan<P> {
    pub(super) platform: P,
    pub(super) environment: Environment,
    pub(super) spec: SessionSpec,
    pub(super) name: String,
    pub(super) counters: (OwnedFd, CounterFile),
    pub(super) records: RecordStore,
    pub(super) cached_mappings: usize,
    pub(super) trace: Option<TraceFile>,
    pub(super) state: Mutex<PlanState>,
}

/// What changes while the session is served.
pub(super) struct PlanState {
    pub open: OpenFiles,
    pub options: DiskOptions,
    pub sectors: u64,
    /// Whether pages of an earlier process may still be mapped.
    pub mapped_before: bool,
    /// How long they stay mapped after the I/O of their process.
    pub unmapping: Duration,
    /// Whether a flush of the open image has failed.
    pub flush_failed: bool,
    /// Changes that the process does not know.
    pub changed: Vec<DiskChange>,
    /// The connection of [`DiskChange::Connection`].
    pub connection: Option<OwnedFd>,
}

impl<P> DiskPlan<P> {
    pub(super) fn state(&self) -> MutexGuard<'_, PlanState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P> Session for DiskPlan<P>
where
    P: DevicePlatform + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    const COMMAND: &str = super::COMMAND;
    type Serve = DiskServe<P::Description>;
    type Change = DiskChange;
    type Identity = DiskIdentity;

    fn fence(&self) -> Option<String> {
        Some(fence_name(&self.name))
    }

    fn survives(&self) -> bool {
        !self.state().open.is_volatile()
    }

    fn settings(&self) -> Vec<DiskChange> {
        let mut state = self.state();
        state.changed.clear();
        // An earlier process asked for it.
        state.connection = None;
        vec![
            DiskChange::Options(Box::new(state.options.clone())),
            DiskChange::Resize(state.sectors),
        ]
    }

    fn changed(&self) -> Vec<DiskChange> {
        std::mem::take(&mut self.state().changed)
    }

    fn descriptors(&self, change: &DiskChange) -> Vec<OwnedFd> {
        match change {
            DiskChange::Connection(_) => self.state().connection.take().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    fn drained(&self) {
        // A request's pages are unmapped before its response.
        let mut state = self.state();
        (state.mapped_before, state.unmapping) = (false, Duration::ZERO);
    }

    fn launch(
        &self,
        start: Start,
        fence: Option<OwnedFd>,
        io: Option<Duration>,
    ) -> Result<Launch<Self::Serve>, Fault> {
        let mut open = self.state().open.clone();
        // A process without a connection to its server asks for one.
        let needs_files = open.image.export.is_none() || open.is_volatile();
        if open.files.is_none() && needs_files {
            open = OpenFiles::open(&self.environment, open.disk).map_err(|failed| failed.fault)?;
            self.state().open = open.clone();
        }
        let (options, sectors, unmapping, flush_failed) = {
            let mut state = self.state();
            let mapped = std::mem::replace(
                &mut state.mapped_before,
                // What this process maps may be mapped when its successor starts.
                P::UNMAPS_LATE && self.spec.data_path == DataPath::Map,
            );
            if mapped {
                // The process may have died before it served, and its predecessor after longer I/O.
                state.unmapping = state.unmapping.max(io.map_or(UNMAPPING, unmapping_after));
            }
            let unmapping = state.unmapping;
            (state.options.clone(), state.sectors, unmapping, state.flush_failed)
        };
        let device = record_name(self.spec.identity.addr);
        let len = self.spec.identity.record_len()?;
        let record = self.records.open_unmapped(&device, len, start != Start::New);
        let record = match record {
            Err(RecordError::Missing { .. }) if start == Start::ResumedOrNew => {
                self.records.open_unmapped(&device, len, false)
            }
            other => other,
        };
        let record = record.map_err(|e| Fault::of(e.code(), &e))?;
        let queues = &self.spec.identity.queues;
        let scope = DeviceScope {
            frontend: self.spec.identity.addr.front,
            queues: queues.len(),
            channels: queues.len(),
            ports: Some(queues.iter().map(|queue| Port(queue.event_channel)).collect()),
        };
        let platform = self.platform.device_descriptors(&scope);
        let DeviceDescriptors { description, fds } =
            platform.map_err(|e| Fault::of("device-platform", &e))?;
        let failed = |e: io::Error| {
            Fault::new("device-process", format!("a descriptor cannot be duplicated: {e}"))
        };
        let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map_err(failed);
        let mut descriptors =
            vec![(Descriptor::Record, record), (Descriptor::Counters, copy(&self.counters.0)?)];
        descriptors.extend(fence.map(|fence| (Descriptor::Fence, fence)));
        descriptors.extend(fds.into_iter().map(|fd| (Descriptor::Platform, fd)));
        let files = open.files.unwrap_or_default();
        // Replies to an earlier process arrive on its connections.
        let files = if start == Start::New {
            // A connection is closed when the process closes it.
            self.state().open.files = Some(files.lasting());
            files
        } else {
            files.lasting()
        };
        for (record, fd) in files.records().into_iter().zip(files.descriptors()) {
            descriptors.push((Descriptor::Image(record), copy(&fd)?));
        }
        let mut trace = None;
        if let Some(file) = &self.trace {
            descriptors.push((Descriptor::Trace, copy(&file.file)?));
            trace = Some((file.path.clone().into_os_string(), file.target.clone()));
        }
        let mut spec = self.spec.clone();
        spec.geometry.sectors = sectors;
        let serve = DiskServe {
            start,
            spec,
            disk: Disk { options, ..open.disk },
            image: open.image,
            platform: description,
            trace,
            cached_mappings: self.cached_mappings,
            unmapping,
            flush_failed,
            confined: self.environment.confinement.of(ProcessKind::Disk),
        };
        Ok(Launch { descriptors, serve })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the time from the end of the I/O to the check of Linux that finds it, of checks that
    /// are 5 ms, 10 ms, 15 ms and so on apart.
    fn found_after(io: Duration) -> Duration {
        let (mut at, mut age) = (Duration::ZERO, 1);
        while at < io {
            at += Duration::from_millis(5) * age;
            age += 1;
        }
        at - io
    }

    #[test]
    fn pages_are_unmapped_when_successor_serves() {
        for ms in 0..90_000 {
            let io = Duration::from_millis(ms);
            let bound = unmapping_after(io.saturating_sub(NOTICING));
            assert!(found_after(io) + Duration::from_millis(20) <= bound, "{ms} ms: {bound:?}");
        }
        assert!(unmapping_after(Duration::ZERO) < Duration::from_millis(100));
    }
}
