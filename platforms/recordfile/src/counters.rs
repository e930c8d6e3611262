//! Counters that one process writes and another reads.

use crate::file::RecordFile;
use core::sync::atomic::Ordering;
use pvio_ring::shm::{Region, SharedMemory};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use std::io;
use std::os::fd::OwnedFd;

/// Number of counters of a queue.
const PER_QUEUE: usize = 128;

/// Maximum number of queues of a device.
const MAX_QUEUES: usize = 1024;

/// Memory of the counters of a device's queues. It outlives the process that writes it, and its
/// reader needs nothing from that process. A reader takes every value as it is: a process that was
/// taken over can write any.
#[derive(Clone, Debug)]
pub struct CounterFile {
    memory: RecordFile,
}

impl CounterFile {
    /// Creates the memory for a number of queues, with all counters 0, and a descriptor of it for
    /// the process that writes it.
    ///
    /// # Errors
    /// A system error.
    pub fn create(queues: usize) -> io::Result<(OwnedFd, Self)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
        let file = memfd_create("pvio-counters", flags).or_else(|_| {
            // Linux before 6.3 has no flag against execution.
            memfd_create("pvio-counters", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        })?;
        let len = queues * PER_QUEUE * 8;
        ftruncate(&file, len as u64)?;
        // A shorter file would end the reader with SIGBUS.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let memory = RecordFile::map(file.try_clone()?, len)?;
        Ok((file, Self { memory }))
    }

    /// Maps the memory in the process that writes it.
    ///
    /// # Errors
    /// A system error; [`io::ErrorKind::InvalidData`] if it is shorter.
    pub fn open(file: OwnedFd, queues: usize) -> io::Result<Self> {
        let len = queues * PER_QUEUE * 8;
        if rustix::fs::fstat(&file)?.st_size.try_into().is_ok_and(|size: usize| size < len) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self { memory: RecordFile::map(file, len)? })
    }

    /// Maps memory that an earlier [`create`](Self::create) made, as its reader. It comes from the
    /// process that writes it, which may have been taken over.
    ///
    /// # Errors
    /// A system error; [`io::ErrorKind::InvalidData`] if it could be shortened.
    pub fn read(file: OwnedFd) -> io::Result<(OwnedFd, Self)> {
        let seals = fcntl_get_seals(&file)?;
        let len = usize::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or_default();
        let whole =
            len > 0 && len.is_multiple_of(PER_QUEUE * 8) && len <= MAX_QUEUES * PER_QUEUE * 8;
        if !seals.contains(SealFlags::SHRINK) || !whole {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let memory = RecordFile::map(file.try_clone()?, len)?;
        Ok((file, Self { memory }))
    }

    /// Returns the number of queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.memory.len() / (PER_QUEUE * 8)
    }

    /// Writes the counters of a queue. Those beyond the size are left out.
    pub fn publish(&self, queue: usize, words: impl Iterator<Item = u64>) {
        for (at, word) in (0..PER_QUEUE).zip(words) {
            // Beyond the last queue, there is no memory to write.
            let _ = self.memory.store_u64((queue * PER_QUEUE + at) * 8, word, Ordering::Relaxed);
        }
    }

    /// Returns the counters of a queue.
    pub fn words(&self, queue: usize) -> impl Iterator<Item = u64> {
        let word = move |at| self.memory.load_u64((queue * PER_QUEUE + at) * 8, Ordering::Relaxed);
        (0..PER_QUEUE).map_while(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_queues_are_read_through_another_mapping() {
        let (file, reader) = CounterFile::create(2).unwrap();
        let writer = CounterFile::open(file, 2).unwrap();
        assert_eq!(reader.queues(), 2);
        writer.publish(1, [3, u64::MAX].into_iter());
        writer.publish(2, [9].into_iter());
        assert!(reader.words(1).take(3).eq([3, u64::MAX, 0]));
        assert!(reader.words(0).all(|word| word == 0) && reader.words(2).next().is_none());
    }

    #[test]
    fn memory_cannot_be_shortened_by_its_writer() {
        let (file, _reader) = CounterFile::create(1).unwrap();
        assert!(ftruncate(&file, 0).is_err());
        let again = CounterFile::read(file.try_clone().unwrap()).unwrap().1;
        assert_eq!(again.queues(), 1);
        assert!(CounterFile::open(file, 2).is_err(), "it is shorter than two queues");
        let unsealed = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&unsealed, 1024).unwrap();
        assert!(CounterFile::read(unsealed).is_err());
    }
}
