//! A queue's part of its device's in-flight record.

use super::QueueFault;
use alloc::vec::Vec;
use pvio_ring::BackRing;
use pvio_ring::inflight::{EntryState, Record, RecordError, RequestLog, SessionKey};
use pvio_ring::proto::blkif::Abi;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Part, SharedMemory};

/// Number of process deaths with a request in flight after which the request is failed instead of
/// submitted again.
pub const DEATHS_MAX: u64 = 2;

/// The in-flight record of a queue: the device's record, and the section of this ring.
#[derive(Debug)]
pub struct QueueRecord<R> {
    pub(super) device: Record<R>,
    pub(super) log: RequestLog<Part<R>>,
    /// Inherited requests to be submitted again, the oldest last; `None` in a new session.
    pub(super) inherited: Option<Vec<u32>>,
    taken_over: bool,
}

impl<R: SharedMemory + Clone> QueueRecord<R> {
    /// Creates the record of a ring that was not served before, in section `index` of a new record.
    ///
    /// # Errors
    /// A [`RecordError`].
    pub fn new<M: SharedMemory>(
        device: &Record<R>,
        index: usize,
        ring: &BackRing<M>,
        abi: Abi,
    ) -> Result<Self, RecordError> {
        let log = RequestLog::new(section(device, index)?, ring, abi.response_size())?;
        Ok(Self { device: device.clone(), log, inherited: None, taken_over: false })
    }

    /// Resumes from the record of a ring that was just attached. `died`: the process that wrote the
    /// record was killed, possibly because of one of its requests.
    ///
    /// # Errors
    /// A [`QueueFault`]: ring and record are inconsistent.
    pub fn resume<M: SharedMemory>(
        device: &Record<R>,
        index: usize,
        ring: &mut BackRing<M>,
        abi: Abi,
        died: bool,
    ) -> Result<Self, QueueFault> {
        let found = RequestLog::resume(section(device, index)?, ring, abi.response_size())?;
        ring.resume(found.taken)?;
        let (mut log, mut inherited) = (found.log, found.again);
        if died {
            inherited.iter().for_each(|entry| log.charge_death(*entry));
        }
        inherited.reverse();
        Ok(Self { device: device.clone(), log, inherited: Some(inherited), taken_over: died })
    }

    /// Returns whether the process that served the ring before was killed.
    #[must_use]
    pub const fn is_taken_over(&self) -> bool {
        self.taken_over
    }

    /// Records that a flush failed, also for a process that resumes the session.
    pub fn note_failed_flush(&self) {
        self.device.set_flush_failed(true);
    }

    /// Returns the number of requests that are failed because too many processes died with them in
    /// flight.
    #[must_use]
    pub fn given_up(&self) -> usize {
        let inherited = self.inherited.iter().flatten();
        inherited.filter(|entry| self.log.deaths(**entry) >= DEATHS_MAX).count()
    }

    /// Makes the requests in flight not count towards [`DEATHS_MAX`] when this process ends.
    pub(super) fn spare_requests(&mut self) {
        for entry in 0..self.log.entries() {
            if self.log.state(entry) == Some(EntryState::InFlight) {
                self.log.spare(entry);
            }
        }
    }

    /// Returns the number of inherited requests.
    #[must_use]
    pub fn inherited(&self) -> usize {
        self.inherited.as_ref().map_or(0, Vec::len)
    }
}

impl QueueRecord<HeapMemory> {
    /// Creates a record in private memory, which does not outlive this process, for a ring that was
    /// not served before.
    ///
    /// # Errors
    /// A [`RecordError`].
    pub fn private<M: SharedMemory>(ring: &BackRing<M>, abi: Abi) -> Result<Self, RecordError> {
        let mut key = SessionKey::new();
        key.section(RequestLog::<HeapMemory>::section_len(ring.layout()));
        let memory = HeapMemory::pages(key.record_len().div_ceil(PAGE_SIZE));
        let device = Record::create(memory, key)?;
        device.commit();
        Self::new(&device, 0, ring, abi)
    }
}

fn section<R: SharedMemory + Clone>(
    device: &Record<R>,
    index: usize,
) -> Result<Part<R>, RecordError> {
    device.section(index).ok_or(RecordError::Size { found: 0, needed: 0 })
}
