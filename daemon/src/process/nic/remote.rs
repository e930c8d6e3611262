//! The supervisor's side of a NIC.

use super::super::child::Process;
use super::super::found::Search;
use super::super::messages::{FromDevice, Start};
use super::super::resources::CounterMemory;
use super::super::status::ProcessStatus;
use super::super::supervised::{Environment, Message, Supervised};
use super::capture::CapturePoint;
use super::plan::{NicPlan, PlanState};
use super::{NicChange, NicIdentity};
use pvio_event_channel::DevicePlatform;
use pvio_netback::queue::Policy;
use pvio_netback::session::{Begin, SessionSpec, check_record, record_name};
use pvio_netback::stats::Stats;
use pvio_netback::vif::{Attach, VifServer};
use pvio_ports::host::{LinkOpener, NicConfig, NicSettings};
use pvio_recordfile::{CounterFile, RecordStore};
use pvio_runtime::{LogLimit, Notify, Task};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{MAX_QUEUES, ToolstackBack, VifRate};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::{Arc, Mutex};
use std::task::Poll;

/// Serves a vif in a process of its own.
pub struct RemoteNic<P> {
    platform: P,
    addr: DeviceAddr,
    environment: Environment,
    wake: Notify,
    opener: LinkOpener,
    records: RecordStore,
    /// The process of an earlier supervisor.
    search: Search<NicIdentity>,
    /// Counters of each queue, over all sessions, where its process writes them.
    counters: CounterMemory,
    stats: Vec<Arc<Stats>>,
    /// Waits until the process of an earlier supervisor has ended, which was killed.
    ending: Option<Task<()>>,
    process: ProcessStatus,
    capture: CapturePoint,
    /// What the session in progress is started with.
    plan: Option<Arc<NicPlan<P>>>,
}

impl<P> RemoteNic<P> {
    /// Creates a server. `wake` is called, on any thread, when the driver must be stepped.
    pub fn new(
        platform: P,
        addr: DeviceAddr,
        (config, shared): (NicConfig, Arc<NicSettings>),
        environment: Environment,
        wake: Notify,
    ) -> Self {
        let opener = LinkOpener::new(config, Arc::clone(&wake)).within(shared);
        let queues = opener.max_queues().clamp(1, MAX_QUEUES);
        let records = environment.records.clone();
        let capture = CapturePoint::new(Arc::clone(&wake));
        Self {
            platform,
            addr,
            wake,
            opener,
            records: records.map(RecordStore::in_dir).unwrap_or_default(),
            environment,
            search: Search::Before,
            counters: CounterMemory::default(),
            stats: (0..queues).map(|_| Arc::default()).collect(),
            ending: None,
            process: ProcessStatus::default(),
            capture,
            plan: None,
        }
    }

    /// Returns the rate-limited log events of the NIC, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events = vec![self.records.event()];
        events.extend(self.opener.events());
        events
    }

    /// Returns the memory of the counters of the queues.
    pub fn counters(&self) -> Option<&CounterFile> {
        self.counters.file()
    }

    /// Returns why a vif cannot be served in a process of its own.
    ///
    /// # Errors
    /// A [`Fault`] if an option is invalid.
    pub fn bound_to_process(&self, vif: &ToolstackBack) -> Result<Option<&'static str>, Fault> {
        self.opener.bound_to_process(vif)
    }

    /// Returns what is known of the process.
    #[must_use]
    pub const fn process(&self) -> &ProcessStatus {
        &self.process
    }

    /// Returns the point at which the packets of the NIC are captured.
    #[must_use]
    pub const fn capture(&self) -> &CapturePoint {
        &self.capture
    }

    fn device(&self) -> String {
        record_name(self.addr)
    }

    /// Uses the link that the process of an earlier supervisor has open, if it is that of the vif.
    fn found_open(&mut self, vif: &ToolstackBack) -> Result<bool, Fault> {
        let Search::Known(known) = &mut self.search else { return Ok(false) };
        let Some(identity) = &known.session else { return Ok(false) };
        let mut descriptors = std::mem::take(&mut known.descriptors).into_iter();
        let counters = descriptors.next();
        let link = descriptors.collect();
        let adopted = self.opener.adopt(vif, &identity.settings, &identity.link, link)?;
        if let Some(file) = counters.filter(|_| adopted) {
            self.counters.adopt(file);
        }
        Ok(adopted)
    }

    /// Looks for the process of an earlier supervisor; ready when there is none, or it is known.
    fn poll_search(&mut self) -> Poll<()> {
        let (device, environment) = (self.device(), &self.environment);
        self.search.poll(&device, &environment.found, &environment.hub, &self.wake)
    }

    /// Takes the process of an earlier supervisor, after killing it.
    fn kill_found(&mut self) -> Option<Process> {
        let found = self.search.take_known()?;
        found.process.kill();
        Some(found.process)
    }

    /// Ends the process of an earlier supervisor; ready when it has ended.
    fn poll_end_found(&mut self) -> Poll<()> {
        if let Some(killed) = self.kill_found() {
            let wake = Arc::clone(&self.wake);
            // The kernel may take long to end it.
            let wait = move || _ = killed.wait();
            self.ending = Task::spawn("end-device-process", wait, move || wake()).ok();
        }
        if self.ending.as_mut().is_some_and(|ending| ending.poll().is_pending()) {
            return Poll::Pending;
        }
        self.ending = None;
        Poll::Ready(())
    }

    fn change(&self, change: NicChange) {
        if let Some(plan) = &self.plan {
            plan.change(change);
            (self.wake)();
        }
    }
}

impl<P> VifServer for RemoteNic<P>
where
    P: DevicePlatform + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    type Session = Supervised<NicPlan<P>>;

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn max_queues(&self) -> u32 {
        self.opener.max_queues()
    }

    fn expect_queues(&mut self, queues: usize) {
        self.opener.expect_queues(queues);
    }

    fn policy(&self) -> Policy {
        self.opener.policy()
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        self.opener.open(vif, attach)
    }

    fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        if self.poll_search().is_pending() {
            return Ok(Poll::Pending);
        }
        if self.opener.link().is_none() && matches!(self.search, Search::Known(_)) {
            if self.found_open(vif)? {
                return Ok(Poll::Ready(()));
            }
            let device = self.device();
            tracing::warn!(device, "the device process serves another NIC: it is replaced");
        }
        if self.opener.link().is_none() && self.poll_end_found().is_pending() {
            return Ok(Poll::Pending);
        }
        self.opener.poll_open(vif, attach)
    }

    fn close(&mut self) -> Poll<()> {
        if self.poll_search().is_pending() || self.poll_end_found().is_pending() {
            return Poll::Pending;
        }
        self.plan = None;
        self.opener.close()
    }

    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        if let Some(reason) = self.bound_to_process(vif)? {
            let text = format!("the NIC cannot be served by its process any more: {reason}");
            let remedy = "detach the NIC and attach it with these options";
            return Err(Fault::new("nic-options", text).with_remedy(remedy));
        }
        self.opener.refresh(vif)?;
        self.change(NicChange::Settings(Box::new(self.opener.applied().clone())));
        Ok(())
    }

    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault> {
        let record = self.records.copy(&record_name(spec.addr), spec.record_len());
        check_record(record.map_err(|e| Fault::of(e.code(), &e))?, spec)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let none = || Fault::new("tap-missing", "no port is open for the session");
        let link = self.opener.link().ok_or_else(none)?.clone();
        let counters = self.counters.for_queues(spec.queues.len())?;
        let settings = self.opener.applied().clone();
        let state = PlanState::new(spec.clone(), settings);
        let plan = Arc::new(NicPlan {
            platform: self.platform.clone(),
            environment: self.environment.clone(),
            spec: spec.clone(),
            link,
            counters,
            records: self.records.clone(),
            capture: self.capture.clone(),
            state: Mutex::new(state),
        });
        self.plan = Some(Arc::clone(&plan));
        let (device, wake) = (self.device(), Arc::clone(&self.wake));
        if let Search::Known(known) = &self.search
            && begin == Begin::Resumed
            && known.session.as_ref().is_some_and(|identity| identity.serves(spec))
            && let Some(known) = self.search.take_known()
        {
            tracing::info!(device, pid = known.process.pid(), "device process found");
            return Supervised::adopt(&device, &self.environment, plan, known.process, wake);
        }
        plan.state().killed = self.kill_found();
        let start = match begin {
            Begin::New => Start::New,
            Begin::Resumed => Start::Resumed,
        };
        Supervised::start(&device, &self.environment, plan, start, wake)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        let device = self.device();
        let process = &mut self.process;
        let polled = session.poll(&mut |message: Message<NicPlan<P>>| {
            if let FromDevice::Confined(applied) = message {
                process.set_applied(&device, applied);
            }
        });
        self.process.set_process(session.pid(), session.replaced());
        polled
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        self.ready(session).err()
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        if session.stop().is_pending() {
            return Poll::Pending;
        }
        session.session().link.reset();
        self.plan = None;
        Poll::Ready(())
    }

    fn leave(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.leave();
        Poll::Ready(())
    }

    fn end(&mut self, device: DeviceAddr) {
        self.records.remove(&record_name(device));
    }

    fn set_rate(&mut self, _session: &mut Self::Session, rate: Option<VifRate>) {
        self.change(NicChange::Rate(rate));
    }

    fn filter_groups(&mut self, _session: &mut Self::Session, chosen: bool) {
        self.change(NicChange::FilterGroups(chosen));
    }

    fn set_headroom(&mut self, _session: &mut Self::Session, bytes: u16) {
        self.change(NicChange::Headroom(bytes));
    }
}
