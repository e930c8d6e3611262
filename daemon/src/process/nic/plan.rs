//! What a process of a session is started with.

use super::super::child::Process;
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
    /// With what the process that runs was started; `None` if an earlier supervisor started it.
    pub launched: Option<(SessionSpec, WrapperSettings)>,
    /// The process of an earlier supervisor, which has been killed. The next one waits for its end.
    pub killed: Option<Process>,
    /// Changes that the process does not know.
    pub changed: Vec<NicChange>,
}

impl PlanState {
    /// Returns a state for a process that an earlier supervisor may have started.
    pub fn new(spec: SessionSpec, settings: WrapperSettings) -> Self {
        Self { spec, settings, launched: None, killed: None, changed: Vec::new() }
    }

    /// Returns all settings that the process may not have.
    fn settings(&mut self) -> Vec<NicChange> {
        self.changed.clear();
        let all = |(spec, settings): (SessionSpec, WrapperSettings)| {
            [
                NicChange::Settings(Box::new(settings)),
                NicChange::Rate(spec.rate),
                NicChange::FilterGroups(spec.filter_groups),
                NicChange::Headroom(spec.headroom),
            ]
        };
        let known: Vec<_> = self.launched.take().into_iter().flat_map(all).collect();
        let now = all((self.spec.clone(), self.settings.clone()));
        now.into_iter().filter(|change| !known.contains(change)).collect()
    }

    /// Returns whether a change changes nothing.
    fn has(&self, change: &NicChange) -> bool {
        match change {
            NicChange::Settings(settings) => **settings == self.settings,
            NicChange::Rate(rate) => *rate == self.spec.rate,
            NicChange::FilterGroups(chosen) => *chosen == self.spec.filter_groups,
            NicChange::Headroom(bytes) => *bytes == self.spec.headroom,
            NicChange::Capture(_) => false,
        }
    }
}

impl<P> NicPlan<P> {
    /// Changes the state, and tells the process.
    pub(super) fn change(&self, change: NicChange) {
        let mut state = self.state();
        if state.has(&change) {
            return;
        }
        match &change {
            NicChange::Settings(settings) => state.settings = (**settings).clone(),
            NicChange::Rate(rate) => state.spec.rate = *rate,
            NicChange::FilterGroups(chosen) => state.spec.filter_groups = *chosen,
            NicChange::Headroom(bytes) => state.spec.headroom = *bytes,
            NicChange::Capture(_) => {}
        }
        state.changed.push(change);
    }

    pub(super) fn state(&self) -> MutexGuard<'_, PlanState> {
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
        let mut all = self.state().settings();
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
        let killed = self.state().killed.take();
        if let Some(killed) = killed {
            killed.wait();
        }
        let (spec, settings) = {
            let mut state = self.state();
            let started = (state.spec.clone(), state.settings.clone());
            state.launched.insert(started).clone()
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

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_grant_table::DomId;
    use pvio_netback::queue::Policy;
    use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
    use pvio_xenbus::handshake::vif::{BackOffer, FrontRequest, Negotiated};

    fn state() -> PlanState {
        let addr = DeviceAddr::new(BackendKind::Vif, DomId(0), DomId(7), 0);
        let request = FrontRequest::default();
        let negotiated = Negotiated::new(&BackOffer::default(), &request);
        let spec = SessionSpec::new(addr, &request, &negotiated, Policy::Map);
        PlanState::new(spec, WrapperSettings::default())
    }

    #[test]
    fn process_that_was_started_with_settings_is_told_only_what_has_changed() {
        let mut state = state();
        state.launched = Some((state.spec.clone(), state.settings.clone()));
        state.spec.headroom = 64;
        assert_eq!(state.settings(), [NicChange::Headroom(64)]);
        state.launched = Some((state.spec.clone(), state.settings.clone()));
        assert!(state.settings().is_empty());
    }

    #[test]
    fn process_of_earlier_supervisor_is_told_all_settings() {
        assert_eq!(state().settings().len(), 4);
    }

    #[test]
    fn change_to_present_value_is_none() {
        let state = state();
        assert!(state.has(&NicChange::Headroom(state.spec.headroom)));
        assert!(!state.has(&NicChange::Headroom(state.spec.headroom + 1)));
        assert!(state.has(&NicChange::Settings(Box::new(state.settings.clone()))));
        assert!(!state.has(&NicChange::FilterGroups(!state.spec.filter_groups)));
    }
}
