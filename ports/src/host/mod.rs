//! Serves vifs, with one thread per queue, as a driver domain does.
#![forbid(unsafe_code)]

mod config;
mod link;
mod opening;
mod queues;

pub use config::{NicConfig, NicSettings, QUEUES_DEFAULT};
pub use queues::{LinkQueues, OpenLink};

use crate::options::NicOptions;
use crate::settings::RuntimeSettings;
use alloc::sync::Arc;
use alloc::vec::Vec;
use config::{bridge_and_options, interface_name};
use core::fmt;
use core::task::Poll;
use link::{Link, LinkParams, TapEvents, not_open};
use opening::Opening;
use pvio_event_channel::BackendPlatform;
use pvio_netback::queue::{Policy, RateLimit, Waker};
use pvio_netback::session::{
    Begin, Session, SessionParts, SessionSpec, check_record, invalidate_record, record_name,
};
use pvio_netback::stats::Stats;
use pvio_netback::vif::{Attach, VifServer};
use pvio_recordfile::{RecordDir, RecordFile, RecordStore};
use pvio_runtime::{LogLimit, Task};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{MAX_QUEUES, ToolstackBack, VifRate};
use std::os::fd::AsFd;

/// Serves a vif in this process, through the link that [its options](NicOptions) select.
pub struct NicServer<P> {
    platform: P,
    config: NicConfig,
    wake: Waker,
    max_queues: u32,
    /// Number of queues of a session that an earlier process started.
    resumed_queues: u32,
    link: Option<OpenLink>,
    /// Options with which the link was opened.
    options: NicOptions,
    /// The link that is being opened, and its options.
    opening: Option<(Opening, NicOptions)>,
    closing: Option<Task<()>>,
    shared: Arc<NicSettings>,
    settings: Arc<RuntimeSettings>,
    /// Limit of all queues together. It outlives the session, so that a guest that reconnects does
    /// not get another burst.
    limit: Arc<RateLimit>,
    /// Counters of each queue, over all sessions.
    stats: Vec<Arc<Stats>>,
    records: RecordStore,
    /// In-flight record of the session that was started last.
    record: Option<(SessionSpec, RecordFile)>,
    tap_events: TapEvents,
}

impl<P> NicServer<P> {
    /// Creates a server. `wake` may be called by any thread, when an operation that the driver
    /// waits for has ended or a worker has ended on its own. The driver must be stepped then.
    #[must_use]
    pub fn new(platform: P, config: NicConfig, wake: Waker) -> Self {
        let max_queues = config.queues();
        let stats = (0..max_queues.clamp(1, MAX_QUEUES)).map(|_| Arc::default()).collect();
        Self {
            platform,
            max_queues,
            config,
            wake,
            resumed_queues: 0,
            link: None,
            options: NicOptions::default(),
            opening: None,
            closing: None,
            shared: Arc::default(),
            settings: Arc::default(),
            limit: Arc::default(),
            stats,
            records: RecordStore::default(),
            record: None,
            tap_events: TapEvents::default(),
        }
    }

    /// Returns the counters of rate-limited log lines, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events = Vec::from([self.records.event()]);
        events.extend(self.tap_events.named());
        events.extend(self.link.as_ref().and_then(|link| link.lock().event()));
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

    /// Opens the in-flight record of a session.
    fn open_record(&self, spec: &SessionSpec, begin: Begin) -> Result<RecordFile, Fault> {
        let (name, resumed) = (record_name(spec.addr), begin == Begin::Resumed);
        let opened = self.records.open(&name, spec.record_len(), resumed);
        opened.map_err(|e| Fault::of(e.code(), &e))
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

impl<P> VifServer for NicServer<P>
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
{
    type Session = Session<P, RecordFile, LinkQueues>;

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn max_queues(&self) -> u32 {
        let limit = self.link.as_ref().and_then(|link| link.lock().max_queues());
        limit.map_or(self.max_queues, |limit| limit.min(self.max_queues))
    }

    fn expect_queues(&mut self, queues: usize) {
        self.resumed_queues = u32::try_from(queues).unwrap_or(u32::MAX).min(MAX_QUEUES);
    }

    fn policy(&self) -> Policy {
        self.config.policy
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        let (mut opening, options) = self.begin_opening(vif, attach)?;
        (self.link, self.options) = (Some(OpenLink::new(opening.wait()?)), options);
        Ok(())
    }

    fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        let (mut opening, options) = match self.opening.take() {
            Some(opening) => opening,
            None => self.begin_opening(vif, attach)?,
        };
        match opening.poll() {
            Poll::Ready(link) => {
                (self.link, self.options) = (Some(OpenLink::new(link?)), options);
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

    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault> {
        check_record(self.open_record(spec, Begin::Resumed)?, spec)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let link = self.link.as_ref().ok_or_else(not_open)?.clone();
        // An earlier process may have offered more queues.
        self.stats.resize_with(spec.queues.len().max(self.stats.len()), Arc::default);
        let record = self.open_record(spec, begin)?;
        self.record = Some((spec.clone(), record.clone()));
        let (settings, wake) = (Arc::clone(&self.settings), Arc::clone(&self.wake));
        let parts = SessionParts {
            platform: self.platform.clone(),
            record,
            limit: Arc::clone(&self.limit),
            stats: self.stats.clone(),
            queues: LinkQueues::new(link, settings, wake),
        };
        Session::start(spec, begin, parts)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        session.ready()
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        session.fault()
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn end(&mut self, device: DeviceAddr) {
        if let Some((spec, record)) = self.record.take() {
            invalidate_record(record, &spec);
        }
        self.records.remove(&record_name(device));
    }

    fn set_rate(&mut self, session: &mut Self::Session, rate: Option<VifRate>) {
        session.set_rate(rate);
    }

    fn filter_groups(&mut self, session: &mut Self::Session, chosen: bool) {
        session.filter_groups(chosen);
    }

    fn set_headroom(&mut self, session: &mut Self::Session, bytes: u16) {
        session.set_headroom(bytes);
    }
}

impl<P> fmt::Debug for NicServer<P> {
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
    use pvio_grant_table::DomId;
    use pvio_hosted::{Domain, DomainConfig, Hypervisor};
    use pvio_xenbus::handshake::common::BackendKind;

    #[test]
    fn record_that_cannot_be_removed_is_counted() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("records");
        let records = RecordDir::open(&path).unwrap();
        std::fs::create_dir(path.join("vif-1-0")).unwrap();
        let hypervisor = Hypervisor::start(parent.path().join("hosted")).unwrap();
        let id = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
        let domain = Domain::join(parent.path().join("hosted"), id).unwrap();
        let server = NicServer::new(domain, NicConfig::default(), Arc::new(|| ()));
        let mut server = server.recorded_in(records);
        let device = DeviceAddr::new(BackendKind::Vif, DomId::DOM0, DomId(1), 0);
        for _ in 0..12 {
            server.end(device);
        }
        let counted: Vec<_> =
            server.events().iter().map(|(name, log)| (*name, log.seen())).collect();
        assert_eq!(counted, [("records-left", 12), ("taps-changed", 0), ("carrier-not-set", 0)]);
    }
}
