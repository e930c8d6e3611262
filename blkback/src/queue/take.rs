//! Conversion of the ring's requests to the engine's operations, in batches.

use super::{DEATHS_MAX, InFlight, NextStep, Queue, QueueFault, QueueParts, check};
use crate::engine::{BlockEngine, Io};
use crate::pages::{Batch, Buf, Declaring, Gathered, PageRange, TableRange, TablesRead};
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::proto::blkif::{DataOp, Refusal, RefusalReason, Request, Status, op};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

/// An accepted indirect request whose segments have not been read.
#[derive(Debug)]
pub(super) struct IndirectJob {
    tag: u32,
    op: DataOp,
    sector: u64,
    table: TableRange,
}

/// An accepted request whose pages have not been gathered.
#[derive(Debug)]
pub(super) struct Job {
    tag: u32,
    /// Its first operation.
    io: Io,
    pages: PageRange,
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
        let mut batch = self.pages.batch();
        let taken = self.accept_all(budget, &mut batch);
        // Requests that were accepted before a fault was found are submitted.
        let mut batch = batch.read_tables(&mut self.pages, self.parts.context());
        self.check_indirect(&mut batch);
        let batch = batch.gather(&mut self.pages, self.parts.context());
        self.submit_jobs(batch);
        taken
    }

    /// Takes requests and creates jobs for them.
    fn accept_all(
        &mut self,
        budget: u32,
        batch: &mut Batch<P::Mapping, Declaring>,
    ) -> Result<u32, QueueFault> {
        let mut taken = 0;
        if let Some((entry, request)) = self.waiting.take() {
            taken += u32::from(self.accept(entry, request, batch));
        }
        while !self.must_wait()
            && let Some(entry) = self.inherited.pop()
        {
            taken += 1;
            self.resubmit(entry, batch)?;
        }
        while taken < budget && !self.is_blocked() {
            let QueueParts { record, ring, abi, .. } = &mut self.parts;
            let Some((entry, mut slot)) = record.log.take(ring)? else { break };
            taken += 1;
            match Request::read(&mut slot, *abi)? {
                Ok(request) => drop(self.accept(entry, request, batch)),
                Err(refusal) => self.refuse(entry, refusal),
            }
        }
        Ok(taken)
    }

    /// Accepts an inherited request. It is checked like any other, because the disk may have
    /// changed.
    fn resubmit(
        &mut self,
        entry: u32,
        batch: &mut Batch<P::Mapping, Declaring>,
    ) -> Result<(), QueueFault> {
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
            Ok(request) => drop(self.accept(entry, request, batch)),
        }
        Ok(())
    }

    /// Accepts or rejects a request. Returns `false` if the request must wait instead.
    fn accept(
        &mut self,
        entry: u32,
        request: Request,
        batch: &mut Batch<P::Mapping, Declaring>,
    ) -> bool {
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
            self.create_job(entry, request, batch);
        } else {
            self.waiting = Some((entry, request));
        }
        has_room
    }

    /// Checks a request against the disk and creates a job for it.
    fn create_job(
        &mut self,
        entry: u32,
        request: Request,
        batch: &mut Batch<P::Mapping, Declaring>,
    ) {
        match request {
            Request::Data { op, id, sector, segments } => {
                let refuse = |reason| Refusal { id, op: op.code(), status: Status::Error, reason };
                let bytes = match check::data(&self.geometry, op, sector, segments.iter()) {
                    Ok(bytes) => bytes,
                    Err(reason) => return self.refuse(entry, refuse(reason)),
                };
                let (io, next) = match op {
                    DataOp::Read => (Io::Read { sector }, NextStep::Respond),
                    DataOp::Write => (Io::Write { sector }, NextStep::Respond),
                    DataOp::Flush | DataOp::WriteBarrier if segments.is_empty() => {
                        (Io::Flush, NextStep::Respond)
                    }
                    // Old frontends attach data to a flush request: the data is durable when the request
                    // completes.
                    DataOp::Flush => (Io::Write { sector }, NextStep::Flush),
                    DataOp::WriteBarrier => (Io::Flush, NextStep::Write { sector }),
                };
                self.track(entry, InFlight { id, op: op.code(), bytes, next });
                if op == DataOp::WriteBarrier {
                    self.barrier = Some(entry);
                }
                let pages = batch.declare(&mut self.pages, segments.iter(), op == DataOp::Read);
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
                if indirect.segments() > most && !pvio_ring::planted!(IndirectCount) {
                    let (status, reason) = (Status::Error, RefusalReason::SegmentCount);
                    return self.refuse(entry, Refusal { id, op: code, status, reason });
                }
                let next = NextStep::Respond;
                self.track(entry, InFlight { id, op: code, bytes: 0, next });
                let table = batch.declare_tables(&mut self.pages, &indirect);
                self.indirect.push(IndirectJob { tag: entry, op, sector, table });
            }
            // The secure flag is ignored where secure discard was not advertised (`io/blkif.h`).
            Request::Discard { id, sector, sectors, secure } => {
                let check = check::discard(&self.geometry, sector, sectors);
                if let Err((status, reason)) = check {
                    return self.refuse(entry, Refusal { id, op: op::DISCARD, status, reason });
                }
                let next = NextStep::Respond;
                self.track(entry, InFlight { id, op: op::DISCARD, bytes: 0, next });
                let secure = secure && self.geometry.discard.is_some_and(|d| d.secure);
                let io = Io::Discard { sector, sectors, secure };
                self.jobs.push(Job { tag: entry, io, pages: PageRange::empty() });
            }
        }
    }

    /// Notes an accepted request until its response.
    fn track(&mut self, entry: u32, request: InFlight) {
        debug_assert!(self.requests.len() > entry as usize, "an entry that no slot has");
        self.active += 1;
        if let Some(place) = self.requests.get_mut(entry as usize) {
            *place = request;
        }
    }

    fn indirect_most(&self) -> usize {
        self.parts.max_indirect_segments as usize
    }

    /// Checks the segments of all indirect requests against the disk and creates jobs for them.
    fn check_indirect(&mut self, batch: &mut Batch<P::Mapping, TablesRead>) {
        let mut indirect = core::mem::take(&mut self.indirect);
        for IndirectJob { tag, op, sector, table } in indirect.drain(..) {
            let (disk, mut bytes) = (&self.geometry, 0);
            let into_guest = op == DataOp::Read;
            let pages = batch.declare(&mut self.pages, table, into_guest, |segments| {
                bytes = check::data(disk, op, sector, segments)?;
                Ok(())
            });
            let io = if into_guest { Io::Read { sector } } else { Io::Write { sector } };
            match pages {
                Ok(pages) => {
                    if let Some(request) = self.requests.get_mut(tag as usize) {
                        request.bytes = bytes;
                    }
                    self.jobs.push(Job { tag, io, pages });
                }
                Err(reason) => self.fail(tag, Status::Error, reason),
            }
        }
        self.indirect = indirect;
    }

    /// Submits each job to the engine with its pages.
    fn submit_jobs(&mut self, mut batch: Batch<P::Mapping, Gathered>) {
        if let Some(memory) = batch.unregistered(&mut self.pages) {
            let bytes = self.engine.register(memory);
            self.parts.stats.registered_pages.set((bytes / PAGE_SIZE) as u64);
        }
        let mut jobs = core::mem::take(&mut self.jobs);
        for Job { tag, io, pages } in jobs.drain(..) {
            let Self { parts, segments, .. } = self;
            if !batch.take(&mut self.pages, parts.context(), pages, segments) {
                self.fail(tag, Status::Error, RefusalReason::Grant);
                continue;
            }
            if io == Io::Flush {
                // A barrier keeps its data until the flush before it completes.
                core::mem::swap(&mut self.segments, &mut self.barrier_segments);
            }
            self.submit(tag, io);
        }
        self.jobs = jobs;
        batch.finish(&mut self.pages);
    }
}
