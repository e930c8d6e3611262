//! The section of the in-flight record for the control ring: what the guest has set up over it, and how
//! far it was served.
//!
//! There are two copies, and a generation that says which one counts. A request's outcome is written to
//! the other copy, with the response; then the generation is stored, then the response is published.
//! Killed before the store, the request is carried out again, from what was set up before it, which
//! makes no difference. Killed after, its response is published from the record.

use super::hash::HashConfig;
use super::staged::STAGED_MAX;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use pvio_grant_table::GrantRef;
use pvio_ring::inflight::RecordError;
use pvio_ring::proto::netif::CTRL_RESPONSE_SIZE;
use pvio_ring::shm::{Region, SharedMemory};

/// Where the copies begin; the generation is in front of them.
const COPIES: usize = 64;
/// Words of a response.
const RESPONSE_WORDS: usize = CTRL_RESPONSE_SIZE.div_ceil(8);

/// What a guest has set up.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    /// Requests of the control ring that are done.
    pub served: u64,
    /// The response to the last of them.
    pub response: [u8; CTRL_RESPONSE_SIZE],
    pub hash: HashConfig,
    /// Of each queue the pages that are kept mapped, and whether for reading only.
    pub staged: Vec<BTreeMap<GrantRef, bool>>,
}

impl Setup {
    /// Nothing is set up; the ring begins after so many requests.
    pub fn new(queues: usize, served: u64) -> Self {
        Self {
            served,
            response: [0; CTRL_RESPONSE_SIZE],
            hash: HashConfig::new(queues),
            staged: (0..queues).map(|_| BTreeMap::new()).collect(),
        }
    }
}

/// The section.
pub(super) struct SetupLog<R> {
    memory: R,
    /// Bytes of one copy.
    copy: usize,
    generation: u64,
}

impl<R: SharedMemory> SetupLog<R> {
    /// Bytes of a section.
    pub fn section_len(queues: usize) -> usize {
        copy_len(queues).saturating_mul(2).saturating_add(COPIES)
    }

    /// A section for a guest of so many queues.
    pub fn new(memory: R, queues: usize) -> Result<Self, RecordError> {
        let (found, needed) = (memory.len(), Self::section_len(queues));
        if found < needed || !memory.writable() {
            return Err(RecordError::Size { found, needed });
        }
        let generation = memory.load_u64(0, Acquire).unwrap_or_default();
        Ok(Self { memory, copy: copy_len(queues), generation })
    }

    /// What was recorded last.
    pub fn read(&self, queues: usize) -> Result<Setup, RecordError> {
        let copy = self.generation & 1;
        let impossible = RecordError::Entry { entry: copy as u32 };
        let mut words = Words { memory: &self.memory, at: self.at(copy) };
        let mut setup = Setup::new(queues, words.get());
        let response: [u64; RESPONSE_WORDS] = core::array::from_fn(|_| words.get());
        let bytes = response.iter().flat_map(|word| word.to_le_bytes());
        setup.response.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        setup.hash = HashConfig::from_words(|| words.get(), queues).ok_or(impossible)?;
        for staged in &mut setup.staged {
            let len = words.get();
            if len > STAGED_MAX as u64 {
                return Err(impossible);
            }
            for _ in 0..len {
                let word = words.get();
                staged.insert(GrantRef(word as u32), word >> 32 != 0);
            }
        }
        Ok(setup)
    }

    /// Records all of it at once.
    pub fn commit(&mut self, setup: &Setup) {
        let next = self.generation.wrapping_add(1);
        let mut words = Words { memory: &self.memory, at: self.at(next & 1) };
        words.put(setup.served);
        let mut response = [0; RESPONSE_WORDS * 8];
        response.iter_mut().zip(setup.response).for_each(|(to, from)| *to = from);
        let (response, _) = response.as_chunks();
        response.iter().for_each(|word| words.put(u64::from_le_bytes(*word)));
        setup.hash.words().for_each(|word| words.put(word));
        for staged in &setup.staged {
            words.put(staged.len() as u64);
            for (gref, read_only) in staged {
                words.put(u64::from(gref.0) | u64::from(*read_only) << 32);
            }
        }
        self.memory.store_u64(0, next, Release);
        self.generation = next;
    }

    fn at(&self, copy: u64) -> usize {
        if copy == 0 { COPIES } else { COPIES.saturating_add(self.copy) }
    }
}

fn copy_len(queues: usize) -> usize {
    let staged = STAGED_MAX.saturating_add(1).saturating_mul(queues);
    let words = 1_usize.saturating_add(RESPONSE_WORDS).saturating_add(HashConfig::WORDS);
    words.saturating_add(staged).saturating_mul(8)
}

/// Words of a copy, one after the other.
struct Words<'a, R> {
    memory: &'a R,
    at: usize,
}

impl<R: SharedMemory> Words<'_, R> {
    fn get(&mut self) -> u64 {
        let word = self.memory.load_u64(self.at, Relaxed).unwrap_or_default();
        self.at = self.at.saturating_add(8);
        word
    }

    fn put(&mut self, word: u64) {
        let stored = self.memory.store_u64(self.at, word, Relaxed);
        debug_assert!(stored, "a word outside of its section");
        self.at = self.at.saturating_add(8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use pvio_ring::proto::netif::HASH_TOEPLITZ;
    use pvio_ring::shm::HeapMemory;

    #[test]
    fn setup_is_read_as_it_was_committed() {
        let memory = HeapMemory::pages(SetupLog::<HeapMemory>::section_len(2).div_ceil(4096));
        let mut log = SetupLog::new(memory.clone(), 2).unwrap();
        let mut setup = Setup::new(2, 7);
        for (served, gref) in [(8, 40), (9, 41), (10, 42)] {
            setup.hash.set_algorithm(HASH_TOEPLITZ);
            setup.hash.set_types(15);
            setup.hash.set_key(&[gref as u8; 40]);
            setup.hash.set_mapping_size(3);
            setup.hash.set_mapping(1, &[1]);
            setup.served = served;
            setup.response[3] = gref as u8;
            setup.staged[1].insert(GrantRef(gref), gref == 41);
            log.commit(&setup);
            let read = SetupLog::new(memory.clone(), 2).unwrap().read(2).unwrap();
            assert_eq!(format!("{read:?}"), format!("{setup:?}"));
        }
        let all = (0..memory.len()).step_by(8);
        all.for_each(|at| assert!(memory.store_u64(at, u64::MAX, Relaxed)));
        let error = SetupLog::new(memory, 2).unwrap().read(2).unwrap_err();
        assert_eq!(error, RecordError::Entry { entry: 1 });
    }
}
