//! One queue of a virtual disk: from a ring's requests to an engine's operations and back.
//!
//! A state machine without I/O of its own: [`Queue::poll`] does what can be done now and never
//! blocks. One thread (or kernel loop, or simulator step) drives it; all its state is its own.

use crate::engine::{BlockEngine, EngineError, Geometry, Io, Segments};
use crate::stats::Stats;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventError};
use pvio_grant_table::{Access, DomId, GrantMapper, GrantRef};
use pvio_ring::proto::blkif::{
    Abi, DataOp, MAX_SEGMENTS, Refusal, RefusalReason, Request, Response, Segment, Status, op,
};
use pvio_ring::{BackRing, IoSeg, RingFault, ShortSlot};

/// What a queue is made of.
#[derive(Debug)]
pub struct QueueParts<P: GrantMapper, C> {
    /// The frontend's domain: whose grants are used.
    pub frontend: DomId,
    /// Maps its pages.
    pub mapper: P,
    /// The shared ring.
    pub ring: BackRing<P::Mapping>,
    /// Wakes the frontend, and us.
    pub channel: C,
    /// How the frontend lays out its requests.
    pub abi: Abi,
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
    /// The ring's slots are not those of the ABI: a mistake of ours.
    #[error(transparent)]
    Slot(#[from] ShortSlot),
    /// The worker's wait point failed, with this error of the operating system.
    #[error("waiting failed with error {0} of the operating system")]
    Wait(i32),
}

impl QueueFault {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Ring(fault) => fault.reason(),
            Self::Event(error) => error.code(),
            Self::Slot(_) => "short-slot",
            Self::Wait(_) => "wait-failed",
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
pub struct Queue<P: GrantMapper, C, E> {
    parts: QueueParts<P, C>,
    engine: E,
    geometry: Geometry,
    /// Requests begun and not answered, by the engine's tag.
    begun: Vec<Begun>,
    /// Tags not in use.
    free: Vec<u32>,
    segments: Segments<P::Mapping>,
    /// A barrier waiting for everything before it to finish.
    barrier: Option<Request>,
    /// The engine's completions on their way to their answers; reused.
    done: Vec<(u32, Result<(), EngineError>)>,
    /// The engine was given operations since it was last kicked.
    submitted: bool,
    /// Set while shutting down: nothing new is taken.
    draining: bool,
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

#[derive(Clone, Copy, Debug)]
enum Then {
    Answer,
    /// Flush, then answer.
    Flush,
    /// Write the barrier's data, flush, then answer.
    Write {
        sector: u64,
        segments: pvio_ring::proto::blkif::Segments,
    },
}

impl<P, C, E> Queue<P, C, E>
where
    P: GrantMapper,
    C: EventChannel,
    E: BlockEngine<P::Mapping>,
{
    /// A queue over an engine.
    pub fn new(parts: QueueParts<P, C>, engine: E) -> Self {
        let slots = parts.ring.layout().slots();
        let idle = Begun { id: 0, op: 0, bytes: 0, then: Then::Answer };
        Self {
            geometry: engine.geometry(),
            begun: (0..slots).map(|_| idle).collect(),
            free: (0..slots).rev().collect(),
            segments: Vec::with_capacity(MAX_SEGMENTS),
            parts,
            engine,
            barrier: None,
            done: Vec::with_capacity(slots as usize),
            submitted: false,
            draining: false,
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
        let taken = if self.draining { 0 } else { self.take(budget)? };
        // What the engine could do at once goes out with the same notification. A request of
        // several steps may have begun its next one by that; no request has more than three.
        while core::mem::take(&mut self.submitted) {
            self.engine.kick();
            answered += self.reap();
        }
        if self.parts.ring.publish() {
            self.parts.stats.notifies.add(1);
            self.parts.channel.notify()?;
        }
        Ok(if taken + answered > 0 { Progress::Some } else { Progress::None })
    }

    /// To be called before waiting: asks the frontend to notify of its next request and looks once
    /// more. Wait only if it says `false`.
    ///
    /// # Errors
    /// A [`QueueFault`], as for [`poll`](Self::poll).
    pub fn final_check(&mut self) -> Result<bool, QueueFault> {
        // With no tag left, only a completion can help.
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

    /// Requests begun and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.begun.len() - self.free.len()
    }

    /// Takes no more requests; those begun are still answered by [`poll`](Self::poll).
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
    pub fn stats(&self) -> &Stats {
        &self.parts.stats
    }

    fn stuck(&self) -> bool {
        self.barrier.is_some() || self.free.is_empty()
    }

    /// Takes requests and begins them.
    fn take(&mut self, budget: u32) -> Result<u32, QueueFault> {
        let mut taken = 0;
        if let Some(barrier) = self.barrier.take_if(|_| self.free.len() == self.begun.len()) {
            self.begin(barrier);
            taken += 1;
        }
        while taken < budget && !self.stuck() {
            let Some(mut slot) = self.parts.ring.pop()? else { break };
            taken += 1;
            match Request::read(&mut slot, self.parts.abi)? {
                Ok(request @ Request::Data { op: DataOp::WriteBarrier, .. })
                    if self.in_flight() > 0 =>
                {
                    self.barrier = Some(request);
                }
                Ok(request) => self.begin(request),
                Err(refusal) => self.refuse(refusal),
            }
        }
        Ok(taken)
    }

    /// Checks a request against the disk and begins its first step.
    fn begin(&mut self, request: Request) {
        let (id, code, first, then, bytes) = match request {
            Request::Data { op, id, sector, segments } => {
                let sectors = segments.sectors();
                if let Err(reason) = self.check_data(op, sector, &segments) {
                    return self.refuse(Refusal {
                        id,
                        op: op.code(),
                        status: Status::Error,
                        reason,
                    });
                }
                let (io, then) = match op {
                    DataOp::Read => (Io::Read { sector }, Then::Answer),
                    DataOp::Write => (Io::Write { sector }, Then::Answer),
                    DataOp::Flush | DataOp::WriteBarrier if segments.is_empty() => {
                        (Io::Flush, Then::Answer)
                    }
                    // Old frontends put data into a flush: it is on the medium when answered.
                    DataOp::Flush => (Io::Write { sector }, Then::Flush),
                    DataOp::WriteBarrier => (Io::Flush, Then::Write { sector, segments }),
                };
                let moves = !matches!(io, Io::Flush);
                if moves && let Err(reason) = self.map(&segments, op == DataOp::Read) {
                    return self.refuse(Refusal {
                        id,
                        op: op.code(),
                        status: Status::Error,
                        reason,
                    });
                }
                (id, op.code(), io, then, sectors.wrapping_mul(512))
            }
            Request::Discard { id, sector, sectors, secure } => {
                let check = self.check_discard(sector, sectors, secure);
                if let Err((status, reason)) = check {
                    return self.refuse(Refusal { id, op: op::DISCARD, status, reason });
                }
                (id, op::DISCARD, Io::Discard { sector, sectors }, Then::Answer, 0)
            }
        };
        let Some(tag) = self.free.pop() else {
            debug_assert!(false, "begun without a free tag");
            return;
        };
        if let Some(begun) = self.begun.get_mut(tag as usize) {
            *begun = Begun { id, op: code, bytes, then };
        }
        self.submit(tag, first);
    }

    fn check_data(
        &self,
        op: DataOp,
        sector: u64,
        segments: &pvio_ring::proto::blkif::Segments,
    ) -> Result<(), RefusalReason> {
        if self.geometry.read_only && op != DataOp::Read && op != DataOp::Flush {
            return Err(RefusalReason::ReadOnly);
        }
        if segments.is_empty() {
            return Ok(());
        }
        if self.geometry.read_only && op == DataOp::Flush {
            return Err(RefusalReason::ReadOnly);
        }
        self.check_range(sector, u64::from(segments.sectors()))?;
        let unit = (self.geometry.sector_size / 512).max(1);
        let whole = |s: Segment| {
            u32::from(s.first).is_multiple_of(unit) && s.sectors().is_multiple_of(unit)
        };
        if !sector.is_multiple_of(u64::from(unit)) || !segments.iter().all(whole) {
            return Err(RefusalReason::Misaligned);
        }
        Ok(())
    }

    fn check_discard(
        &self,
        sector: u64,
        sectors: u64,
        secure: bool,
    ) -> Result<(), (Status, RefusalReason)> {
        if self.geometry.discard.is_none() || secure {
            return Err((Status::NotSupported, RefusalReason::UnknownOperation));
        }
        if self.geometry.read_only {
            return Err((Status::Error, RefusalReason::ReadOnly));
        }
        self.check_range(sector, sectors).map_err(|reason| (Status::Error, reason))
    }

    fn check_range(&self, sector: u64, sectors: u64) -> Result<(), RefusalReason> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.geometry.sectors => Ok(()),
            _ => Err(RefusalReason::OutOfRange),
        }
    }

    /// Maps the pages of a request into `self.segments`: all of them or none.
    fn map(
        &mut self,
        data: &pvio_ring::proto::blkif::Segments,
        into_guest: bool,
    ) -> Result<(), RefusalReason> {
        // The backend writes guest memory when the guest reads the disk.
        let access = if into_guest { Access::ReadWrite } else { Access::ReadOnly };
        let mut grefs = [GrantRef::default(); MAX_SEGMENTS];
        for (gref, segment) in grefs.iter_mut().zip(data.iter()) {
            *gref = segment.gref;
        }
        let grefs = grefs.get(..data.len()).unwrap_or_default();
        let segments = &mut self.segments;
        segments.clear();
        let mut all = true;
        self.parts.mapper.map_each(self.parts.frontend, grefs, access, &mut |i, mapped| match (
            mapped,
            data.iter().nth(i),
        ) {
            (Ok(buf), Some(s)) => {
                segments.push(IoSeg { buf, offset: s.offset(), len: s.len() });
            }
            _ => all = false,
        });
        if all && segments.len() == data.len() {
            return Ok(());
        }
        segments.clear();
        Err(RefusalReason::Grant)
    }

    /// Takes the engine's completions and goes on with each; returns how many.
    fn reap(&mut self) -> u32 {
        let mut done = core::mem::take(&mut self.done);
        self.engine.reap(&mut |tag, result| done.push((tag, result)));
        let mut count = 0;
        for (tag, result) in done.drain(..) {
            count += 1;
            self.finish(tag, result);
        }
        self.done = done;
        count
    }

    /// One step of a request is done: begins the next, or answers.
    fn finish(&mut self, tag: u32, result: Result<(), EngineError>) {
        let Some(begun) = self.begun.get_mut(tag as usize) else { return };
        let next = core::mem::replace(&mut begun.then, Then::Answer);
        let answer = *begun;
        let step = match (result, next) {
            (Ok(()), Then::Answer) => None,
            (Ok(()), Then::Flush) => Some(Ok(Io::Flush)),
            (Ok(()), Then::Write { sector, segments }) => {
                begun.then = Then::Flush;
                Some(self.map(&segments, false).map(|()| Io::Write { sector }))
            }
            (Err(_), _) => Some(Err(RefusalReason::Engine)),
        };
        match step {
            None => {
                self.free.push(tag);
                self.count(answer);
                self.respond(answer.id, answer.op, Status::Okay);
            }
            Some(Ok(io)) => self.submit(tag, io),
            Some(Err(reason)) => {
                self.free.push(tag);
                let status = match result {
                    Err(EngineError::Unsupported) => Status::NotSupported,
                    _ => Status::Error,
                };
                self.refuse(Refusal { id: answer.id, op: answer.op, status, reason });
            }
        }
    }

    fn submit(&mut self, tag: u32, io: Io) {
        self.submitted = true;
        if self.engine.submit(tag, io, &mut self.segments).is_err() {
            // An engine is made for as many operations as the ring has slots; one that does not
            // keep its word fails the request, and nothing hangs.
            self.segments.clear();
            self.finish(tag, Err(EngineError::Unsupported));
        }
    }

    fn count(&self, answer: Begun) {
        let (stats, bytes) = (&self.parts.stats, u64::from(answer.bytes));
        match answer.op {
            op::READ => {
                stats.reads.add(1);
                stats.read_bytes.add(bytes);
            }
            op::WRITE | op::WRITE_BARRIER => {
                stats.writes.add(1);
                stats.written_bytes.add(bytes);
            }
            op::FLUSH_DISKCACHE => stats.flushes.add(1),
            _ => stats.discards.add(1),
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.parts.stats.refuse(refusal.reason);
        self.respond(refusal.id, refusal.op, refusal.status);
    }

    fn respond(&mut self, id: u64, op: u8, status: Status) {
        let mut bytes = [0; 16];
        let response = Response { id, op, status }.write(self.parts.abi, &mut bytes);
        let pushed = self.parts.ring.push(response);
        debug_assert!(pushed.is_ok(), "a request was answered twice");
    }
}
