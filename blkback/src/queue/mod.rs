//! One queue of a virtual disk: from a ring's requests to an engine's operations and back.
//!
//! A state machine without I/O of its own: [`Queue::poll`] does what can be done now and never
//! blocks. One thread (or kernel loop, or simulator step) drives it; all its state is its own.
//!
//! | module | holds |
//! |---|---|
//! | `take` | from the ring's requests to the engine's operations, a batch at a time |
//! | `finish` | from the engine's completions to the ring's answers |
//! | `record` | where both are recorded, for a process that takes over |
//! | `check` | what a request may ask of the disk |

mod check;
mod finish;
mod record;
mod take;

pub use record::{DEATHS_MAX, QueueRecord};

use crate::disk_state::DiskState;
use crate::engine::{BlockEngine, EngineError, Geometry, Io, Segments};
use crate::pages::{Buf, Pages, StepError};
use crate::path::DataPath;
use crate::stats::Stats;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_event_channel::{EventChannel, EventError};
use pvio_grant_table::{DomId, GrantCopier, GrantMapper};
use pvio_ring::inflight::RecordError;
use pvio_ring::proto::blkif::{Abi, MAX_SEGMENTS, Request, op};
use pvio_ring::shm::{HeapMemory, SharedMemory};
use pvio_ring::{BackRing, RingFault, ShortSlot};
use take::{Job, Unread};

/// A flush after one that failed (`EIO`).
const FLUSH_FAILED: StepError = StepError::Engine(EngineError::Os(5));
const UNSUPPORTED: StepError = StepError::Engine(EngineError::Unsupported);

/// What a queue is made of.
#[derive(Debug)]
pub struct QueueParts<P: GrantMapper, C, R = HeapMemory> {
    /// The frontend's domain: whose grants are used.
    pub frontend: DomId,
    /// Maps and copies its pages.
    pub grants: P,
    /// Which of both, and for how long.
    pub data_path: DataPath,
    /// The shared ring.
    pub ring: BackRing<P::Mapping>,
    /// Wakes the frontend, and us.
    pub channel: C,
    /// What the disk looks like, and how large it is now.
    pub disk: Arc<DiskState>,
    /// How the frontend lays out its requests.
    pub abi: Abi,
    /// Segments in one indirect request, as offered; 0 if none was.
    pub max_indirect_segments: u32,
    /// Where requests in flight are recorded, so that another process can take the ring over, whatever
    /// becomes of this one.
    pub record: QueueRecord<R>,
    /// Where to count.
    pub stats: Arc<Stats>,
}

/// What ends a queue: the frontend broke the protocol, or cannot be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QueueFault {
    /// The ring cannot be believed any more.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// The event channel failed.
    #[error(transparent)]
    Event(#[from] EventError),
    /// Ring and in-flight record do not fit together.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The ring's slots are not those of the ABI: a mistake of ours.
    #[error(transparent)]
    Slot(#[from] ShortSlot),
    /// The worker's wait point failed, with this error of the operating system.
    #[error("waiting failed with error {0} of the operating system")]
    Wait(i32),
    /// What does the disk's operations has ended.
    #[error("the thread that does the disk's operations has ended")]
    EngineLost,
    /// The worker panicked.
    #[error("the queue's worker thread panicked")]
    Panicked,
}

impl QueueFault {
    /// A short stable code for logs, counters and `error` nodes.
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

/// Whether a queue has more to do right now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Requests were taken or answered: look again before sleeping.
    Some,
    /// Nothing was there to do.
    None,
}

/// One queue.
#[derive(Debug)]
pub struct Queue<P: GrantMapper, C, E, R = HeapMemory> {
    parts: QueueParts<P, C, R>,
    engine: E,
    /// What the disk looked like when requests were last taken.
    geometry: Geometry,
    /// Requests begun and not answered, by the engine's tag: the number of their entry in the record.
    begun: Vec<Begun>,
    /// How many those are.
    active: usize,
    /// Requests of an earlier process to be submitted again, the oldest last.
    again: Vec<u32>,
    /// The frontend may have missed the notification of an earlier process.
    notify: bool,
    /// A request that was taken and has to wait: a barrier until nothing is under way, any other
    /// until enough pages are free.
    waiting: Option<(u32, Request)>,
    /// A barrier under way: nothing is taken until it is done.
    barrier: Option<u32>,
    /// Requests of this poll on their way to the engine; reused.
    jobs: Vec<Job>,
    unread: Vec<Unread>,
    pages: Pages<P::Mapping>,
    /// One operation's on their way to the engine; reused.
    segments: Segments<Buf<P::Mapping>>,
    /// The barrier's, while the disk is flushed before it.
    held: Segments<Buf<P::Mapping>>,
    /// The engine was given operations since it was last kicked.
    submitted: bool,
    /// Set while shutting down: nothing new is taken.
    draining: bool,
    /// The engine said so of an operation: there is no other outcome from now on.
    engine_lost: bool,
    occupied: Occupied,
}

/// Levels of a queue in its counters. Dropping it sets them to 0.
#[derive(Debug)]
struct Occupied(Arc<Stats>);

impl Drop for Occupied {
    fn drop(&mut self) {
        self.0.vacate();
    }
}

/// A request that was begun.
#[derive(Clone, Copy, Debug)]
struct Begun {
    id: u64,
    op: u8,
    bytes: u32,
    /// What is still to do when the engine is done with this step.
    then: Then,
}

impl Begun {
    /// Whether the step before `next` was a flush.
    const fn was_flush(&self, next: Then) -> bool {
        matches!(self.op, op::FLUSH_DISKCACHE | op::WRITE_BARRIER) && !matches!(next, Then::Flush)
    }
}

#[derive(Clone, Copy, Debug)]
enum Then {
    Answer,
    /// Flush, then answer.
    Flush,
    /// Write the barrier's data, flush, then answer.
    Write {
        sector: u64,
    },
}

impl<P, C, E, R> Queue<P, C, E, R>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    E: BlockEngine<Buf<P::Mapping>>,
    R: SharedMemory + Clone,
{
    /// A queue over an engine. What an earlier process has left is submitted, and published, by the first
    /// [`poll`](Self::poll).
    pub fn new(mut parts: QueueParts<P, C, R>, engine: E) -> Self {
        let slots = parts.ring.layout().slots();
        let most = MAX_SEGMENTS.max(parts.max_indirect_segments as usize);
        let again = parts.record.again.take();
        let idle = Begun { id: 0, op: 0, bytes: 0, then: Then::Answer };
        let budget = parts.disk.mapping_budget();
        let pages = Pages::new(parts.data_path, slots as usize, most, budget);
        let [used, kept, registered] = pages.limits();
        parts.stats.limit([slots as usize, used, kept, registered]);
        let occupied = Occupied(Arc::clone(&parts.stats));
        Self {
            geometry: parts.disk.geometry(),
            begun: (0..slots).map(|_| idle).collect(),
            active: 0,
            notify: again.is_some(),
            again: again.unwrap_or_default(),
            waiting: None,
            barrier: None,
            jobs: Vec::with_capacity(slots as usize),
            unread: Vec::new(),
            pages,
            segments: Vec::with_capacity(MAX_SEGMENTS),
            held: Vec::with_capacity(MAX_SEGMENTS),
            parts,
            engine,
            submitted: false,
            draining: false,
            engine_lost: false,
            occupied,
        }
    }

    /// Answers what is done, takes up to `budget` new requests, hands them to the engine as one
    /// batch, and publishes all answers with at most one notification.
    ///
    /// # Errors
    /// A [`QueueFault`]: the queue is finished, and only [`in_flight`](Self::in_flight) is left to
    /// wait for.
    pub fn poll(&mut self, budget: u32) -> Result<Progress, QueueFault> {
        let mut answered = self.reap();
        let taken = self.take(if self.draining { 0 } else { budget })?;
        // What the engine could do at once goes out with the same notification. A request of
        // several steps may have begun its next one by that; no request has more than three.
        while core::mem::take(&mut self.submitted) {
            self.engine.kick();
            answered += self.reap();
        }
        let QueueParts { record, ring, .. } = &mut self.parts;
        self.occupied.0.occupy(record.log.in_flight(), self.pages.used());
        if record.log.publish(ring) | core::mem::take(&mut self.notify) {
            self.parts.stats.notifies.add(1);
            self.parts.channel.notify()?;
        }
        if self.engine_lost {
            return Err(QueueFault::EngineLost);
        }
        Ok(if taken + answered > 0 { Progress::Some } else { Progress::None })
    }

    /// To be called before waiting: asks the frontend to notify of its next request and looks once
    /// more. Wait only if it says `false`.
    ///
    /// # Errors
    /// A [`QueueFault`], as for [`poll`](Self::poll).
    pub fn final_check(&mut self) -> Result<bool, QueueFault> {
        // Here only a completion can help.
        if self.draining || self.stuck() {
            return Ok(false);
        }
        Ok(self.parts.ring.final_check()?)
    }

    /// Whether a request is waiting, by a look at shared memory that asks for nothing.
    ///
    /// # Errors
    /// A [`QueueFault`], as for [`poll`](Self::poll).
    #[inline]
    pub fn has_requests(&mut self) -> Result<bool, QueueFault> {
        Ok(!self.draining && !self.stuck() && self.parts.ring.has_requests()?)
    }

    /// Tells the queue the time, counted from any beginning: grants kept mapped that were not used
    /// for a minute are let go of. To be called before waiting, and now and then by a busy worker.
    pub fn tick(&mut self, now: Duration) {
        self.pages.tick(now);
        self.parts.stats.kept_pages.set(self.pages.kept() as u64);
    }

    /// Guest pages kept mapped for later requests. While there are any, [`tick`](Self::tick) is to
    /// be called now and then, also by a worker that waits.
    #[must_use]
    pub fn kept_pages(&self) -> usize {
        self.pages.kept()
    }

    /// Requests begun and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.active
    }

    /// Whether every request taken has been answered, also those that had to wait.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.parts.record.log.in_flight() == 0
    }

    /// Takes no more requests; those taken are still answered by [`poll`](Self::poll).
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// The engine, for a worker that waits on it.
    pub fn engine_mut(&mut self) -> &mut E {
        &mut self.engine
    }

    /// The event channel.
    pub fn channel(&self) -> &C {
        &self.parts.channel
    }

    /// The counters.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.parts.stats
    }

    /// Whether nothing can be taken before something is done.
    fn stuck(&self) -> bool {
        self.is_held_up() || self.parts.record.log.free() == 0
    }

    /// Whether a request waits for those before it. No other is submitted meanwhile, new or inherited.
    fn is_held_up(&self) -> bool {
        self.waiting.is_some() || self.barrier.is_some()
    }

    /// Hands `self.segments` to the engine for a step of a request.
    fn submit(&mut self, tag: u32, io: Io) {
        if io == Io::Flush && self.parts.disk.flush_state().has_failed() {
            return self.finish(tag, Err(FLUSH_FAILED));
        }
        self.submitted = true;
        if self.engine.submit(tag, io, &mut self.segments).is_err() {
            // An engine is made for as many operations as the ring has slots; one that does not
            // keep its word fails the request, and nothing hangs.
            self.pages.give_back(&mut self.segments);
            self.finish(tag, Err(UNSUPPORTED));
        }
    }
}
