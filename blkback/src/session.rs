//! A session of a disk: mapped rings, bound event channels, the in-flight record, and the queues
//! that are being served.
//!
//! | module | contents |
//! |---|---|
//! | `spec` | [`SessionSpec`]: the plain data that describe a session |
//! | `record` | the session's in-flight record |
//!
//! A [`Session`] knows neither xenstore nor the toolstack's keys. It runs where the rings are
//! mapped: in the process of the [`Vbd`](crate::Vbd), or in another one.

mod record;
mod spec;

pub use record::{invalidate, maps_requests};
pub use spec::{Begin, SessionIdentity, SessionSpec, record_name};

use crate::disk_state::DiskState;
use crate::engine::FlushState;
use crate::queue::{QueueFault, QueueParts};
use crate::stats::Stats;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use pvio_event_channel::{BackendPlatform, Port};
use pvio_grant_table::policy::MappingBudget;
use pvio_grant_table::{Access, GrantRef};
use pvio_ring::BackRing;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::Queue as QueueKeys;
use record::SessionRecord;

/// Serves queues, with threads or the platform's equivalent.
pub trait QueueServer<P: BackendPlatform, R> {
    /// A queue that is being served. Dropping it completes the operations in flight and releases
    /// all resources.
    type Running;

    /// Starts to serve a queue, without waiting until it is [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks the resources.
    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel, R>,
    ) -> Result<Self::Running, Fault>;

    /// Returns whether a started queue is being served.
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks the resources.
    fn ready(&mut self, _running: &mut Self::Running) -> Result<Poll<()>, Fault> {
        Ok(Poll::Ready(()))
    }

    /// Returns the fault that ended a queue, if one did; reported once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<QueueFault>;

    /// Stops serving a queue: it takes no new requests and completes those in flight. Called again
    /// until it is ready; dropping the queue does not block then. The default implementation leaves
    /// all of this to the drop.
    fn stop(&mut self, _running: &mut Self::Running) -> Poll<()> {
        Poll::Ready(())
    }
}

/// The handles that a session requires besides its [`SessionSpec`].
#[derive(Clone, Debug)]
pub struct SessionParts<P, R, Q> {
    /// Maps and copies guest pages, and binds event channels.
    pub platform: P,
    /// Memory of the in-flight record, of [`SessionIdentity::record_len`] bytes or more: any for
    /// [`Begin::New`], and that of the continued session otherwise.
    pub record: R,
    /// Whether a flush of the image has failed.
    pub flush_state: Arc<FlushState>,
    /// Budget of cached mappings of the guest's pages.
    pub mapping_budget: Arc<MappingBudget>,
    /// Counters of each queue. The session creates those that are missing.
    pub stats: Vec<Arc<Stats>>,
    /// Serves the queues.
    pub queues: Q,
}

/// A session whose queues are being served. Dropping it stops them, which may block; the session
/// can be resumed then, because its record stays valid.
pub struct Session<P: BackendPlatform, R, Q: QueueServer<P, R>> {
    queues: Q,
    /// Queues that have not ended.
    running: Vec<Q::Running>,
    record: SessionRecord<R>,
    disk: Arc<DiskState>,
    stats: Vec<Arc<Stats>>,
    /// Why not all queues were started.
    failed: Option<Fault>,
}

impl<P: BackendPlatform, R: SharedMemory + Clone, Q: QueueServer<P, R>> Session<P, R, Q> {
    /// Maps the rings, binds the event channels, creates or resumes the in-flight record, and
    /// starts the queues: all of them, or none if one of the rings cannot be attached. A failure is
    /// reported by [`ready`](Self::ready), so that queues started before it can be
    /// [stopped](Self::stop) without blocking.
    ///
    /// # Errors
    /// A [`Fault`] if the record does not fit into its memory, or if that contains no valid record
    /// of this session to continue. Nothing was mapped.
    pub fn start(
        spec: &SessionSpec,
        begin: Begin,
        parts: SessionParts<P, R, Q>,
    ) -> Result<Self, Fault> {
        let SessionParts { platform, record, flush_state, mapping_budget, mut stats, queues } =
            parts;
        let record = SessionRecord::begin(&spec.identity, record, begin)?;
        let disk = Arc::new(DiskState::with(spec.geometry, flush_state, mapping_budget));
        while stats.len() < spec.identity.queues.len() {
            stats.push(Arc::default());
        }
        let running = Vec::new();
        let mut session = Self { queues, running, record, disk, stats, failed: None };
        session.failed = session.serve(spec, begin, &platform).err();
        Ok(session)
    }

    fn serve(&mut self, spec: &SessionSpec, begin: Begin, platform: &P) -> Result<(), Fault> {
        // If one fails, those before it are released.
        let attached = spec.identity.queues.iter().zip(&self.stats).enumerate();
        let attached: Vec<_> = attached
            .map(|(index, (queue, stats))| {
                self.attach(spec, (index, queue), stats, begin, platform)
            })
            .collect::<Result<_, _>>()?;
        self.record.commit(self.disk.flush_state(), spec.data_path, begin);
        let disk = spec.disk_name();
        let several = attached.len() > 1;
        for (n, parts) in attached.into_iter().enumerate() {
            let name: String = if several { format!("{disk}-q{n}") } else { disk.clone() };
            self.running.push(self.queues.start(&name, parts)?);
        }
        Ok(())
    }

    /// Maps the ring of a queue, creates or resumes its record and binds its event channel.
    fn attach(
        &self,
        spec: &SessionSpec,
        (index, queue): (usize, &QueueKeys),
        stats: &Arc<Stats>,
        begin: Begin,
        platform: &P,
    ) -> Result<QueueParts<P, P::Channel, R>, Fault> {
        let (front, abi) = (spec.identity.addr.front, spec.identity.abi);
        let grefs: Vec<GrantRef> = queue.ring_refs.iter().copied().map(GrantRef).collect();
        let mapped = platform.map(front, &grefs, Access::ReadWrite).map_err(|status| {
            let what = format!("the ring (grants {grefs:?}) cannot be mapped: {status}");
            Fault::new(status.code(), what)
        })?;
        let mut ring = BackRing::attach(mapped, abi.slot_size())
            .map_err(|fault| Fault::of(fault.reason(), &fault))?;
        let record = self.record.queue(index, &mut ring, abi, begin)?;
        let port = Port(queue.event_channel);
        let channel = platform.bind_interdomain(front, port).map_err(|e| {
            let fault =
                Fault::new(e.code(), format!("event channel {} cannot be bound: {e}", port.0));
            match e.remedy() {
                Some(remedy) => fault.with_remedy(remedy),
                None => fault,
            }
        })?;
        Ok(QueueParts {
            frontend: front,
            disk: Arc::clone(&self.disk),
            grants: platform.clone(),
            data_path: spec.data_path,
            ring,
            channel,
            abi,
            max_indirect_segments: spec.max_indirect_segments(),
            record,
            stats: Arc::clone(stats),
        })
    }

    /// Returns whether every queue is being served.
    ///
    /// # Errors
    /// The [`Fault`] that prevented a queue from being started. The session has to be stopped.
    pub fn ready(&mut self) -> Result<Poll<()>, Fault> {
        if let Some(fault) = &self.failed {
            return Err(fault.clone());
        }
        let mut ready = Poll::Ready(());
        for queue in &mut self.running {
            if self.queues.ready(queue)?.is_pending() {
                ready = Poll::Pending;
            }
        }
        Ok(ready)
    }

    /// Returns the fault that ended a queue, if one did; reported once. A queue that cannot
    /// continue ends the session: it has to be stopped.
    pub fn fault(&mut self) -> Option<Fault> {
        let Self { queues, running, .. } = self;
        let fault = running.iter_mut().find_map(|queue| queues.fault(queue))?;
        Some(Fault::of(fault.code(), &fault))
    }

    /// Stops all queues in parallel: they take no new requests, and complete those in flight. Ready
    /// when all have ended. The session can be resumed.
    pub fn stop(&mut self) -> Poll<()> {
        let Self { queues, running, .. } = self;
        running.retain_mut(|queue| queues.stop(queue).is_pending());
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Sets the size of the disk in sectors of 512 bytes, for all queues immediately.
    pub fn resize(&self, sectors: u64) {
        self.disk.resize(sectors);
    }
}

impl<P: BackendPlatform, R, Q: QueueServer<P, R>> Session<P, R, Q> {
    /// Returns the state of the disk that the queues share.
    pub fn disk(&self) -> &Arc<DiskState> {
        &self.disk
    }

    /// Returns the counters of each queue.
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    /// Returns the server of the queues.
    pub fn queues(&self) -> &Q {
        &self.queues
    }
}

impl<P: BackendPlatform, R, Q: QueueServer<P, R>> fmt::Debug for Session<P, R, Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (running, disk, failed) = (self.running.len(), &self.disk, &self.failed);
        f.debug_struct("Session")
            .field("running", &running)
            .field("disk", disk)
            .field("failed", failed)
            .finish_non_exhaustive()
    }
}
