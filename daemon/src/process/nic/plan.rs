//! What a process of a session is started with.

use super::super::messages::{Descriptor, Start};
use super::super::resources::{copy, open_platform, open_record};
use super::super::supervised::{Environment, Launch, Session};
use super::capture::CapturePoint;
use super::{NicChange, NicIdentity, NicServe};
use pvio_confinement::ProcessKind;
use pvio_event_channel::{DevicePlatform, DeviceScope, Port};
use pvio_netback::queue::EventPorts;
use pvio_netback::session::{SessionSpec, record_name};
use pvio_ports::host::OpenLink;
use pvio_ports::settings::WrapperSettings;
use pvio_recordfile::RecordStore;
use pvio_xenbus::driver::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A session, and what its processes are started with.
pub struct NicPlan<P> {
    pub(super) platform: P,
    pub(super) environment: Environment,
    pub(super) spec: SessionSpec,
    pub(super) link: OpenLink,
    pub(super) counters: OwnedFd,
    pub(super) records: RecordStore,
    pub(super) capture: CapturePoint,
    pub(super) state: Mutex<PlanState>,
}

/// What changes while the session is served.
pub(super) struct PlanState {
    /// The session, with the values in force.
    pub spec: SessionSpec,
    pub settings: WrapperSettings,
    /// Changes that the process does not know.
    pub changed: Vec<NicChange>,
}

impl<P> NicPlan<P> {
    /// Changes the state, and tells the process.
    pub(super) fn change(&self, change: NicChange) {
        let mut state = self.state();
        match &change {
            NicChange::Settings(settings) => state.settings = (**settings).clone(),
            NicChange::Rate(rate) => state.spec.rate = *rate,
            NicChange::FilterGroups(chosen) => state.spec.filter_groups = *chosen,
            NicChange::Headroom(bytes) => state.spec.headroom = *bytes,
            NicChange::Capture(_) => {}
        }
        state.changed.push(change);
    }

    fn state(&self) -> MutexGuard<'_, PlanState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the ports of the frontend that a session binds.
fn ports(spec: &SessionSpec) -> Vec<Port> {
    let of_queues = spec.queues.iter().flat_map(|queue| match queue.events {
        EventPorts::Shared(port) => vec![port],
        EventPorts::Split { tx, rx } => vec![tx, rx],
    });
    of_queues.chain(spec.control.map(|control| control.event)).collect()
}

impl<P> Session for NicPlan<P>
where
    P: DevicePlatform + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    const COMMAND: &str = super::COMMAND;
    type Serve = NicServe<P::Description>;
    type Change = NicChange;
    type Identity = NicIdentity;

    /// Its I/O uses memory of the process only, so what outlives the process reaches no page of the
    /// guest.
    fn fence(&self) -> Option<String> {
        None
    }

    fn survives(&self) -> bool {
        true
    }

    fn settings(&self) -> Vec<NicChange> {
        let mut state = self.state();
        state.changed.clear();
        let PlanState { spec, settings, .. } = &*state;
        let mut all = vec![
            NicChange::Settings(Box::new(settings.clone())),
            NicChange::Rate(spec.rate),
            NicChange::FilterGroups(spec.filter_groups),
            NicChange::Headroom(spec.headroom),
        ];
        all.extend(self.capture.tell(true).map(NicChange::Capture));
        all
    }

    fn changed(&self) -> Vec<NicChange> {
        let mut changed = std::mem::take(&mut self.state().changed);
        changed.extend(self.capture.tell(false).map(NicChange::Capture));
        changed
    }

    fn descriptors(&self, change: &NicChange) -> Vec<OwnedFd> {
        match change {
            NicChange::Capture(_) => self.capture.sender().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    fn launch(
        &self,
        start: Start,
        _fence: Option<OwnedFd>,
        _io: Option<Duration>,
    ) -> Result<Launch<Self::Serve>, Fault> {
        let (spec, settings) = {
            let state = self.state();
            (state.spec.clone(), state.settings.clone())
        };
        let (link, queues) = self.link.hand_over()?.ok_or_else(|| {
            Fault::new("nic-descriptors", "the NIC's port cannot be moved into another process")
        })?;
        let ports = ports(&self.spec);
        let scope = DeviceScope {
            frontend: spec.addr.front,
            queues: spec.queues.len(),
            channels: ports.len(),
            ports: Some(ports),
        };
        let (platform, fds) = open_platform(&self.platform, &scope)?;
        let record = open_record(&self.records, &record_name(spec.addr), spec.record_len(), start)?;
        let mut descriptors = vec![record, (Descriptor::Counters, copy(&self.counters)?)];
        descriptors.extend(fds);
        descriptors.extend(queues.into_iter().map(|queue| (Descriptor::Link, queue)));
        let confined = self.environment.confinement.of(ProcessKind::Nic);
        let serve = NicServe { start, spec, link, settings, platform, confined };
        Ok(Launch { descriptors, serve })
    }
}
