//! The section of a ring whose requests are answered in the order they were made.

use super::RecordError;
use crate::back::BackRing;
use crate::layout::{RingFault, RingLayout};
use crate::shm::slot::Slot;
use crate::shm::{Region, SharedMemory};
use core::sync::atomic::Ordering::{Acquire, Release};

/// Where the numbers are; the entries begin one cache line further.
const ANSWERED: usize = 0;
const COMPLETE: usize = 8;
const TAKEN: usize = 16;
const DEATHS: usize = 24;
const ENTRIES: usize = 64;

const RESPONSE_MAX: usize = 16;

/// Numbers above it are none that this code counts to.
const NUMBER_MAX: u64 = 1 << 62;

/// The processes that have ended with the same requests in flight from which on these are given up.
pub const ORDERED_DEATHS_MAX: u64 = 2;

/// The record of a ring that is answered in order: a vif's transmit and receive rings. Request number
/// `i` and its response are in entry `i` modulo the number of slots. (It can be cloned for a model
/// checker, which goes on from one state in several ways; two clones must not be used side by side.)
///
/// Three numbers are recorded, `answered <= complete <= taken`:
///
/// | number | requests below it |
/// |---|---|
/// | `answered` | have a response that the frontend can see |
/// | `complete` | are done, and their responses are in the record |
/// | `taken` | are in the record, each packet's as a whole; their slots in the ring are never read again |
///
/// A process that is killed between a packet's leaving and `complete` leaves it to be sent a second time.
///
/// A fourth word counts the processes that ended while requests were in flight (`complete < taken`) and
/// `complete` stood at the same number: the number times 4, plus the count. Requests in flight when
/// [`ORDERED_DEATHS_MAX`] processes ended so are [given up](Self::gives_up).
#[derive(Clone, Debug)]
pub struct OrderedLog<M> {
    memory: M,
    entries: u32,
    /// Bytes between one entry and the next.
    stride: usize,
    slot_size: usize,
    response_size: usize,
    /// As recorded.
    answered: u64,
    /// As recorded.
    taken: u64,
    /// Requests handed out. Fewer than `taken` while requests of a predecessor are handed out again,
    /// more while a packet is read.
    next: u64,
    /// Requests that have a response, private or not.
    responded: u64,
    /// Requests below it that are handed out again are given up.
    given_up: u64,
}

impl<M: SharedMemory> OrderedLog<M> {
    /// Bytes of a section for a ring of this layout.
    #[must_use]
    pub fn section_len(layout: RingLayout, response_size: usize) -> usize {
        let entries = stride(layout, response_size).saturating_mul(layout.slots() as usize);
        entries.saturating_add(ENTRIES)
    }

    /// The record of a ring that nobody has served before. `memory` is a section full of zeros.
    ///
    /// # Errors
    /// [`RecordError::Size`].
    pub fn new<R: SharedMemory>(
        memory: M,
        ring: &BackRing<R>,
        response_size: usize,
    ) -> Result<Self, RecordError> {
        let mut log = Self::sized(memory, ring.layout(), response_size)?;
        log.start_at(ring.produced().into());
        log.taken = log.next;
        for number in [ANSWERED, COMPLETE, TAKEN] {
            log.memory.store_u64(number, log.next, Release);
        }
        Ok(log)
    }

    /// The record that a predecessor left of a ring, which was attached just now and not used yet: to be
    /// [resumed](BackRing::resume) with [`unanswered`](Self::unanswered). Responses that were complete
    /// go out with the next [`publish`](Self::publish); requests that were not are
    /// [taken](Self::take) again.
    ///
    /// # Errors
    /// A [`RecordError`]: the session cannot go on.
    pub fn resume<R: SharedMemory>(
        memory: M,
        ring: &BackRing<R>,
        response_size: usize,
    ) -> Result<Self, RecordError> {
        let mut log = Self::sized(memory, ring.layout(), response_size)?;
        let load = |number| log.memory.load_u64(number, Acquire).unwrap_or(u64::MAX);
        let (answered, complete, taken) = (load(ANSWERED), load(COMPLETE), load(TAKEN));
        let produced = ring.produced();
        let open = taken.checked_sub(answered).filter(|open| *open <= log.entries.into());
        let Some(open) = open.filter(|_| taken < NUMBER_MAX) else {
            return Err(RecordError::Numbers { answered, complete, taken });
        };
        // What is visible to the guest is never more than was taken, and complete.
        let visible = u64::from(produced.wrapping_sub(answered as u32));
        if visible > open {
            let (answered, done) = (answered as u32, open as u32);
            return Err(RecordError::Producer { produced, answered, done });
        }
        let first = answered.saturating_add(visible);
        if !(first..=taken).contains(&complete) {
            return Err(RecordError::Numbers { answered, complete, taken });
        }
        log.start_at(complete);
        (log.answered, log.taken) = (first, taken);
        if complete < taken && log.charge_death(complete) >= ORDERED_DEATHS_MAX {
            log.given_up = taken;
        }
        // Before any entry is used again.
        log.memory.store_u64(ANSWERED, first, Release);
        Ok(log)
    }

    /// Records that a process ended with requests in flight and `complete` at this number; returns how many
    /// have.
    fn charge_death(&self, complete: u64) -> u64 {
        let recorded = self.memory.load_u64(DEATHS, Acquire).unwrap_or_default();
        let before = if recorded >> 2 == complete { recorded & 3 } else { 0 };
        let deaths = before.saturating_add(1).min(3);
        self.store(DEATHS, complete << 2 | deaths);
        deaths
    }

    /// Whether too many processes have ended with the next request in flight: it is to be answered with an
    /// error.
    #[inline]
    #[must_use]
    pub fn gives_up(&self) -> bool {
        self.next < self.given_up
    }

    /// Number of requests that are given up and were not handed out yet.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.given_up.saturating_sub(self.next)
    }

    fn start_at(&mut self, number: u64) {
        (self.answered, self.responded, self.next) = (number, number, number);
    }

    fn sized(memory: M, layout: RingLayout, response_size: usize) -> Result<Self, RecordError> {
        let (found, needed) = (memory.len(), Self::section_len(layout, response_size));
        if found < needed || !memory.writable() || response_size > RESPONSE_MAX {
            return Err(RecordError::Size { found, needed });
        }
        Ok(Self {
            memory,
            entries: layout.slots(),
            stride: stride(layout, response_size),
            slot_size: layout.slot_size(),
            response_size,
            answered: 0,
            taken: 0,
            next: 0,
            responded: 0,
            given_up: 0,
        })
    }

    /// Requests taken and not visibly answered, as the record has it.
    #[must_use]
    pub fn unanswered(&self) -> u32 {
        self.taken.saturating_sub(self.answered) as u32
    }

    /// Requests that wait, as far as the last look at the ring showed.
    #[inline]
    #[must_use]
    pub fn waiting<R: SharedMemory>(&self, ring: &BackRing<R>) -> u32 {
        self.left_over().saturating_add(ring.waiting())
    }

    /// Whether a request is waiting.
    ///
    /// # Errors
    /// As [`BackRing::pop`].
    #[inline]
    pub fn has_requests<R: SharedMemory>(&self, ring: &mut BackRing<R>) -> Result<bool, RingFault> {
        Ok(self.left_over() > 0 || ring.has_requests()?)
    }

    /// Reads the ring's request producer, and returns how many requests wait.
    ///
    /// # Errors
    /// As [`BackRing::pop`].
    #[inline]
    pub fn look<R: SharedMemory>(&self, ring: &mut BackRing<R>) -> Result<u32, RingFault> {
        Ok(self.left_over().saturating_add(ring.look()?))
    }

    /// As [`BackRing::final_check_for`].
    ///
    /// # Errors
    /// As [`BackRing::pop`].
    pub fn final_check_for<R: SharedMemory>(
        &self,
        ring: &mut BackRing<R>,
        needed: u32,
    ) -> Result<bool, RingFault> {
        let needed = needed.saturating_sub(self.left_over());
        if needed == 0 { Ok(true) } else { ring.final_check_for(needed) }
    }

    /// Requests of a predecessor that have not been handed out again.
    #[inline(always)]
    fn left_over(&self) -> u32 {
        self.taken.saturating_sub(self.next) as u32
    }

    /// The next request, to be parsed from the record, where it was copied to from the ring. `None` when
    /// there is no request. To be followed by [`record_taken`](Self::record_taken), after the last
    /// slot of a packet.
    ///
    /// # Errors
    /// As [`BackRing::pop`].
    #[inline]
    pub fn take<R: SharedMemory>(
        &mut self,
        ring: &mut BackRing<R>,
    ) -> Result<Option<Slot<'_, M>>, RingFault> {
        let at = self.at(self.next);
        if self.left_over() == 0 {
            let Some(slot) = ring.pop()? else { return Ok(None) };
            // Of a section's own size, so every store is inside.
            let copied = self.memory.write_slot(at, slot);
            debug_assert!(copied.is_some(), "an entry outside of its section");
        }
        self.next = self.next.saturating_add(1);
        Ok(self.memory.slot(at, self.slot_size))
    }

    /// Records that the requests handed out so far are taken.
    #[inline]
    pub fn record_taken(&mut self) {
        if self.next > self.taken {
            self.taken = self.next;
            self.store(TAKEN, self.taken);
        }
    }

    /// Answers the oldest request without a response. The response is private until
    /// [`publish`](Self::publish).
    #[inline]
    pub fn respond(&mut self, response: &[u8]) {
        debug_assert!(self.responded < self.taken, "more responses than requests");
        let at = self.at(self.responded).saturating_add(self.slot_size);
        let written = self.memory.write_words(at, response);
        debug_assert!(written.is_some() && response.len() == self.response_size);
        self.responded = self.responded.saturating_add(1);
    }

    /// Whether there are responses to publish.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        self.responded != self.answered
    }

    /// Records that all requests with a response are done: their packets have left, nothing of them is
    /// in use. Then writes the responses to the ring, shows them to the frontend, and records that;
    /// tells whether the frontend must be notified. There is no system call in between.
    #[inline]
    #[must_use = "a frontend that asked to be notified sleeps until it is"]
    pub fn publish<R: SharedMemory>(&mut self, ring: &mut BackRing<R>) -> bool {
        if !self.has_pending() {
            return false;
        }
        self.store(COMPLETE, self.responded);
        let mut response = [0; RESPONSE_MAX];
        let response = response.get_mut(..self.response_size).unwrap_or_default();
        for number in self.answered..self.responded {
            let at = self.at(number).saturating_add(self.slot_size);
            let read = self.memory.read_words(at, response);
            let pushed = ring.push(response);
            debug_assert!(read.is_some() && pushed.is_ok(), "more responses than requests");
        }
        let notify = ring.publish();
        self.answered = self.responded;
        self.store(ANSWERED, self.answered);
        notify
    }

    #[inline(always)]
    fn at(&self, number: u64) -> usize {
        // A ring has a power of two slots.
        let entry = number & u64::from(self.entries.saturating_sub(1));
        ENTRIES.saturating_add((entry as usize).saturating_mul(self.stride))
    }

    #[inline(always)]
    fn store(&self, at: usize, number: u64) {
        let stored = self.memory.store_u64(at, number, Release);
        debug_assert!(stored, "a number outside of its section");
    }
}

/// Bytes of one entry: the request, then the response.
fn stride(layout: RingLayout, response_size: usize) -> usize {
    layout.slot_size().saturating_add(response_size).next_multiple_of(8)
}
