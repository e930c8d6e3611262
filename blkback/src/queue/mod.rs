//! One queue of a virtual disk: converts a ring's requests to engine operations, and results to
//! responses.
//!
//! A state machine without I/O: [`Queue::poll`] does the work that is possible now and never
//! blocks. One thread (or kernel loop, or simulator step) drives it. Queues share no mutable state
//! except the `DiskState`.
//!
//! | module | contents |
//! |---|---|
//! | `take` | conversion of the ring's requests to the engine's operations, in batches |
//! | `finish` | conversion of the engine's completions to the ring's responses |
//! | `record` | the in-flight record of both, for a process that takes over |
//! | `check` | validation of requests against the disk |

mod check;
mod finish;
mod record;
mod take;

pub use record::{DEATHS_MAX, QueueRecord};

use crate::disk_state::DiskState;
use crate::engine::{BlockEngine, EngineError, Geometry, Io, Pauses, Segments};
use crate::pages::{Buf, Context, Pages, StepError};
use crate::path::DataPath;
use crate::stats::Stats;
use alloc::borrow::Cow;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_event_channel::{EventChannel, EventError};
use pvio_grant_table::{DomId, GrantCopier, GrantMapper};
use pvio_ring::error::Remedy;
use pvio_ring::inflight::RecordError;
use pvio_ring::proto::blkif::{Abi, MAX_SEGMENTS, Request, op};
use pvio_ring::shm::{HeapMemory, SharedMemory};
use pvio_ring::{BackRing, RingFault, ShortSlot};
use take::{IndirectJob, Job};

/// The error of a flush after an earlier one failed (`EIO`).
const FLUSH_FAILED: StepError = StepError::Engine(EngineError::Os(5));
const UNSUPPORTED: StepError = StepError::Engine(EngineError::Unsupported);

/// The components of a queue.
#[derive(Debug)]
pub struct QueueParts<P: GrantMapper, C, R = HeapMemory> {
    /// The frontend's domain, which granted the pages.
    pub frontend: DomId,
    /// Maps and copies guest pages.
    pub grants: P,
    /// The way guest pages are accessed.
    pub data_path: DataPath,
    /// The shared ring.
    pub ring: BackRing<P::Mapping>,
    /// The event channel to the frontend.
    pub channel: C,
    /// The disk's geometry, current size and shared state.
    pub disk: Arc<DiskState>,
    /// The frontend's request layout.
    pub abi: Abi,
    /// Maximum number of segments of an indirect request, as advertised; 0 if not advertised.
    pub max_indirect_segments: u32,
    /// The in-flight record. It outlives a crash of this process, so that another process can take
    /// the ring over.
    pub record: QueueRecord<R>,
    /// The queue's counters.
    pub stats: Arc<Stats>,
}

impl<P: GrantMapper, C, R> QueueParts<P, C, R> {
    /// Returns the access to the guest's pages.
    fn context(&self) -> Context<'_, P> {
        Context { grants: &self.grants, frontend: self.frontend, stats: &self.stats }
    }
}

/// The reason for which a queue ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QueueFault {
    /// The frontend violated the ring protocol.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// The event channel failed.
    #[error(transparent)]
    Event(#[from] EventError),
    /// Ring and in-flight record are inconsistent.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The ring's slots do not have the size of the ABI's requests: a bug of the backend.
    #[error(transparent)]
    Slot(#[from] ShortSlot),
    /// The worker's wait point failed with this operating system error.
    #[error("the queue's worker cannot wait: error {0} of the operating system")]
    Wait(i32),
    /// The thread that carries out the disk's operations has ended.
    #[error("the disk's I/O thread has ended")]
    EngineLost,
    /// The worker panicked.
    #[error("the queue's worker thread panicked")]
    Panicked,
}

impl QueueFault {
    /// Returns a short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Ring(fault) => fault.reason(),
            Self::Event(error) => error.code(),
            Self::Record(error) => error.code(),
            Self::Slot(_) => "short-slot",
            Self::Wait(_) => "wait-failed",
            Self::EngineLost => "engine-lost",
            Self::Panicked => "worker-panicked",
        }
    }
}

impl Remedy for QueueFault {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Event(error) => error.remedy().map(Cow::Borrowed),
            Self::EngineLost | Self::Panicked => {
                Some("see the log, then detach the disk and attach it again".into())
            }
            Self::Ring(_) | Self::Record(_) | Self::Slot(_) | Self::Wait(_) => None,
        }
    }
}

/// Whether a poll made progress.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Requests were taken or completed: poll again before waiting.
    Some,
    /// There was nothing to do.
    None,
}

/// A queue of a virtual disk.
#[derive(Debug)]
pub struct Queue<P: GrantMapper, C, E, R = HeapMemory> {
    parts: QueueParts<P, C, R>,
    engine: E,
    /// The geometry when requests were last taken.
    geometry: Geometry,
    /// Submitted requests without a response, by the engine's tag, which is the number of their
    /// entry in the record.
    requests: Vec<InFlight>,
    /// Number of submitted requests without a response.
    active: usize,
    /// Inherited requests to be submitted again, the oldest last.
    inherited: Vec<u32>,
    /// Whether the frontend may have missed a notification of the earlier process.
    notify: bool,
    /// A request that was taken and must wait: a barrier until no request is in flight, any other
    /// until enough pages are free.
    waiting: Option<(u32, Request)>,
    /// The barrier in flight. No request is taken until it completes.
    barrier: Option<u32>,
    /// Requests of this poll that are about to be submitted; reused.
    jobs: Vec<Job>,
    /// Indirect requests of this poll whose segments are about to be read; reused.
    indirect: Vec<IndirectJob>,
    pages: Pages<P::Mapping>,
    /// The segments of the operation being submitted; reused.
    segments: Segments<Buf<P::Mapping>>,
    /// The barrier's segments during the flush before its write.
    barrier_segments: Segments<Buf<P::Mapping>>,
    /// Whether operations were submitted since the engine was last kicked.
    submitted: bool,
    /// Whether the queue is draining: no new requests are taken.
    draining: bool,
    /// Whether the engine reported [`EngineError::Lost`], which is permanent.
    engine_lost: bool,
    levels: Levels,
    /// The engine's pauses, as of the last update of the counters.
    pauses: Pauses,
}

/// The queue's levels in its statistics. Dropping it sets them to 0.
#[derive(Debug)]
struct Levels(Arc<Stats>);

impl Drop for Levels {
    fn drop(&mut self) {
        self.0.vacate();
    }
}

/// A request that was submitted and has no response.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    id: u64,
    op: u8,
    bytes: u32,
    /// The step after the current operation.
    next: NextStep,
}

impl InFlight {
    /// Returns whether the step before `next` was a flush.
    const fn was_flush(&self, next: NextStep) -> bool {
        matches!(self.op, op::FLUSH_DISKCACHE | op::WRITE_BARRIER)
            && !matches!(next, NextStep::Flush)
    }
}

/// The step of a request after an operation has completed.
#[derive(Clone, Copy, Debug)]
enum NextStep {
    /// Complete.
    Respond,
    /// Flush, then complete.
    Flush,
    /// Write the barrier's data, flush, then complete.
    Write { sector: u64 },
}

impl<P, C, E, R> Queue<P, C, E, R>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    E: BlockEngine<Buf<P::Mapping>>,
    R: SharedMemory + Clone,
{
    /// Creates a queue over an engine. The first [`poll`](Self::poll) submits inherited requests
    /// and publishes inherited responses.
    pub fn new(mut parts: QueueParts<P, C, R>, engine: E) -> Self {
        let slots = parts.ring.layout().slots();
        let most = MAX_SEGMENTS.max(parts.max_indirect_segments as usize);
        let inherited = parts.record.inherited.take();
        let unused = InFlight { id: 0, op: 0, bytes: 0, next: NextStep::Respond };
        let budget = parts.disk.mapping_budget();
        let pages = Pages::new(parts.data_path, slots as usize, most, budget);
        let [used, cached, registered] = pages.limits();
        parts.stats.limit([slots as usize, used, cached, registered]);
        let levels = Levels(Arc::clone(&parts.stats));
        Self {
            geometry: parts.disk.geometry(),
            requests: (0..slots).map(|_| unused).collect(),
            active: 0,
            notify: inherited.is_some() && !pvio_ring::planted!(TakeoverNotNotified),
            inherited: inherited.unwrap_or_default(),
            waiting: None,
            barrier: None,
            jobs: Vec::with_capacity(slots as usize),
            indirect: Vec::new(),
            pages,
            segments: Vec::with_capacity(MAX_SEGMENTS),
            barrier_segments: Vec::with_capacity(MAX_SEGMENTS),
            parts,
            engine,
            submitted: false,
            draining: false,
            engine_lost: false,
            levels,
            pauses: Pauses::default(),
        }
    }

    /// Completes finished requests, takes up to `budget` new ones, submits them to the engine as
    /// one batch, and publishes all responses with at most one notification.
    ///
    /// # Errors
    /// A [`QueueFault`]: the queue has ended, and the caller only waits until
    /// [`in_flight`](Self::in_flight) is 0.
    pub fn poll(&mut self, budget: u32) -> Result<Progress, QueueFault> {
        let mut completed = self.reap();
        let taken = self.take(if self.draining { 0 } else { budget })?;
        // Operations that complete immediately share the notification. A request of several steps
        // may submit its next step here; no request has more than three, so the loop ends.
        while core::mem::take(&mut self.submitted) {
            self.engine.kick();
            completed += self.reap();
        }
        let QueueParts { record, ring, .. } = &mut self.parts;
        self.levels.0.occupy(record.log.in_flight(), self.pages.used());
        if record.log.publish(ring) | core::mem::take(&mut self.notify) {
            self.parts.stats.notifies.add(1);
            self.parts.channel.notify()?;
        }
        if self.engine_lost {
            return Err(QueueFault::EngineLost);
        }
        Ok(if taken + completed > 0 { Progress::Some } else { Progress::None })
    }

    /// Arms the ring's event index and checks once more for requests. Called before waiting; the
    /// caller waits only if it returns `false`.
    ///
    /// # Errors
    /// A [`QueueFault`], as for [`poll`](Self::poll).
    pub fn final_check(&mut self) -> Result<bool, QueueFault> {
        // Only a completion can make progress here.
        if self.draining || self.is_blocked() {
            return Ok(false);
        }
        Ok(self.parts.ring.final_check()?)
    }

    /// Returns whether the ring has requests. Reads shared memory without arming the event index.
    ///
    /// # Errors
    /// A [`QueueFault`], as for [`poll`](Self::poll).
    #[inline]
    pub fn has_work(&mut self) -> Result<bool, QueueFault> {
        Ok(!self.draining && !self.is_blocked() && self.parts.ring.has_requests()?)
    }

    /// Sets the current time, from an arbitrary origin, and unmaps cached mappings that were unused
    /// for 60 s. Called before waiting, and periodically by a busy worker.
    pub fn tick(&mut self, now: Duration) {
        self.pages.tick(now);
        self.parts.stats.cached_mappings.set(self.pages.cached() as u64);
        self.note_pauses();
    }

    /// Updates the counters of pauses. A process that ends during a pause does not end because of
    /// the requests in flight: they are not charged for it. Returns whether operations are held.
    fn note_pauses(&mut self) -> bool {
        let pauses = self.engine.pauses();
        self.parts.stats.add_pauses(core::mem::replace(&mut self.pauses, pauses), pauses);
        if pauses.is_paused {
            self.parts.record.spare_requests();
        }
        pauses.is_paused
    }

    /// Returns whether the engine holds operations because the storage is full. If the queue is
    /// dropped then, their requests are left to a later process.
    pub fn is_paused(&mut self) -> bool {
        self.note_pauses()
    }

    /// Returns the number of cached mappings. While it is not 0, a worker calls
    /// [`tick`](Self::tick) periodically, also while it waits.
    #[must_use]
    pub fn cached_mappings(&self) -> usize {
        self.pages.cached()
    }

    /// Returns the number of submitted requests without a response.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.active
    }

    /// Returns whether every taken request has been completed, including those that had to wait.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.parts.record.log.in_flight() == 0
    }

    /// Stops taking requests. Those already taken are still completed by [`poll`](Self::poll).
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Returns the engine, for a worker that waits for its completions.
    pub fn engine_mut(&mut self) -> &mut E {
        &mut self.engine
    }

    /// Returns the event channel.
    pub fn channel(&self) -> &C {
        &self.parts.channel
    }

    /// Returns the counters.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.parts.stats
    }

    /// Returns whether no request can be taken before one completes.
    fn is_blocked(&self) -> bool {
        self.must_wait() || self.parts.record.log.free() == 0
    }

    /// Returns whether a request waits for earlier ones. No other request, new or inherited, is
    /// submitted until then.
    fn must_wait(&self) -> bool {
        self.waiting.is_some() || self.barrier.is_some()
    }

    /// Submits `self.segments` to the engine for a step of a request.
    fn submit(&mut self, tag: u32, io: Io) {
        if io == Io::Flush && self.parts.disk.flush_state().has_failed() {
            return self.finish(tag, Err(FLUSH_FAILED));
        }
        // The guest has written nothing. A flush of the host's device would slow down other disks.
        if io == Io::Flush && self.parts.disk.geometry().read_only {
            return self.finish(tag, Ok(()));
        }
        self.submitted = true;
        if self.engine.submit(tag, io, &mut self.segments).is_err() {
            // An engine has capacity for as many operations as the ring has slots. If an engine
            // violates this, the request fails instead of hanging.
            self.pages.release(&mut self.segments);
            self.finish(tag, Err(UNSUPPORTED));
        }
    }
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let none = without_remedy(&[
            &QueueFault::Ring(RingFault::Geometry { bytes: 1, slot_size: 2 }),
            &QueueFault::Event(EventError::NoPorts),
            &QueueFault::Record(RecordError::Gap),
            &QueueFault::Slot(ShortSlot),
            &QueueFault::Wait(5),
            &QueueFault::EngineLost,
            &QueueFault::Panicked,
        ]);
        assert_eq!(none, ["Ring", "Record", "Slot", "Wait"]);
    }
}
