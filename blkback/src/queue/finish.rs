//! From the engine's completions to the ring's answers.

use super::answers::Turn;
use super::{Begun, FLUSH_FAILED, Queue, Then};
use crate::engine::{BlockEngine, EngineError, Io};
use crate::live::Live;
use crate::pages::{Buf, StepError};
use crate::stats::Stats;
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::proto::blkif::{Refusal, RefusalReason, Response, Status, op};

impl<P, C, E> Queue<P, C, E>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    E: BlockEngine<Buf<P::Mapping>>,
{
    /// Takes the engine's completions and goes on with each; returns how many.
    pub(super) fn reap(&mut self) -> u32 {
        let Self { engine, pages, begun, parts, .. } = self;
        engine.reap(&mut |tag, result, segments| {
            let read = begun.get(tag as usize).is_some_and(|begun| begun.op == op::READ);
            pages.returned(tag, result, read, segments);
        });
        // No answer is written before its data is with the guest and its pages are let go of.
        let finished = pages.settle(&parts.grants, parts.frontend, &parts.stats);
        let mut count = 0;
        for done in &finished {
            count += 1;
            self.finish(done.tag, done.result);
        }
        self.pages.settled(finished);
        count
    }

    /// One step of a request is done: begins the next, or answers.
    pub(super) fn finish(&mut self, tag: u32, result: Result<(), StepError>) {
        let Some(begun) = self.begun.get_mut(tag as usize) else { return };
        let next = core::mem::replace(&mut begun.then, Then::Answer);
        let answer = *begun;
        let result = match answer.was_flush(next) {
            true => flushed(&self.parts.disk, &self.parts.stats, result),
            false => result,
        };
        match (result, next) {
            (Ok(()), Then::Answer) => {
                self.end(tag);
                self.count(answer);
                self.respond(answer.turn, answer.id, answer.op, Status::Okay);
            }
            (Ok(()), Then::Flush) => self.submit(tag, Io::Flush),
            (Ok(()), Then::Write { sector }) => {
                begun.then = Then::Flush;
                core::mem::swap(&mut self.segments, &mut self.held);
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

    /// Answers a request that was begun and cannot be done.
    pub(super) fn fail(&mut self, tag: u32, status: Status, reason: RefusalReason) {
        let Some(&Begun { turn, id, op, .. }) = self.begun.get(tag as usize) else { return };
        self.end(tag);
        self.refuse(turn, Refusal { id, op, status, reason });
    }

    pub(super) fn refuse(&mut self, turn: Turn, refusal: Refusal) {
        self.parts.stats.refuse(refusal.reason);
        self.respond(turn, refusal.id, refusal.op, refusal.status);
    }

    /// Nothing of a request is under way any more.
    fn end(&mut self, tag: u32) {
        if self.barrier.take_if(|barrier| *barrier == tag).is_some() {
            // Of one that failed before its data was written.
            self.pages.give_back(&mut self.held);
        }
        self.free.push(tag);
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

    fn respond(&mut self, turn: Turn, id: u64, op: u8, status: Status) {
        let Self { answers, parts, .. } = self;
        answers.put(turn, Response { id, op, status }, |response| {
            let mut bytes = [0; 16];
            let pushed = parts.ring.push(response.write(parts.abi, &mut bytes));
            debug_assert!(pushed.is_ok(), "a request was answered twice");
        });
    }
}

/// The outcome of a flush. One that failed is remembered before it is answered, and fails all others: also
/// those that went on at the same time.
fn flushed(disk: &Live, stats: &Stats, result: Result<(), StepError>) -> Result<(), StepError> {
    let state = disk.flush_state();
    if result.is_err() {
        state.mark_failed();
    }
    if state.has_failed() {
        stats.failed_flushes.add(1);
        return result.and(Err(FLUSH_FAILED));
    }
    result
}
