//! Serves vifs, with one thread per queue, as a driver domain does.
//!
//! | type | serves |
//! |---|---|
//! | [`NicServer`] | a vif in this process |
//! | [`LinkOpener`] | the part of a vif that opens its link: a tap and its bridge, files, sockets |
//! | [`LinkQueues`] | the queues of a session on an [`OpenLink`], which another process may have opened |
//!
//! An open link is moved into another process by [`OpenLink::hand_over`] there and
//! [`OpenLink::from_descriptors`] here; [`LinkDescription`] has the links with which that is
//! possible. A session needs its descriptors only: a tap's queues are attached and detached, its
//! offloads and its carrier are set, by `ioctl`s of these descriptors that need no capability.
#![forbid(unsafe_code)]

mod config;
mod link;
mod opener;
mod opening;
mod queues;

pub use config::{NicConfig, NicSettings, QUEUES_DEFAULT};
pub use link::LinkDescription;
pub use opener::LinkOpener;
pub use queues::{LinkQueues, OpenLink};

use crate::settings::RuntimeSettings;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use link::not_open;
use pvio_event_channel::BackendPlatform;
use pvio_netback::queue::{Policy, RateLimit, Waker};
use pvio_netback::session::{
    Begin, Session, SessionParts, SessionSpec, check_record, invalidate_record, record_name,
};
use pvio_netback::stats::Stats;
use pvio_netback::vif::{Attach, VifServer};
use pvio_recordfile::{RecordDir, RecordFile, RecordStore};
use pvio_runtime::LogLimit;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{MAX_QUEUES, ToolstackBack, VifRate};
use std::os::fd::AsFd;

/// Serves a vif in this process, through the link that
/// [its options](crate::options::NicOptions) select.
pub struct NicServer<P> {
    platform: P,
    opener: LinkOpener,
    wake: Waker,
    /// Limit of all queues together. It outlives the session, so that a guest that reconnects does
    /// not get another burst.
    limit: Arc<RateLimit>,
    /// Counters of each queue, over all sessions.
    stats: Vec<Arc<Stats>>,
    records: RecordStore,
    /// In-flight record of the session that was started last.
    record: Option<(SessionSpec, RecordFile)>,
}

impl<P> NicServer<P> {
    /// Creates a server. `wake` may be called by any thread, when an operation that the driver
    /// waits for has ended or a worker has ended on its own. The driver must be stepped then.
    #[must_use]
    pub fn new(platform: P, config: NicConfig, wake: Waker) -> Self {
        let opener = LinkOpener::new(config, Arc::clone(&wake));
        let queues = opener.max_queues().clamp(1, MAX_QUEUES);
        Self {
            platform,
            opener,
            wake,
            limit: Arc::default(),
            stats: (0..queues).map(|_| Arc::default()).collect(),
            records: RecordStore::default(),
            record: None,
        }
    }

    /// Returns the counters of rate-limited log lines, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events = Vec::from([self.records.event()]);
        events.extend(self.opener.events());
        events
    }

    /// Sets the settings that all vifs of a driver domain share.
    #[must_use]
    pub fn within(self, shared: Arc<NicSettings>) -> Self {
        Self { opener: self.opener.within(shared), ..self }
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
        self.opener.settings()
    }

    /// Opens the in-flight record of a session.
    fn open_record(&self, spec: &SessionSpec, begin: Begin) -> Result<RecordFile, Fault> {
        let (name, resumed) = (record_name(spec.addr), begin == Begin::Resumed);
        let opened = self.records.open(&name, spec.record_len(), resumed);
        opened.map_err(|e| Fault::of(e.code(), &e))
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
        self.opener.poll_open(vif, attach)
    }

    fn close(&mut self) -> Poll<()> {
        self.opener.close()
    }

    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        self.opener.refresh(vif)
    }

    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault> {
        check_record(self.open_record(spec, Begin::Resumed)?, spec)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let link = self.opener.link().ok_or_else(not_open)?.clone();
        // An earlier process may have offered more queues.
        self.stats.resize_with(spec.queues.len().max(self.stats.len()), Arc::default);
        let record = self.open_record(spec, begin)?;
        self.record = Some((spec.clone(), record.clone()));
        let (settings, wake) = (Arc::clone(self.settings()), Arc::clone(&self.wake));
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
        f.debug_struct("NicServer").field("opener", &self.opener).finish_non_exhaustive()
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
