//! The section of a ring whose requests are completed in the order they were made.

use super::RecordError;
use crate::back::BackRing;
use crate::layout::{RingFault, RingLayout};
use crate::shm::slot::Slot;
use crate::shm::{Region, SharedMemory};
use core::sync::atomic::Ordering::{Acquire, Release};

/// Offsets of the numbers; the entries begin at the next cache line.
const ANSWERED: usize = 0;
const COMPLETE: usize = 8;
const TAKEN: usize = 16;
const DEATHS: usize = 24;
const ENTRIES: usize = 64;

const RESPONSE_MAX: usize = 16;

/// Exclusive bound of all numbers; a larger one in a record is malformed.
const NUMBER_MAX: u64 = 1 << 62;

/// Number of processes that may end with the same requests in flight before these are given up.
pub const ORDERED_DEATHS_MAX: u64 = 2;

/// The record of a ring whose requests are completed in order: a vif's transmit and receive rings.
/// Request number `i` and its response are in entry `i` modulo the number of slots. (It can be
/// cloned for a model checker, which continues from one state in several ways; two clones must not
/// be used concurrently.)
///
/// Three numbers are recorded, `answered <= complete <= taken`:
///
/// | number | requests below it |
/// |---|---|
/// | `answered` | have a response that is published |
/// | `complete` | are done, and their responses are in the record |
/// | `taken` | are in the record, each packet's as a whole; their slots in the ring are never read again |
///
/// If a process is killed between sending a packet and storing `complete`, the packet is sent a
/// second time.
///
/// A fourth word counts the processes that ended while requests were in flight (`complete < taken`)
/// and `complete` had the same value: that value times 4, plus the count. Requests that were in
/// flight when [`ORDERED_DEATHS_MAX`] such processes ended are [given up](Self::gives_up).
#[derive(Clone, Debug)]
pub struct OrderedLog<M> {
    memory: M,
    entries: u32,
    /// Distance between two entries, in bytes.
    stride: usize,
    slot_size: usize,
    response_size: usize,
    /// Value in the record.
    answered: u64,
    /// Value in the record.
    taken: u64,
    /// Number of requests handed out. Less than `taken` while requests of a previous process are
    /// handed out again, more while a packet is read.
    next: u64,
    /// Number of requests that have a response, published or not.
    responded: u64,
    /// Requests below this number that are handed out again are given up.
    given_up: u64,
}

impl<M: SharedMemory> OrderedLog<M> {
    /// Returns the size of a section for a ring of this layout, in bytes.
    #[must_use]
    pub fn section_len(layout: RingLayout, response_size: usize) -> usize {
        let entries = stride(layout, response_size).saturating_mul(layout.slots() as usize);
        entries.saturating_add(ENTRIES)
    }

    /// Creates the record of a ring that no process has served. `memory` is a zeroed section.
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

    /// Opens the record that a previous process left of a ring. The ring was just attached and not
    /// used yet; it is to be [resumed](BackRing::resume) with [`unanswered`](Self::unanswered).
    /// Responses that were complete are published by the next [`publish`](Self::publish); requests
    /// that were not are [taken](Self::take) again.
    ///
    /// # Errors
    /// A [`RecordError`]: the session cannot be resumed.
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
        // The guest never sees more responses than requests that were taken and complete.
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
        // This store precedes the reuse of any entry.
        log.memory.store_u64(ANSWERED, first, Release);
        Ok(log)
    }

    /// Records that a process ended with requests in flight and `complete` at this number; returns
    /// the number of such processes.
    fn charge_death(&self, complete: u64) -> u64 {
        let recorded = self.memory.load_u64(DEATHS, Acquire).unwrap_or_default();
        let before = if recorded >> 2 == complete { recorded & 3 } else { 0 };
        let deaths = before.saturating_add(1).min(3);
        self.store(DEATHS, complete << 2 | deaths);
        deaths
    }

    /// Returns whether the next request is given up because too many processes ended with it in
    /// flight: the caller completes it with an error.
    #[inline]
    #[must_use]
    pub fn gives_up(&self) -> bool {
        self.next < self.given_up
    }

    /// Returns the number of requests that are given up and were not handed out yet.
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

    /// Returns the number of requests taken whose responses are not published, according to the
    /// record.
    #[must_use]
    pub fn unanswered(&self) -> u32 {
        self.taken.saturating_sub(self.answered) as u32
    }

    /// Returns the number of available requests, as of the last read of the ring.
    #[inline]
    #[must_use]
    pub fn waiting<R: SharedMemory>(&self, ring: &BackRing<R>) -> u32 {
        self.left_over().saturating_add(ring.waiting())
    }

    /// Returns whether a request is available.
    ///
    /// # Errors
    /// As [`BackRing::pop`].
    #[inline]
    pub fn has_requests<R: SharedMemory>(&self, ring: &mut BackRing<R>) -> Result<bool, RingFault> {
        Ok(self.left_over() > 0 || ring.has_requests()?)
    }

    /// Reads the ring's request producer, and returns the number of available requests.
    ///
    /// # Errors
    /// As [`BackRing::pop`].
    #[inline]
    pub fn look<R: SharedMemory>(&self, ring: &mut BackRing<R>) -> Result<u32, RingFault> {
        Ok(self.left_over().saturating_add(ring.look()?))
    }

    /// Checks as [`BackRing::final_check_for`] does.
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

    /// Returns the number of requests of a previous process that have not been handed out again.
    #[inline(always)]
    fn left_over(&self) -> u32 {
        self.taken.saturating_sub(self.next) as u32
    }

    /// Returns the next request, copied from the ring into the record, to be parsed from there.
    /// `None` if there is no request. Must be followed by [`record_taken`](Self::record_taken),
    /// after the last slot of a packet.
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
            // The size was validated with the section, so every store is within it.
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
            if !crate::planted!(TakenNotRecorded) {
                self.store(TAKEN, self.taken);
            }
        }
    }

    /// Stores the response to the oldest request without one. The response is private until
    /// [`publish`](Self::publish).
    #[inline]
    pub fn respond(&mut self, response: &[u8]) {
        debug_assert!(self.responded < self.taken, "more responses than requests");
        let at = self.at(self.responded).saturating_add(self.slot_size);
        let written = self.memory.write_words(at, response);
        debug_assert!(written.is_some() && response.len() == self.response_size);
        self.responded = self.responded.saturating_add(1);
    }

    /// Returns whether there are responses to publish.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        self.responded != self.answered
    }

    /// Records that all requests with a response are done: their packets were sent, and none of
    /// their memory is in use. Then writes the responses to the ring, publishes them, and records
    /// that. Returns whether the frontend must be notified. Makes no system call.
    #[inline]
    #[must_use = "a frontend that asked to be notified sleeps until it is"]
    pub fn publish<R: SharedMemory>(&mut self, ring: &mut BackRing<R>) -> bool {
        if !self.has_pending() {
            return false;
        }
        if !crate::planted!(CompleteNotStored) {
            self.store(COMPLETE, self.responded);
        }
        let mut response = [0; RESPONSE_MAX];
        let response = response.get_mut(..self.response_size).unwrap_or_default();
        for number in self.answered..self.responded {
            let at = self.at(number).saturating_add(self.slot_size);
            let read = self.memory.read_words(at, response);
            let pushed = ring.push(response);
            debug_assert!(read.is_some() && pushed.is_ok(), "more responses than requests");
        }
        if crate::planted!(OrderedAnsweredFirst) {
            self.store(ANSWERED, self.responded);
        }
        let notify = ring.publish();
        self.answered = self.responded;
        self.store(ANSWERED, self.answered);
        notify
    }

    #[inline(always)]
    fn at(&self, number: u64) -> usize {
        // The number of a ring's slots is a power of two.
        let entry = number & u64::from(self.entries.saturating_sub(1));
        ENTRIES.saturating_add((entry as usize).saturating_mul(self.stride))
    }

    #[inline(always)]
    fn store(&self, at: usize, number: u64) {
        let stored = self.memory.store_u64(at, number, Release);
        debug_assert!(stored, "a number outside of its section");
    }
}

/// Returns the size of one entry in bytes: the request, then the response.
fn stride(layout: RingLayout, response_size: usize) -> usize {
    layout.slot_size().saturating_add(response_size).next_multiple_of(8)
}
