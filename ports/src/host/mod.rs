//! Serves vifs, with one thread per queue, as a driver domain does.
#![forbid(unsafe_code)]

mod config;
mod link;
mod opening;

pub use config::{NicConfig, NicSettings, QUEUES_DEFAULT};

use crate::options::NicOptions;
use crate::settings::RuntimeSettings;
use crate::worker::Worker;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use config::{bridge_and_options, interface_name};
use core::fmt;
use core::task::Poll;
use link::{Link, LinkParams, TapEvents, WorkerSetup, not_open, not_started};
use opening::Opening;
use pvio_event_channel::BackendPlatform;
use pvio_netback::queue::{Policy, Queue, Waker};
use pvio_netback::vif::{Attach, SessionConfig, VifServer};
use pvio_recordfile::{RecordDir, RecordFile, RecordStore};
use pvio_runtime::{EventFd, LogLimit, PrivateBuf, Task};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::{MAX_QUEUES, ToolstackBack};
use std::io;
use std::os::fd::AsFd;

/// Serves a vif through the link that [its options](NicOptions) select.
pub struct NicServer {
    config: NicConfig,
    wake: Waker,
    max_queues: u32,
    /// Number of queues of a session that an earlier process started.
    resumed_queues: u32,
    link: Option<Link>,
    /// Options with which the link was opened.
    options: NicOptions,
    /// The link that is being opened, and its options.
    opening: Option<(Opening, NicOptions)>,
    closing: Option<Task<()>>,
    shared: Arc<NicSettings>,
    settings: Arc<RuntimeSettings>,
    /// Event descriptors by which the queues of the session wake each other, if it has a control
    /// ring.
    wakeups: Vec<EventFd>,
    records: RecordStore,
    tap_events: TapEvents,
}

impl NicServer {
    /// Creates a server. `wake` may be called by any thread, when an operation that the driver
    /// waits for has ended or a worker has ended on its own. The driver must be stepped then.
    #[must_use]
    pub fn new(config: NicConfig, wake: Waker) -> Self {
        Self {
            max_queues: config.queues(),
            config,
            wake,
            resumed_queues: 0,
            link: None,
            options: NicOptions::default(),
            opening: None,
            closing: None,
            shared: Arc::default(),
            settings: Arc::default(),
            wakeups: Vec::new(),
            records: RecordStore::default(),
            tap_events: TapEvents::default(),
        }
    }

    /// Returns the counters of rate-limited log lines, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events = Vec::from([self.records.event()]);
        events.extend(self.tap_events.named());
        events.extend(self.link.as_ref().and_then(Link::event));
        events
    }

    /// Sets the settings that all vifs of a driver domain share.
    #[must_use]
    pub fn within(self, shared: Arc<NicSettings>) -> Self {
        Self { shared, ..self }
    }

    /// Stores in-flight records in this directory, so that another process can resume the sessions
    /// from it.
    #[must_use]
    pub fn recorded_in(self, records: RecordDir) -> Self {
        Self { records: RecordStore::in_dir(records), ..self }
    }

    /// Returns the settings that can be changed, and the capture point, while the vif runs.
    #[must_use]
    pub const fn settings(&self) -> &Arc<RuntimeSettings> {
        &self.settings
    }

    /// Returns the options of a vif from all sources: defaults, `bridge` and `options` keys.
    fn options_of(&self, vif: &ToolstackBack) -> Result<NicOptions, Fault> {
        let (_, options) = bridge_and_options(vif);
        let all = self.shared.defaults.clone().and(&options.replace(';', ","))?;
        Ok(all.and(vif.options.as_deref().unwrap_or_default())?)
    }

    fn apply(&self, vif: &ToolstackBack, options: &NicOptions) -> Result<(), Fault> {
        self.settings.apply(options, vif.mac.0, vif.ip.as_deref(), &self.shared.shares)
    }

    /// Starts to open the vif's link.
    fn begin_opening(
        &self,
        vif: &ToolstackBack,
        attach: Attach,
    ) -> Result<(Opening, NicOptions), Fault> {
        let options = self.options_of(vif)?;
        self.apply(vif, &options)?;
        let name = interface_name(vif);
        let params = LinkParams {
            name: name.clone(),
            vif: vif.clone(),
            attach,
            config: self.config.clone(),
            options: options.clone(),
            settings: Arc::clone(&self.shared),
            queues: self.max_queues.max(self.resumed_queues),
            tap_events: self.tap_events.clone(),
        };
        let opening = Opening::begin(&name, move || Link::open(&params), Arc::clone(&self.wake))?;
        Ok((opening, options))
    }
}

impl<P> VifServer<P> for NicServer
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
{
    type Buf = PrivateBuf;
    type Running = Worker;
    type Record = RecordFile;

    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<RecordFile, Fault> {
        self.records.open(device, len, resumed).map_err(|e| Fault::of(e.code(), &e))
    }

    fn remove_record(&mut self, device: &str) {
        self.records.remove(device);
    }

    fn max_queues(&self) -> u32 {
        let limit = self.link.as_ref().and_then(Link::max_queues);
        limit.map_or(self.max_queues, |limit| limit.min(self.max_queues))
    }

    fn expect_queues(&mut self, queues: usize) {
        self.resumed_queues = u32::try_from(queues).unwrap_or(u32::MAX).min(MAX_QUEUES);
    }

    fn policy(&self) -> Policy {
        self.config.policy
    }

    fn wakers(&mut self, queues: usize) -> Result<Vec<Waker>, Fault> {
        self.wakeups.clear();
        let mut wakers = Vec::with_capacity(queues);
        for _ in 0..queues {
            let failed = |e: io::Error| {
                Fault::new("worker", format!("a queue's eventfd cannot be created: {e}"))
            };
            let wakeup = EventFd::new().map_err(failed)?;
            let other = wakeup.try_clone().map_err(failed)?;
            self.wakeups.push(wakeup);
            wakers.push(Arc::new(move || other.notify()) as Waker);
        }
        Ok(wakers)
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        let (mut opening, options) = self.begin_opening(vif, attach)?;
        (self.link, self.options) = (Some(opening.wait()?), options);
        Ok(())
    }

    fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        let (mut opening, options) = match self.opening.take() {
            Some(opening) => opening,
            None => self.begin_opening(vif, attach)?,
        };
        match opening.poll() {
            Poll::Ready(link) => {
                (self.link, self.options) = (Some(link?), options);
                Ok(Poll::Ready(()))
            }
            Poll::Pending => {
                self.opening = Some((opening, options));
                Ok(Poll::Pending)
            }
        }
    }

    fn close(&mut self) -> Poll<()> {
        self.opening = None;
        self.options = NicOptions::default();
        if let Some(link) = self.link.take() {
            self.closing = opening::close(link, Arc::clone(&self.wake));
        }
        if self.closing.as_mut().is_some_and(|closing| closing.poll().is_pending()) {
            return Poll::Pending;
        }
        self.closing = None;
        Poll::Ready(())
    }

    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let options = self.options_of(vif)?;
        if !options.has_link_of(&self.options) {
            let why = "a NIC's port, bridge and namespace cannot be changed while it is attached";
            let remedy = "detach the NIC and attach it with other options";
            return Err(Fault::new("nic-options", why).with_remedy(remedy));
        }
        self.apply(vif, &options)
    }

    fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault> {
        self.link.as_mut().ok_or_else(not_open)?.begin(session)
    }

    fn start(
        &mut self,
        index: usize,
        name: &str,
        queue: Queue<P, PrivateBuf, RecordFile>,
    ) -> Result<Worker, Fault> {
        let wakeup = self.wakeups.get(index).map(EventFd::try_clone).transpose();
        let setup = WorkerSetup {
            index,
            name: name.into(),
            queue,
            wakeup: wakeup.map_err(not_started)?,
            settings: Arc::clone(&self.settings),
            wake: Arc::clone(&self.wake),
        };
        self.link.as_mut().ok_or_else(not_open)?.start(setup)
    }

    fn ready(&mut self, running: &mut Worker) -> Result<Poll<()>, Fault> {
        match running.ready() {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(error)) => Err(not_started(error)),
        }
    }

    fn started(&mut self) {
        self.link.iter_mut().for_each(Link::started);
    }

    fn stopped(&mut self) {
        self.wakeups.clear();
        self.link.iter_mut().for_each(Link::stopped);
    }

    fn fault(&mut self, running: &mut Worker) -> Option<Fault> {
        running.fault().map(|error| Fault::of(error.code(), &error))
    }

    fn stop(&mut self, running: &mut Worker) -> Poll<()> {
        running.stop()
    }
}

impl fmt::Debug for NicServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NicServer")
            .field("config", &self.config)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_that_cannot_be_removed_is_counted() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("records");
        let records = RecordDir::open(&path).unwrap();
        std::fs::create_dir(path.join("vif-1-0")).unwrap();
        let mut server = NicServer::new(NicConfig::default(), Arc::new(|| ())).recorded_in(records);
        for _ in 0..12 {
            VifServer::<pvio_hosted::Domain>::remove_record(&mut server, "vif-1-0");
        }
        let counted: Vec<_> =
            server.events().iter().map(|(name, log)| (*name, log.seen())).collect();
        assert_eq!(counted, [("records-left", 12), ("taps-changed", 0), ("carrier-not-set", 0)]);
    }
}
