//! The header of a record and its division into sections.

use super::RecordError;
use crate::shm::{Part, Region, SharedMemory};
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Layout of the header, in 64-bit words; the words of the session's key follow.
///
/// | word | contents |
/// |---|---|
/// | 0 | 1 while the record is valid: written last, cleared first |
/// | 1 | version |
/// | 2 | 1 once a flush has failed |
/// | 3 | number of the key's words |
/// | 4 | 1 if pages of the guest are mapped for single requests |
/// | 5..8 | 0 |
pub const HEADER_WORDS: usize = 8;
const VALID: usize = 0;
const VERSION: usize = 8;
const FLUSH_FAILED: usize = 16;
const KEY_WORDS: usize = 24;
const MAPS_REQUESTS: usize = 32;

/// The version that this code writes. A reader supports this one and, once there is one, the
/// previous one.
const CURRENT: u64 = 1;
/// The version of the records that this code writes.
pub const CURRENT_RECORD: u64 = CURRENT;
/// The oldest version of a record that this code reads.
pub const OLDEST_RECORD: u64 = CURRENT;
/// Maximum number of words of a key: bounds the header of an untrusted record.
const KEY_WORDS_MAX: usize = 1 << 14;

/// Identifies a session of a device, and defines the layout of its sections.
///
/// The backend adds, in an order that it chooses: the kind of device, the frontend's domain, the
/// device's number, the ABI, and, for each queue, grant references, event channels and number of
/// slots.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SessionKey {
    words: Vec<u64>,
    /// Size of each section, in bytes.
    sections: Vec<usize>,
}

impl SessionKey {
    /// Creates an empty key.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a word that identifies the session.
    pub fn add(&mut self, word: u64) -> &mut Self {
        self.words.push(word);
        self
    }

    /// Adds a section of `bytes` bytes, rounded up to a cache line; sections are numbered in the
    /// order of these calls.
    pub fn section(&mut self, bytes: usize) -> &mut Self {
        self.sections.push(bytes.next_multiple_of(64));
        self.add(bytes as u64)
    }

    /// Returns the size of the record, in bytes.
    #[must_use]
    pub fn record_len(&self) -> usize {
        self.sections.iter().fold(self.header_len(), |len, section| len.saturating_add(*section))
    }

    fn header_len(&self) -> usize {
        HEADER_WORDS.saturating_add(self.words.len()).saturating_mul(8).next_multiple_of(64)
    }
}

/// The record of one session of a device. A clone is another handle to the same memory.
#[derive(Clone, Debug)]
pub struct Record<M> {
    memory: M,
    key: SessionKey,
}

impl<M: SharedMemory + Clone> Record<M> {
    /// Creates the record of a new session, whatever the memory holds. It is not valid before
    /// [`commit`](Self::commit): create its sections first.
    ///
    /// # Errors
    /// [`RecordError::Size`].
    pub fn create(memory: M, key: SessionKey) -> Result<Self, RecordError> {
        let record = Self::sized(memory, key)?;
        let memory = &record.memory;
        memory.store_u64(VALID, 0, Release);
        // Data of an earlier session are obsolete.
        let _ = memory.fill(8, record.key.record_len().saturating_sub(8), 0);
        memory.store_u64(VERSION, CURRENT, Relaxed);
        memory.store_u64(KEY_WORDS, record.key.words.len() as u64, Relaxed);
        for (n, word) in record.key.words.iter().enumerate() {
            memory.store_u64(key_word(n), *word, Relaxed);
        }
        Ok(record)
    }

    /// Marks the record valid. From then on the session can be resumed.
    pub fn commit(&self) {
        self.memory.store_u64(VALID, 1, Release);
    }

    /// Opens the record that another process left of the session, if it is valid and belongs to it.
    ///
    /// # Errors
    /// A [`RecordError`]: the session is not resumed.
    pub fn open(memory: M, key: SessionKey) -> Result<Self, RecordError> {
        let record = Self::sized(memory, key)?;
        let load = |offset| record.memory.load_u64(offset, Acquire).unwrap_or_default();
        if load(VALID) != 1 {
            return Err(RecordError::Invalid);
        }
        let found = load(VERSION);
        if found != CURRENT {
            return Err(RecordError::Version { found, supported: CURRENT });
        }
        let words = &record.key.words;
        let same = load(KEY_WORDS) == words.len() as u64
            && words.iter().enumerate().all(|(n, word)| load(key_word(n)) == *word);
        if same { Ok(record) } else { Err(RecordError::OtherSession) }
    }

    /// Marks the record invalid: the session is over, or must not be resumed.
    pub fn invalidate(&self) {
        Self::invalidate_in(&self.memory);
    }

    /// Marks the record in this memory invalid, whichever session it belongs to.
    pub fn invalidate_in(memory: &M) {
        memory.store_u64(VALID, 0, Release);
    }

    /// Records whether a flush has failed, before the guest sees the failure: a successor fails
    /// every later flush, too.
    pub fn set_flush_failed(&self, failed: bool) {
        self.memory.store_u64(FLUSH_FAILED, failed.into(), Release);
    }

    /// Returns whether a flush of this session has failed.
    #[must_use]
    pub fn flush_failed(&self) -> bool {
        self.memory.load_u64(FLUSH_FAILED, Acquire) != Some(0)
    }

    /// Records whether guest pages are mapped for single requests, before any is mapped: a
    /// successor may have to wait until they are unmapped.
    pub fn set_maps_requests(&self, maps: bool) {
        self.memory.store_u64(MAPS_REQUESTS, maps.into(), Release);
    }

    /// Returns whether guest pages were mapped for single requests.
    #[must_use]
    pub fn maps_requests(&self) -> bool {
        self.memory.load_u64(MAPS_REQUESTS, Acquire) != Some(0)
    }

    /// Returns the memory of section number `index`.
    #[must_use]
    pub fn section(&self, index: usize) -> Option<Part<M>> {
        let len = *self.key.sections.get(index)?;
        let before = self.key.sections.iter().take(index);
        let offset = before.fold(self.key.header_len(), |at, len| at.saturating_add(*len));
        Part::new(self.memory.clone(), offset, len)
    }

    fn sized(memory: M, key: SessionKey) -> Result<Self, RecordError> {
        let (found, needed) = (memory.len(), key.record_len());
        if found < needed || !memory.writable() || key.words.len() > KEY_WORDS_MAX {
            return Err(RecordError::Size { found, needed });
        }
        Ok(Self { memory, key })
    }
}

const fn key_word(n: usize) -> usize {
    HEADER_WORDS.saturating_add(n).saturating_mul(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::HeapMemory;

    fn key(port: u64) -> SessionKey {
        let mut key = SessionKey::new();
        key.add(port).section(100).section(64);
        key
    }

    #[test]
    fn record_of_same_session_is_opened() {
        let memory = HeapMemory::pages(1);
        memory.fill(0, 4096, 0xff).unwrap();
        let record = Record::create(memory.clone(), key(5)).unwrap();
        assert_eq!(Record::open(memory.clone(), key(5)).unwrap_err(), RecordError::Invalid);
        record.commit();
        let opened = Record::open(memory.clone(), key(5)).unwrap();
        assert!(!opened.flush_failed() && !opened.maps_requests());
        record.set_flush_failed(true);
        assert!(opened.flush_failed() && !opened.maps_requests());
        record.set_maps_requests(true);
        assert!(opened.maps_requests());
        let [first, second] = [0, 1].map(|n| opened.section(n).unwrap());
        assert_eq!((first.len(), second.len()), (128, 64));
        assert!(opened.section(2).is_none());
        assert_eq!(first.base().addr().get() + 128, second.base().addr().get());
        assert_eq!(first.load_u64(0, Relaxed), Some(0), "new record is zeroed");
    }

    #[test]
    fn record_of_other_session_or_version_is_rejected() {
        let memory = HeapMemory::pages(1);
        let record = Record::create(memory.clone(), key(5)).unwrap();
        record.commit();
        assert_eq!(Record::open(memory.clone(), key(6)).unwrap_err(), RecordError::OtherSession);
        memory.store_u64(VERSION, 9, Relaxed);
        let version = RecordError::Version { found: 9, supported: 1 };
        assert_eq!(Record::open(memory.clone(), key(5)).unwrap_err(), version);
        memory.store_u64(VERSION, 1, Relaxed);
        assert!(Record::open(memory.clone(), key(5)).is_ok());
        record.invalidate();
        assert_eq!(Record::open(memory, key(5)).unwrap_err(), RecordError::Invalid);
        let mut large = key(5);
        large.section(5000);
        let size = Record::create(HeapMemory::pages(1), large).unwrap_err();
        assert!(matches!(size, RecordError::Size { found: 4096, .. }));
    }
}
