//! Link to a tap, whose carrier shows whether a guest is connected.
#![forbid(unsafe_code)]

use super::{LinkDescription, LinkOps, LinkParams, WorkerSetup, not_open};
use crate::host::config::bridge_and_options;
use crate::tap::{Tap, TapConfig, TapPort, TapQueues};
use crate::worker::Worker;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::BackendPlatform;
use pvio_netback::session::SessionConfig;
use pvio_netback::vif::Attach;
use pvio_ring::error::Report;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::LogLimit;
use pvio_xenbus::driver::Fault;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// Rate limits of log lines. They belong to the vif, so that they count over all its links.
#[derive(Clone, Default)]
pub(in crate::host) struct TapEvents {
    /// The tap could not be reset after a session.
    changed: Arc<LogLimit>,
    /// The carrier could not be set.
    carrier: Arc<LogLimit>,
}

impl TapEvents {
    /// Returns the counts, by name.
    pub fn named(&self) -> [(&'static str, Arc<LogLimit>); 2] {
        [
            ("taps-changed", Arc::clone(&self.changed)),
            ("carrier-not-set", Arc::clone(&self.carrier)),
        ]
    }
}

/// Link to a tap.
pub(in crate::host) struct TapLink {
    queues: TapQueues,
    carrier: Arc<Carrier>,
    changed: Arc<LogLimit>,
}

impl TapLink {
    /// Creates a tap.
    pub fn create(params: &LinkParams) -> Result<Self, Fault> {
        Self::new(TapQueues::create_once_free(&config(params), params.queues)?, params)
    }

    /// Opens the existing tap of that name.
    pub fn open(name: &str, params: &LinkParams) -> Result<Self, Fault> {
        let netns = params.options.netns.as_deref();
        Self::new(TapQueues::open(name, netns, params.queues)?, params)
    }

    /// Returns the link to a tap whose queues another process opened.
    pub fn from_opened(queues: Vec<OwnedFd>, mtu: u32) -> Result<Self, Fault> {
        let queues = queues.into_iter().map(|queue| Tap::from_opened(queue, mtu));
        let queues = TapQueues::from_opened(queues.collect::<Result<_, _>>()?)?;
        let carrier = Carrier::new(queues.first(), &TapEvents::default())?;
        Ok(Self { queues, carrier, changed: Arc::default() })
    }

    fn new(queues: TapQueues, params: &LinkParams) -> Result<Self, Fault> {
        let carrier = Carrier::new(queues.first(), &params.tap_events)?;
        // Without a guest.
        carrier.set_connected(false);
        Ok(Self { queues, carrier, changed: Arc::clone(&params.tap_events.changed) })
    }
}

/// Returns the configuration of a new tap.
fn config(params: &LinkParams) -> TapConfig {
    let LinkParams { vif, config, options, .. } = params;
    let mut tap = TapConfig::new(params.name.as_str());
    tap.netns.clone_from(&options.netns);
    tap.mtu = vif.mtu.unwrap_or(tap.mtu);
    tap.multi_queue = params.queues > 1;
    match params.attach {
        Attach::ByScript => tap.up = false,
        Attach::Here => {
            let name = vif.vifname.clone().or_else(|| config.name.clone());
            tap.name = name.unwrap_or(tap.name);
            let default = || options.bridge.clone().or_else(|| config.bridge.clone());
            tap.bridge = bridge_and_options(vif).0.map(String::from).or_else(default);
            tap.address = config.address;
        }
    }
    tap
}

impl LinkOps for TapLink {
    fn hand_over(&mut self) -> Result<Option<(LinkDescription, Vec<OwnedFd>)>, Fault> {
        let queues = self.queues.all();
        let mtu = queues.first().ok_or_else(not_open)?.mtu();
        let description = LinkDescription::Tap { mtu, queues: queues.len() };
        let queues = queues.iter().map(|queue| Ok(queue.try_clone()?.into_fd()));
        Ok(Some((description, queues.collect::<Result<_, Fault>>()?)))
    }

    fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault> {
        self.queues.use_queues(session.queues)?;
        let tap = self.queues.first().ok_or_else(not_open)?;
        Ok(tap.set_unsegmented(session.features.gso_v4, session.features.gso_v6)?)
    }

    fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        let tap = self.queues.get(setup.index).ok_or_else(not_open)?.try_clone()?;
        let carrier = Arc::clone(&self.carrier);
        let port = move |stats: &_| TapPort::new(tap, Arc::clone(stats));
        setup.spawn(port, move |stalled| carrier.set_stalled(stalled))
    }

    fn started(&mut self) {
        self.carrier.set_connected(true);
    }

    fn stopped(&mut self) {
        self.carrier.set_connected(false);
        let segmented = self.queues.first().map_or(Ok(()), |tap| tap.set_unsegmented(false, false));
        // Another process may have changed it.
        let one = self.queues.count_in_use().and_then(|()| self.queues.use_queues(1));
        if let Err(error) = one.and(segmented)
            && let Some(unlogged) = self.changed.admit()
        {
            // The next session sets both again and reports an error if that fails.
            tracing::debug!(error = %Report(&error), unlogged, "the tap cannot be reset after a session");
        }
    }
}

impl Drop for TapLink {
    fn drop(&mut self) {
        // The kernel removes the tap when its last handle is closed.
        self.carrier.close();
    }
}

/// Carrier of the interface, which shows whether its packets are received.
struct Carrier {
    state: Mutex<CarrierState>,
    /// Rate limit of the log lines for failures.
    failures: Arc<LogLimit>,
}

#[derive(Default)]
struct CarrierState {
    tap: Option<Tap>,
    /// Whether a guest is connected.
    connected: bool,
    /// Number of queues that have stalled. The host does not know which queue a packet would take,
    /// so a single stalled queue turns the carrier off (as in Linux).
    stalled: usize,
}

impl Carrier {
    /// Returns the carrier of an interface, without changing it.
    fn new(tap: Option<&Tap>, events: &TapEvents) -> Result<Arc<Self>, Fault> {
        let tap = tap.map(Tap::try_clone).transpose()?;
        let state = Mutex::new(CarrierState { tap, ..CarrierState::default() });
        Ok(Arc::new(Self { state, failures: Arc::clone(&events.carrier) }))
    }

    /// Closes the interface.
    fn close(&self) {
        self.change(|state| *state = CarrierState::default());
    }

    /// Sets whether a guest is connected.
    fn set_connected(&self, connected: bool) {
        self.change(|state| (state.connected, state.stalled) = (connected, 0));
    }

    /// Reports that a queue has stalled, or is ready again.
    fn set_stalled(&self, stalled: bool) {
        self.change(|state| {
            let count = state.stalled;
            state.stalled = if stalled { count.saturating_add(1) } else { count.saturating_sub(1) };
        });
    }

    fn change(&self, change: impl FnOnce(&mut CarrierState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let on = state.connected && state.stalled == 0;
        if let Some(tap) = &state.tap
            && let Err(error) = tap.set_carrier(on)
            && let Some(unlogged) = self.failures.admit()
        {
            // Older kernels do not support it; the host then always sees a carrier.
            tracing::debug!(tap = tap.name(), error = %Report(&error), unlogged, "the carrier cannot be set");
        }
    }
}
