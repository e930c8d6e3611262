//! From the ring's requests to the engine's operations, a batch at a time.

use super::{Begun, Queue, QueueFault, Then, check};
use crate::engine::{BlockEngine, Io};
use crate::pages::Buf;
use core::ops::Range;
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::proto::blkif::{DataOp, Refusal, RefusalReason, Request, Status, op};

/// A request that was begun and whose pages are not gathered yet.
#[derive(Debug)]
pub(super) struct Job {
    tag: u32,
    /// Its first step.
    io: Io,
    /// Its pages among those of the batch.
    pages: Range<usize>,
}

impl<P, C, E> Queue<P, C, E>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    E: BlockEngine<Buf<P::Mapping>>,
{
    /// Takes requests and begins them; returns how many.
    pub(super) fn take(&mut self, budget: u32) -> Result<u32, QueueFault> {
        let taken = self.choose(budget);
        // What was begun before a fault was found is done all the same.
        self.launch();
        taken
    }

    /// Takes requests and makes jobs of them.
    fn choose(&mut self, budget: u32) -> Result<u32, QueueFault> {
        let mut taken = 0;
        if let Some(request) = self.waiting.take() {
            taken += u32::from(self.admit(request));
        }
        while taken < budget && !self.stuck() {
            let Some(mut slot) = self.parts.ring.pop()? else { break };
            taken += 1;
            match Request::read(&mut slot, self.parts.abi)? {
                Ok(request) => drop(self.admit(request)),
                Err(refusal) => self.refuse(refusal),
            }
        }
        Ok(taken)
    }

    /// Begins a request or refuses it, unless it has to wait; then says `false`.
    fn admit(&mut self, request: Request) -> bool {
        let has_room = match &request {
            Request::Data { op: DataOp::WriteBarrier, .. } => self.in_flight() == 0,
            Request::Data { segments, .. } => self.pages.has_room_for(segments.len()),
            Request::Discard { .. } => true,
        };
        if has_room {
            self.begin(request);
        } else {
            self.waiting = Some(request);
        }
        has_room
    }

    /// Checks a request against the disk and makes a job of it.
    fn begin(&mut self, request: Request) {
        match request {
            Request::Data { op, id, sector, segments } => {
                let refuse = |reason| Refusal { id, op: op.code(), status: Status::Error, reason };
                if let Err(reason) = check::data(&self.geometry, op, sector, segments.iter()) {
                    return self.refuse(refuse(reason));
                }
                let (io, then) = match op {
                    DataOp::Read => (Io::Read { sector }, Then::Answer),
                    DataOp::Write => (Io::Write { sector }, Then::Answer),
                    DataOp::Flush | DataOp::WriteBarrier if segments.is_empty() => {
                        (Io::Flush, Then::Answer)
                    }
                    // Old frontends put data into a flush: it is on the medium when answered.
                    DataOp::Flush => (Io::Write { sector }, Then::Flush),
                    DataOp::WriteBarrier => (Io::Flush, Then::Write { sector }),
                };
                let bytes = segments.sectors().wrapping_mul(512);
                let tag = self.start(Begun { id, op: op.code(), bytes, then });
                if op == DataOp::WriteBarrier {
                    self.barrier = tag;
                }
                if let Some(tag) = tag {
                    let pages = self.pages.want(segments.iter(), op == DataOp::Read);
                    self.jobs.push(Job { tag, io, pages });
                }
            }
            Request::Discard { id, sector, sectors, secure } => {
                let check = check::discard(&self.geometry, sector, sectors, secure);
                if let Err((status, reason)) = check {
                    return self.refuse(Refusal { id, op: op::DISCARD, status, reason });
                }
                let begun = Begun { id, op: op::DISCARD, bytes: 0, then: Then::Answer };
                if let Some(tag) = self.start(begun) {
                    let io = Io::Discard { sector, sectors };
                    self.jobs.push(Job { tag, io, pages: 0..0 });
                }
            }
        }
    }

    fn start(&mut self, request: Begun) -> Option<u32> {
        let tag = self.free.pop();
        debug_assert!(tag.is_some(), "begun without a free tag");
        let tag = tag?;
        *self.begun.get_mut(tag as usize)? = request;
        Some(tag)
    }

    /// Gathers the pages of all jobs and hands each job to the engine.
    fn launch(&mut self) {
        if self.jobs.is_empty() {
            return;
        }
        let parts = &self.parts;
        self.pages.gather(&parts.grants, parts.frontend, &parts.stats);
        let mut jobs = core::mem::take(&mut self.jobs);
        for Job { tag, io, pages } in jobs.drain(..) {
            if !self.pages.take(pages, &mut self.segments) {
                self.fail(tag, Status::Error, RefusalReason::Grant);
                continue;
            }
            if io == Io::Flush {
                // A barrier's data waits for the flush before it.
                core::mem::swap(&mut self.segments, &mut self.held);
            }
            self.submit(tag, io);
        }
        self.jobs = jobs;
        self.pages.taken();
    }
}
