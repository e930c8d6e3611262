//! A session: the part of a vif that has access to the guest's memory and event channels, from
//! mapped rings to stopped queues. It needs no xenstore, so it may run in another process than the
//! [`Vif`](crate::Vif) that describes it by a [`SessionSpec`].

mod serve;
mod spec;

pub use serve::QueueServer;
pub use spec::{SessionConfig, SessionSpec, record_name};

use crate::fault::{AttachError, QueueError};
use crate::queue::{Groups, Headroom, Queue, QueueSet, RateLimit, VifRecord};
use crate::stats::Stats;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use pvio_event_channel::{BackendPlatform, EventChannel};
use pvio_ring::inflight::RecordError;
use pvio_ring::shm::{Part, SharedMemory};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::VifRate;

/// How a session begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Begin {
    /// The frontend has connected: its rings are new.
    New,
    /// Another process served the session until it ended: its in-flight record has the state of the
    /// rings.
    Resumed,
}

/// What a [`Session`] uses besides its description.
#[derive(Clone, Debug)]
pub struct SessionParts<P, R, Q> {
    /// Access to the guest's memory and event channels.
    pub platform: P,
    /// Memory of the in-flight record, at least [`SessionSpec::record_len`] bytes: new memory, or
    /// that of the process that served the session before.
    pub record: R,
    /// Limit of the guest's transmit rate, which may be that of the previous session.
    pub limit: Arc<RateLimit>,
    /// Counters of each queue. The session creates those that are missing.
    pub stats: Vec<Arc<Stats>>,
    /// Serves the queues.
    pub queues: Q,
}

/// Session of a guest, whose queues are being served. Dropping it stops them, which may block; the
/// session can be resumed then, because its record stays valid.
pub struct Session<P: BackendPlatform, R, Q: QueueServer<P, R>> {
    queues: Q,
    addr: DeviceAddr,
    record: VifRecord<R>,
    groups: Arc<Groups<Part<R>>>,
    limit: Arc<RateLimit>,
    headroom: Arc<Headroom>,
    /// One element for each queue; empty when the session has stopped.
    running: Vec<Q::Running>,
    stats: Vec<Arc<Stats>>,
    /// Fault of a session whose queues could not all be started.
    failed: Option<Fault>,
    /// Whether the guest was disconnected from the port.
    stopped: bool,
}

impl<P: BackendPlatform, R: SharedMemory + Clone, Q: QueueServer<P, R>> Session<P, R, Q> {
    /// Maps all rings, creates or resumes the in-flight record, and starts the queues, without
    /// waiting until they are [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`]; nothing is mapped or started. If a queue cannot be started, the session is
    /// returned nevertheless, so that the others can be stopped, and [`ready`](Self::ready) returns
    /// the fault.
    pub fn start(
        spec: &SessionSpec,
        begin: Begin,
        parts: SessionParts<P, R, Q>,
    ) -> Result<Self, Fault> {
        let SessionParts { platform, record, limit, mut stats, queues } = parts;
        let record = open_record(record, spec, begin)?;
        let groups = Arc::new(record.groups().ok_or(AttachError::no_section("transmit"))?);
        stats.resize_with(spec.queues.len().max(stats.len()), Arc::default);
        let mut session = Self {
            queues,
            addr: spec.addr,
            record,
            groups,
            limit,
            headroom: Arc::default(),
            running: Vec::new(),
            stats,
            failed: None,
            stopped: false,
        };
        let queues = session.attach(spec, &platform)?;
        if begin == Begin::Resumed {
            #[cfg(feature = "std")]
            {
                let given_up =
                    queues.iter().fold(0, |sum: u64, q| sum.saturating_add(q.given_up()));
                tracing::info!(
                    device = spec.addr.backend_path(),
                    queues = queues.len(),
                    given_up,
                    "session resumed"
                );
            }
            // The earlier process may have published responses and ended before it notified the
            // guest.
            for channel in queues.iter().flat_map(Queue::channels) {
                channel.notify().map_err(|e| Fault::of(e.code(), &QueueError::Event(e)))?;
            }
        } else {
            session.record.commit();
        }
        session.failed = session.run(spec, queues).err();
        Ok(session)
    }

    /// Maps every ring before the first packet: either all are served or none.
    fn attach(
        &mut self,
        spec: &SessionSpec,
        platform: &P,
    ) -> Result<Vec<Queue<P, Q::Buf, R>>, Fault> {
        let (peer, features) = (spec.addr.front, spec.features());
        let mut queues = Vec::with_capacity(spec.queues.len());
        for (index, (refs, stats)) in spec.queues.iter().zip(&self.stats).enumerate() {
            let (platform, stats) = (platform.clone(), Arc::clone(stats));
            let part = (&self.record, index, &self.groups);
            let mut queue = Queue::attach_recorded(platform, peer, refs, features, stats, part)?;
            queue.set_policy(spec.policy);
            queue.share_headroom(&self.headroom);
            queue.share_limit(&self.limit);
            queues.push(queue);
        }
        self.headroom.set(spec.headroom);
        self.serve_control(spec, &mut queues)?;
        self.groups.set_filter(spec.filter_groups);
        self.limit.set(spec.rate);
        Ok(queues)
    }

    fn serve_control(
        &mut self,
        spec: &SessionSpec,
        queues: &mut [Queue<P, Q::Buf, R>],
    ) -> Result<(), Fault> {
        let Some(refs) = &spec.control else { return Ok(()) };
        let set = QueueSet::new(self.queues.wakers(queues.len())?);
        for (index, queue) in queues.iter_mut().enumerate() {
            queue.join(&set, index);
        }
        let count = queues.len();
        let Some(first) = queues.first_mut() else { return Ok(()) };
        first.serve_control_recorded(refs, self.queues.stages(), &self.record)?;
        let staged: Vec<_> = (0..count).map(|index| first.staged_before(index)).collect();
        for (queue, list) in queues.iter_mut().zip(staged) {
            queue.restage(&list)?;
        }
        Ok(())
    }

    fn run(&mut self, spec: &SessionSpec, queues: Vec<Queue<P, Q::Buf, R>>) -> Result<(), Fault> {
        self.queues.begin(&spec.config())?;
        let device = format!("vif-{}-{}", spec.addr.front, spec.addr.index);
        for (index, queue) in queues.into_iter().enumerate() {
            let name = if index == 0 { device.clone() } else { format!("{device}-q{index}") };
            self.running.push(self.queues.start(index, &name, queue)?);
        }
        Ok(())
    }

    /// Whether all queues are running. Called again until they are.
    ///
    /// # Errors
    /// A [`Fault`] if a queue could not be started; the session must be [stopped](Self::stop).
    pub fn ready(&mut self) -> Result<Poll<()>, Fault> {
        if let Some(fault) = &self.failed {
            return Err(fault.clone());
        }
        for queue in &mut self.running {
            if self.queues.ready(queue)?.is_pending() {
                return Ok(Poll::Pending);
            }
        }
        self.queues.started();
        Ok(Poll::Ready(()))
    }

    /// Returns the reason why a queue ended without a request to stop, once.
    pub fn fault(&mut self) -> Option<Fault> {
        let Self { queues, running, .. } = self;
        running.iter_mut().find_map(|queue| queues.fault(queue))
    }

    /// Stops all queues without a change of the port, for a successor that resumes the session on the
    /// same port: its peers see no change. Called again until it is ready.
    pub fn leave(&mut self) -> Poll<()> {
        let Self { queues, running, .. } = self;
        // Requests every queue to stop before the first wait.
        running.retain_mut(|queue| queues.stop(queue).is_pending());
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Stops all queues and disconnects the guest from the port. Called again until it is ready. The
    /// in-flight record stays valid, so that the session can be resumed.
    pub fn stop(&mut self) -> Poll<()> {
        if self.leave().is_pending() {
            return Poll::Pending;
        }
        if !core::mem::replace(&mut self.stopped, true) {
            self.queues.stopped();
        }
        Poll::Ready(())
    }

    /// Sets the guest's transmit rate limit for all queues together.
    pub fn set_rate(&self, rate: Option<VifRate>) {
        self.limit.set(rate);
    }

    /// Sets whether the guest receives only the multicast groups that it selected.
    pub fn filter_groups(&self, chosen: bool) {
        self.groups.set_filter(chosen);
    }

    /// Sets the headroom before each frame to the guest, in bytes.
    pub fn set_headroom(&self, bytes: u16) {
        self.headroom.set(bytes);
    }

    /// Returns the counters of each queue.
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }
}

impl<P: BackendPlatform, R, Q: QueueServer<P, R>> fmt::Debug for Session<P, R, Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (addr, running) = (&self.addr, &self.running.len());
        f.debug_struct("Session").field("addr", addr).field("running", running).finish()
    }
}

/// Checks whether the session of an earlier process can be resumed from this record.
///
/// # Errors
/// A [`Fault`] if the record is not that of the session, or is not valid.
pub fn check_record<R: SharedMemory + Clone>(record: R, spec: &SessionSpec) -> Result<(), Fault> {
    let record = open_record(record, spec, Begin::Resumed)?;
    record.groups().map(drop).ok_or(AttachError::no_section("transmit").into())
}

/// Invalidates the record of a session that has ended, if it is valid, so that the session cannot be
/// resumed from it.
pub fn invalidate_record<R: SharedMemory + Clone>(record: R, spec: &SessionSpec) {
    if let Ok(record) = open_record(record, spec, Begin::Resumed) {
        record.invalidate();
    }
}

fn open_record<R: SharedMemory + Clone>(
    memory: R,
    spec: &SessionSpec,
    begin: Begin,
) -> Result<VifRecord<R>, Fault> {
    let refs = spec.refs();
    let record = match begin {
        Begin::New => VifRecord::create(memory, &refs),
        Begin::Resumed => VifRecord::open(memory, &refs),
    };
    record.map_err(|error: RecordError| Fault::of(error.code(), &error))
}

impl From<AttachError> for Fault {
    fn from(error: AttachError) -> Self {
        Self::of(error.code(), &error)
    }
}
