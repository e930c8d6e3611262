//! The section of a ring whose requests complete in any order.

use super::RecordError;
use crate::back::BackRing;
use crate::layout::{RingFault, RingLayout};
use crate::shm::slot::Slot;
use crate::shm::{Region, SharedMemory};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Offset of `answered`; the entries begin at the next cache line.
const ANSWERED: usize = 0;
const ENTRIES: usize = 64;

/// Layout of an entry: offsets in bytes.
const STATE: usize = 0;
const SEQUENCE: usize = 8;
const DEATHS: usize = 16;
const RESPONSE: usize = 24;
const RESPONSE_MAX: usize = 16;
const SLOT: usize = RESPONSE + RESPONSE_MAX;

/// Flag in `DEATHS`: the next end of a process is not charged.
const SPARED: u64 = 1 << 63;

/// Exclusive bound of sequence and response numbers; a larger one in a record is malformed.
const NUMBER_MAX: u64 = 1 << 62;

/// State of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryState {
    /// Not used.
    Free,
    /// Holds a request that was taken and has no response.
    InFlight,
    /// Holds a response with this number. The entry may be reused once `answered` is greater.
    Done(u64),
}

impl EntryState {
    const fn to_word(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::InFlight => 1,
            Self::Done(number) => (number << 2) | 2,
        }
    }

    const fn from_word(word: u64) -> Option<Self> {
        match (word & 3, word >> 2) {
            (0, 0) => Some(Self::Free),
            (1, 0) => Some(Self::InFlight),
            (2, number) => Some(Self::Done(number)),
            _ => None,
        }
    }
}

/// The record of one ring's requests and of the responses that are not published. It has as many
/// entries as the ring has slots. (It can be cloned for a model checker, which continues from one
/// state in several ways; two clones must not be used concurrently.)
#[derive(Clone, Debug)]
pub struct RequestLog<M> {
    memory: M,
    entries: u32,
    /// Distance between two entries, in bytes.
    stride: usize,
    slot_size: usize,
    response_size: usize,
    /// Sequence number of the next request taken.
    sequence: u64,
    /// Number of the next response.
    next: u64,
    free: Vec<u32>,
    /// Entries done and not published, in the order of their numbers.
    pending: VecDeque<u32>,
}

/// The resumed record of a ring.
#[derive(Debug)]
pub struct Resumed<M> {
    /// The record. Responses that were complete are pending, and are published by the next
    /// [`publish`](RequestLog::publish).
    pub log: RequestLog<M>,
    /// Requests to be submitted again, in the order they were taken.
    pub again: Vec<u32>,
    /// Number of requests taken whose responses are not published: for [`BackRing::resume`].
    pub taken: u32,
}

impl<M: SharedMemory> RequestLog<M> {
    /// Returns the size of a section for a ring of this layout, in bytes.
    #[must_use]
    pub fn section_len(layout: RingLayout) -> usize {
        stride(layout).saturating_mul(layout.slots() as usize).saturating_add(ENTRIES)
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
        log.next = ring.produced().into();
        log.memory.store_u64(ANSWERED, log.next, Release);
        log.free = (0..log.entries).rev().collect();
        Ok(log)
    }

    /// Opens the record that a previous process left of a ring, which was just attached and not
    /// used yet. The I/O of that process must have finished.
    ///
    /// # Errors
    /// A [`RecordError`]: the session cannot be resumed.
    pub fn resume<R: SharedMemory>(
        memory: M,
        ring: &BackRing<R>,
        response_size: usize,
    ) -> Result<Resumed<M>, RecordError> {
        let mut log = Self::sized(memory, ring.layout(), response_size)?;
        let answered = log.memory.load_u64(ANSWERED, Acquire).unwrap_or_default();
        let produced = ring.produced();
        let (mut done, mut again) = (Vec::new(), Vec::new());
        for entry in 0..log.entries {
            match log.state(entry).ok_or(RecordError::Entry { entry })? {
                EntryState::InFlight => {
                    let sequence = log.load(entry, SEQUENCE);
                    if sequence >= NUMBER_MAX {
                        return Err(RecordError::Entry { entry });
                    }
                    log.sequence = log.sequence.max(sequence.saturating_add(1));
                    again.push((sequence, entry));
                }
                EntryState::Done(number) if number >= answered => done.push((number, entry)),
                EntryState::Free | EntryState::Done(_) => log.free.push(entry),
            }
        }
        // The guest never sees more responses than are complete.
        let visible = produced.wrapping_sub(answered as u32);
        let complete = u32::try_from(done.len()).unwrap_or(u32::MAX);
        if visible > complete || answered >= NUMBER_MAX {
            let answered = answered as u32;
            return Err(RecordError::Producer { produced, answered, done: complete });
        }
        let first = answered.saturating_add(visible.into());
        if crate::planted!(InOrderResume) {
            again.retain(|(sequence, _)| sequence.saturating_add(1) == log.sequence);
        }
        done.sort_unstable();
        again.sort_unstable();
        log.next = first;
        for (number, entry) in done {
            if number < first || crate::planted!(ResponsesForgotten) {
                log.free.push(entry);
            } else if number == log.next {
                log.next = log.next.saturating_add(1);
                log.pending.push_back(entry);
            } else {
                return Err(RecordError::Gap);
            }
        }
        // This store precedes the reuse of any entry: those below it count as free from then on.
        log.memory.store_u64(ANSWERED, first, Release);
        let again: Vec<u32> = again.into_iter().map(|(_, entry)| entry).collect();
        let taken = log.entries.saturating_sub(log.free());
        Ok(Resumed { log, again, taken })
    }

    fn sized(memory: M, layout: RingLayout, response_size: usize) -> Result<Self, RecordError> {
        let (found, needed) = (memory.len(), Self::section_len(layout));
        if found < needed || !memory.writable() || response_size > RESPONSE_MAX {
            return Err(RecordError::Size { found, needed });
        }
        let entries = layout.slots();
        Ok(Self {
            memory,
            entries,
            stride: stride(layout),
            slot_size: layout.slot_size(),
            response_size,
            sequence: 0,
            next: 0,
            free: Vec::with_capacity(entries as usize),
            pending: VecDeque::with_capacity(entries as usize),
        })
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Returns the number of free entries: requests that can be taken before a response is
    /// published.
    #[must_use]
    pub fn free(&self) -> u32 {
        u32::try_from(self.free.len()).unwrap_or(u32::MAX)
    }

    /// Returns the number of requests taken and not complete.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let idle = self.free.len().saturating_add(self.pending.len());
        (self.entries as usize).saturating_sub(idle)
    }

    /// Takes the next request from the ring into an entry. Returns the entry's number and the
    /// request, to be parsed from the record. `None` if there is no request, or no free entry.
    ///
    /// # Errors
    /// As [`BackRing::pop`].
    #[inline]
    pub fn take<R: SharedMemory>(
        &mut self,
        ring: &mut BackRing<R>,
    ) -> Result<Option<(u32, Slot<'_, M>)>, RingFault> {
        let Some(&entry) = self.free.last() else { return Ok(None) };
        let Some(slot) = ring.pop()? else { return Ok(None) };
        self.free.pop();
        // The size was validated with the section, so every store is within it.
        let copied = self.memory.write_slot(self.at(entry, SLOT), slot);
        debug_assert!(copied.is_some(), "an entry outside of its section");
        self.store(entry, SEQUENCE, self.sequence, Relaxed);
        self.store(entry, DEATHS, 0, Relaxed);
        self.sequence = self.sequence.saturating_add(1);
        self.store(entry, STATE, EntryState::InFlight.to_word(), Release);
        Ok(self.request(entry).map(|slot| (entry, slot)))
    }

    /// Returns the request of an entry that is in flight, to be parsed again.
    #[must_use]
    pub fn request(&self, entry: u32) -> Option<Slot<'_, M>> {
        self.memory.slot(self.at(entry, SLOT), self.slot_size)
    }

    /// Returns the number of processes that ended while the request of this entry was in flight.
    #[must_use]
    pub fn deaths(&self, entry: u32) -> u64 {
        self.load(entry, DEATHS) & !SPARED
    }

    /// Makes the next [`charge_death`](Self::charge_death) of this entry have no effect: its request
    /// waits for the host, and cannot be the reason for the end of the process.
    pub fn spare(&mut self, entry: u32) {
        self.store(entry, DEATHS, self.deaths(entry) | SPARED, Release);
    }

    /// Records that a process has ended while the request of this entry was in flight.
    pub fn charge_death(&mut self, entry: u32) {
        let charged = self.load(entry, DEATHS) & SPARED == 0;
        self.store(entry, DEATHS, self.deaths(entry).saturating_add(charged.into()), Release);
    }

    /// Completes a request: its data is in the guest's memory, and none of its memory is in use.
    /// The response is private until [`publish`](Self::publish).
    #[inline]
    pub fn complete(&mut self, entry: u32, response: &[u8]) {
        debug_assert_eq!(self.state(entry), Some(EntryState::InFlight), "completed twice");
        let written = self.memory.write_words(self.at(entry, RESPONSE), response);
        debug_assert!(written.is_some() && response.len() == self.response_size);
        self.store(entry, STATE, EntryState::Done(self.next).to_word(), Release);
        self.next = self.next.saturating_add(1);
        self.pending.push_back(entry);
    }

    /// Returns whether there are responses to publish.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Writes all complete responses to the ring, publishes them, and records that. Returns whether
    /// the frontend must be notified. Makes no system call.
    #[inline]
    #[must_use = "a frontend that asked to be notified sleeps until it is"]
    pub fn publish<R: SharedMemory>(&mut self, ring: &mut BackRing<R>) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        let mut response = [0; RESPONSE_MAX];
        let response = response.get_mut(..self.response_size).unwrap_or_default();
        for entry in &self.pending {
            let read = self.memory.read_words(self.at(*entry, RESPONSE), response);
            let pushed = ring.push(response);
            debug_assert!(read.is_some() && pushed.is_ok(), "more responses than requests");
        }
        if crate::planted!(AnsweredFirst) {
            self.memory.store_u64(ANSWERED, self.next, Release);
        }
        let notify = ring.publish();
        self.memory.store_u64(ANSWERED, self.next, Release);
        // The entry used last is reused first: its bytes are in the cache.
        self.free.extend(self.pending.drain(..));
        notify
    }

    /// Returns the state of an entry; `None` if it holds no valid state.
    #[must_use]
    pub fn state(&self, entry: u32) -> Option<EntryState> {
        EntryState::from_word(self.load(entry, STATE))
    }

    #[inline(always)]
    fn at(&self, entry: u32, field: usize) -> usize {
        let entry = (entry as usize).saturating_mul(self.stride);
        ENTRIES.saturating_add(entry).saturating_add(field)
    }

    #[inline(always)]
    fn load(&self, entry: u32, field: usize) -> u64 {
        self.memory.load_u64(self.at(entry, field), Acquire).unwrap_or(u64::MAX)
    }

    #[inline(always)]
    fn store(&self, entry: u32, field: usize, value: u64, order: core::sync::atomic::Ordering) {
        let stored = self.memory.store_u64(self.at(entry, field), value, order);
        debug_assert!(stored, "an entry outside of its section");
    }
}

/// Returns the size of one entry in bytes: whole cache lines.
fn stride(layout: RingLayout) -> usize {
    SLOT.saturating_add(layout.slot_size()).next_multiple_of(64)
}
