//! The section of the in-flight record for the control ring: the configuration that the guest has
//! made, and the number of requests served.
//!
//! The section has two copies and a generation number that selects the valid one. A request's
//! outcome is written to the other copy, together with the response. Then the generation is stored,
//! then the response is published. If the process is killed before the store, the request is
//! executed again from the previous configuration, with the same outcome. If it is killed after the
//! store, the response is published from the record.

use super::hash::HashConfig;
use super::staged::STAGED_MAX;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use pvio_grant_table::GrantRef;
use pvio_ring::inflight::RecordError;
use pvio_ring::proto::netif::CTRL_RESPONSE_SIZE;
use pvio_ring::shm::{Region, SharedMemory};

/// Offset of the copies in bytes, after the generation.
const COPIES: usize = 64;
/// Number of 64-bit values of a response.
const RESPONSE_WORDS: usize = CTRL_RESPONSE_SIZE.div_ceil(8);

/// Configuration that a guest has made.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    /// Number of completed requests of the control ring.
    pub served: u64,
    /// Response to the last completed request.
    pub response: [u8; CTRL_RESPONSE_SIZE],
    pub hash: HashConfig,
    /// Staged pages of each queue, and whether each is read-only.
    pub staged: Vec<BTreeMap<GrantRef, bool>>,
}

impl Setup {
    /// Returns an empty configuration for a ring at index `served`.
    pub fn new(queues: usize, served: u64) -> Self {
        Self {
            served,
            response: [0; CTRL_RESPONSE_SIZE],
            hash: HashConfig::new(queues),
            staged: (0..queues).map(|_| BTreeMap::new()).collect(),
        }
    }
}

/// Section of the in-flight record for the control ring.
pub(super) struct SetupLog<R> {
    memory: R,
    /// Size of one copy in bytes.
    copy: usize,
    generation: u64,
}

impl<R: SharedMemory> SetupLog<R> {
    /// Returns the size of a section in bytes.
    pub fn section_len(queues: usize) -> usize {
        copy_len(queues).saturating_mul(2).saturating_add(COPIES)
    }

    /// Returns the section in `memory` for a guest with `queues` queues.
    pub fn new(memory: R, queues: usize) -> Result<Self, RecordError> {
        let (found, needed) = (memory.len(), Self::section_len(queues));
        if found < needed || !memory.writable() {
            return Err(RecordError::Size { found, needed });
        }
        let generation = memory.load_u64(0, Acquire).unwrap_or_default();
        Ok(Self { memory, copy: copy_len(queues), generation })
    }

    /// Reads the valid copy.
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

    /// Records the whole configuration atomically.
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

/// Sequence of the 64-bit values of a copy.
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
    fn setup_log_reads_back_committed_setup_and_rejects_corruption() {
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
