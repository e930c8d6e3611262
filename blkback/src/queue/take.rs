//! From the ring's requests to the engine's operations, a batch at a time.

use super::{Begun, DEATHS_MAX, Queue, QueueFault, QueueParts, Then, check};
use crate::engine::{BlockEngine, Io};
use crate::pages::Buf;
use core::ops::Range;
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::proto::blkif::{DataOp, Refusal, RefusalReason, Request, Status, op};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

/// An indirect request that was begun and whose segments are not read yet.
#[derive(Debug)]
pub(super) struct Unread {
    tag: u32,
    op: DataOp,
    sector: u64,
    /// Its segments among those of the batch.
    table: Range<usize>,
}

/// A request that was begun and whose pages are not gathered yet.
#[derive(Debug)]
pub(super) struct Job {
    tag: u32,
    /// Its first step.
    io: Io,
    /// Its pages among those of the batch.
    pages: Range<usize>,
}

impl<P, C, E, R> Queue<P, C, E, R>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    E: BlockEngine<Buf<P::Mapping>>,
    R: SharedMemory + Clone,
{
    /// Takes requests and begins them; returns how many.
    pub(super) fn take(&mut self, budget: u32) -> Result<u32, QueueFault> {
        self.geometry.sectors = self.parts.disk.sectors();
        let taken = self.choose(budget);
        // What was begun before a fault was found is done all the same.
        self.read_segments();
        self.launch();
        taken
    }

    /// Takes requests and makes jobs of them.
    fn choose(&mut self, budget: u32) -> Result<u32, QueueFault> {
        let mut taken = 0;
        if let Some((entry, request)) = self.waiting.take() {
            taken += u32::from(self.admit(entry, request));
        }
        while !self.is_held_up()
            && let Some(entry) = self.again.pop()
        {
            taken += 1;
            self.resubmit(entry)?;
        }
        while taken < budget && !self.stuck() {
            let QueueParts { record, ring, abi, .. } = &mut self.parts;
            let Some((entry, mut slot)) = record.log.take(ring)? else { break };
            taken += 1;
            match Request::read(&mut slot, *abi)? {
                Ok(request) => drop(self.admit(entry, request)),
                Err(refusal) => self.refuse(entry, refusal),
            }
        }
        Ok(taken)
    }

    /// Begins a request that an earlier process had in flight. It is checked as any other: the disk may
    /// be another one now.
    fn resubmit(&mut self, entry: u32) -> Result<(), QueueFault> {
        let QueueParts { record, abi, .. } = &self.parts;
        let Some(mut slot) = record.log.request(entry) else { return Ok(()) };
        let request = Request::read(&mut slot, *abi)?;
        let ended_too_many = record.log.deaths(entry) >= DEATHS_MAX;
        match request {
            Err(refusal) => self.refuse(entry, refusal),
            Ok(request) if ended_too_many => {
                let (op, id) = (request.op(), request.id());
                let (status, reason) = (Status::Error, RefusalReason::Engine);
                self.refuse(entry, Refusal { id, op, status, reason });
            }
            Ok(request) => drop(self.admit(entry, request)),
        }
        Ok(())
    }

    /// Begins a request or refuses it, unless it has to wait; then says `false`.
    fn admit(&mut self, entry: u32, request: Request) -> bool {
        let has_room = match &request {
            Request::Data { op: DataOp::WriteBarrier, .. } => self.active == 0,
            Request::Data { segments, .. } => self.pages.has_room_for(segments.len()),
            // More than was offered is refused.
            Request::Indirect { indirect, .. } if indirect.segments() > self.indirect_most() => {
                true
            }
            Request::Indirect { indirect, .. } => self.pages.has_room_for(indirect.segments()),
            Request::Discard { .. } => true,
        };
        if has_room {
            self.begin(entry, request);
        } else {
            self.waiting = Some((entry, request));
        }
        has_room
    }

    /// Checks a request against the disk and makes a job of it.
    fn begin(&mut self, entry: u32, request: Request) {
        match request {
            Request::Data { op, id, sector, segments } => {
                let refuse = |reason| Refusal { id, op: op.code(), status: Status::Error, reason };
                let bytes = match check::data(&self.geometry, op, sector, segments.iter()) {
                    Ok(bytes) => bytes,
                    Err(reason) => return self.refuse(entry, refuse(reason)),
                };
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
                self.start(entry, Begun { id, op: op.code(), bytes, then });
                if op == DataOp::WriteBarrier {
                    self.barrier = Some(entry);
                }
                let pages = self.pages.want(segments.iter(), op == DataOp::Read);
                self.jobs.push(Job { tag: entry, io, pages });
            }
            Request::Indirect { op, id, sector, indirect } => {
                let most = self.indirect_most();
                if most == 0 {
                    let (op, status) = (op::INDIRECT, Status::NotSupported);
                    let reason = RefusalReason::UnknownOperation;
                    return self.refuse(entry, Refusal { id, op, status, reason });
                }
                // From here on it is what it does, to its frontend too, as Linux has it.
                let code = op.code();
                if indirect.segments() > most {
                    let (status, reason) = (Status::Error, RefusalReason::SegmentCount);
                    return self.refuse(entry, Refusal { id, op: code, status, reason });
                }
                let begun = Begun { id, op: code, bytes: 0, then: Then::Answer };
                self.start(entry, begun);
                let table = self.pages.want_tables(&indirect);
                self.unread.push(Unread { tag: entry, op, sector, table });
            }
            // Whether it is to be secure is not looked at where that was not offered (`io/blkif.h`).
            Request::Discard { id, sector, sectors, secure } => {
                let check = check::discard(&self.geometry, sector, sectors);
                if let Err((status, reason)) = check {
                    return self.refuse(entry, Refusal { id, op: op::DISCARD, status, reason });
                }
                let begun = Begun { id, op: op::DISCARD, bytes: 0, then: Then::Answer };
                self.start(entry, begun);
                let secure = secure && self.geometry.discard.is_some_and(|d| d.secure);
                let io = Io::Discard { sector, sectors, secure };
                self.jobs.push(Job { tag: entry, io, pages: 0..0 });
            }
        }
    }

    fn start(&mut self, entry: u32, request: Begun) {
        debug_assert!(self.begun.len() > entry as usize, "an entry that no slot has");
        self.active += 1;
        if let Some(begun) = self.begun.get_mut(entry as usize) {
            *begun = request;
        }
    }

    fn indirect_most(&self) -> usize {
        self.parts.max_indirect_segments as usize
    }

    /// Reads the segments of all indirect requests, checks them against the disk and makes jobs of
    /// them.
    fn read_segments(&mut self) {
        if self.unread.is_empty() {
            return;
        }
        let parts = &self.parts;
        self.pages.read_tables(&parts.grants, parts.frontend, &parts.stats);
        let mut unread = core::mem::take(&mut self.unread);
        for Unread { tag, op, sector, table } in unread.drain(..) {
            let (disk, mut bytes) = (&self.geometry, 0);
            let pages = self.pages.want_indirect(table, op == DataOp::Read, |segments| {
                bytes = check::data(disk, op, sector, segments)?;
                Ok(())
            });
            let io = if op == DataOp::Read { Io::Read { sector } } else { Io::Write { sector } };
            match pages {
                Ok(pages) => {
                    if let Some(begun) = self.begun.get_mut(tag as usize) {
                        begun.bytes = bytes;
                    }
                    self.jobs.push(Job { tag, io, pages });
                }
                Err(reason) => self.fail(tag, Status::Error, reason),
            }
        }
        self.unread = unread;
    }

    /// Gathers the pages of all jobs and hands each job to the engine.
    fn launch(&mut self) {
        if self.jobs.is_empty() {
            return;
        }
        let parts = &self.parts;
        self.pages.gather(&parts.grants, parts.frontend, &parts.stats);
        if let Some(memory) = self.pages.first_used() {
            let bytes = self.engine.register(memory);
            parts.stats.registered_pages.set((bytes / PAGE_SIZE) as u64);
        }
        let mut jobs = core::mem::take(&mut self.jobs);
        for Job { tag, io, pages } in jobs.drain(..) {
            let Self { parts, segments, .. } = self;
            let (grants, frontend, stats) = (&parts.grants, parts.frontend, &parts.stats);
            if !self.pages.take(pages, grants, frontend, stats, segments) {
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
