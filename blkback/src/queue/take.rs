//! Conversion of the ring's requests to the engine's operations, in batches.

use super::{Begun, DEATHS_MAX, Queue, QueueFault, QueueParts, Then, check};
use crate::engine::{BlockEngine, Io};
use crate::pages::Buf;
use core::ops::Range;
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::proto::blkif::{DataOp, Refusal, RefusalReason, Request, Status, op};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

/// An accepted indirect request whose segments have not been read.
#[derive(Debug)]
pub(super) struct Unread {
    tag: u32,
    op: DataOp,
    sector: u64,
    /// The range of its segments among those of the batch.
    table: Range<usize>,
}

/// An accepted request whose pages have not been gathered.
#[derive(Debug)]
pub(super) struct Job {
    tag: u32,
    /// Its first operation.
    io: Io,
    /// The range of its pages among those of the batch.
    pages: Range<usize>,
}

impl<P, C, E, R> Queue<P, C, E, R>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    E: BlockEngine<Buf<P::Mapping>>,
    R: SharedMemory + Clone,
{
    /// Takes requests and submits them. Returns their number.
    pub(super) fn take(&mut self, budget: u32) -> Result<u32, QueueFault> {
        self.geometry.sectors = self.parts.disk.sectors();
        let taken = self.choose(budget);
        // Requests that were accepted before a fault was found are submitted.
        self.read_segments();
        self.launch();
        taken
    }

    /// Takes requests and creates jobs for them.
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

    /// Accepts an inherited request. It is checked like any other, because the disk may have
    /// changed.
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

    /// Accepts or rejects a request. Returns `false` if the request must wait instead.
    fn admit(&mut self, entry: u32, request: Request) -> bool {
        let has_room = match &request {
            Request::Data { op: DataOp::WriteBarrier, .. } => self.active == 0,
            Request::Data { segments, .. } => self.pages.has_room_for(segments.len()),
            // A request with more segments than advertised is rejected later.
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

    /// Checks a request against the disk and creates a job for it.
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
                    // Old frontends attach data to a flush request: the data is durable when the request
                    // completes.
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
                // From here on its operation is the inner one, also in responses, as in Linux's
                // backend.
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
            // The secure flag is ignored where secure discard was not advertised (`io/blkif.h`).
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

    /// Reads the segments of all indirect requests, checks them against the disk and creates jobs
    /// for them.
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

    /// Gathers the pages of all jobs and submits each job to the engine.
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
                // A barrier's data is held until the flush before it completes.
                core::mem::swap(&mut self.segments, &mut self.held);
            }
            self.submit(tag, io);
        }
        self.jobs = jobs;
        self.pages.taken();
    }
}
