//! Conversion of the engine's completions to the ring's responses.

use super::{FLUSH_FAILED, InFlight, NextStep, Queue, QueueParts};
use crate::disk_state::DiskState;
use crate::engine::{BlockEngine, EngineError, Io};
use crate::pages::{Buf, StepError};
use crate::stats::Stats;
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::inflight::Record;
use pvio_ring::proto::blkif::{Refusal, RefusalReason, Response, Status, op};
use pvio_ring::shm::SharedMemory;

impl<P, C, E, R> Queue<P, C, E, R>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    E: BlockEngine<Buf<P::Mapping>>,
    R: SharedMemory + Clone,
{
    /// Processes the engine's completions. Returns their number.
    pub(super) fn reap(&mut self) -> u32 {
        let Self { engine, pages, requests, parts, .. } = self;
        let mut completions = pages.completions();
        engine.reap(&mut |tag, result, segments| {
            let read = requests.get(tag as usize).is_some_and(|request| request.op == op::READ);
            completions.push(tag, result, read, segments);
        });
        // A response is written only after its data has been copied to the guest and its pages were
        // released.
        let settled = completions.settle(pages, parts.context());
        let mut count = 0;
        for (tag, result) in settled.results() {
            count += 1;
            self.finish(tag, result);
        }
        settled.finish(&mut self.pages);
        count
    }

    /// Continues a request after one of its steps has completed: submits the next step, or
    /// completes the request.
    pub(super) fn finish(&mut self, tag: u32, result: Result<(), StepError>) {
        let Some(request) = self.requests.get_mut(tag as usize) else { return };
        let next = core::mem::replace(&mut request.next, NextStep::Respond);
        let completed = *request;
        let result = match completed.was_flush(next) {
            true => {
                let QueueParts { disk, stats, record, .. } = &self.parts;
                flushed(disk, stats, &record.device, result)
            }
            false => result,
        };
        match (result, next) {
            (Ok(()), NextStep::Respond) => {
                self.end(tag);
                self.count(completed);
                self.respond(tag, completed.id, completed.op, Status::Okay);
            }
            (Ok(()), NextStep::Flush) => self.submit(tag, Io::Flush),
            (Ok(()), NextStep::Write { sector }) => {
                request.next = NextStep::Flush;
                core::mem::swap(&mut self.segments, &mut self.barrier_segments);
                self.submit(tag, Io::Write { sector });
            }
            (Err(StepError::Engine(EngineError::Unsupported)), _) => {
                self.fail(tag, Status::NotSupported, RefusalReason::Engine);
            }
            (Err(StepError::Engine(error)), _) => {
                self.engine_lost |= error == EngineError::Lost;
                self.fail(tag, Status::Error, RefusalReason::Engine);
            }
            (Err(StepError::Grant), _) => self.fail(tag, Status::Error, RefusalReason::Grant),
        }
    }

    /// Completes a submitted request with an error.
    pub(super) fn fail(&mut self, tag: u32, status: Status, reason: RefusalReason) {
        let Some(&InFlight { id, op, .. }) = self.requests.get(tag as usize) else { return };
        self.end(tag);
        self.refuse(tag, Refusal { id, op, status, reason });
    }

    /// Completes a request that was rejected.
    pub(super) fn refuse(&mut self, entry: u32, refusal: Refusal) {
        self.parts.stats.refuse(refusal.reason);
        self.respond(entry, refusal.id, refusal.op, refusal.status);
    }

    /// Removes a request that has no operation in flight any more.
    fn end(&mut self, tag: u32) {
        if self.barrier.take_if(|barrier| *barrier == tag).is_some() {
            // A barrier that failed before its data was written holds its pages still.
            self.pages.release(&mut self.barrier_segments);
        }
        self.active -= 1;
    }

    fn count(&self, completed: InFlight) {
        let (stats, bytes) = (&self.parts.stats, u64::from(completed.bytes));
        match completed.op {
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

    /// Completes a request. The response stays private until all responses are published.
    fn respond(&mut self, entry: u32, id: u64, op: u8, status: Status) {
        let QueueParts { record, abi, .. } = &mut self.parts;
        let mut bytes = [0; 16];
        record.log.complete(entry, Response { id, op, status }.write(*abi, &mut bytes));
    }
}

/// Processes the outcome of a flush. A failure is recorded before its response is written, and
/// fails all other flushes, including concurrent ones.
fn flushed<R: SharedMemory + Clone>(
    disk: &DiskState,
    stats: &Stats,
    record: &Record<R>,
    result: Result<(), StepError>,
) -> Result<(), StepError> {
    let state = disk.flush_state();
    if result.is_err() && !pvio_ring::planted!(FlushErrorForgotten) {
        state.mark_failed();
    }
    if state.has_failed() {
        record.set_flush_failed(!pvio_ring::planted!(FlushErrorNotRecorded));
        stats.failed_flushes.add(1);
        return result.and(Err(FLUSH_FAILED));
    }
    result
}
