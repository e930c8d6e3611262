//! Cache of chunks of the disk.
//!
//! The file system libraries read small pieces. The disk is read in chunks of [`CHUNK`] bytes, and
//! several chunks at a time for sequential reads. Every request has a budget of bytes that it may
//! read, so that a directory whose clusters form a ring causes an error instead of an endless loop.

use super::block::{BlockRead, Disk};
use crate::guest::meter::Shared;
use std::collections::HashMap;
use std::io;
use std::time::Instant;

/// Size of a chunk in bytes.
pub const CHUNK: usize = 128 << 10;
/// Maximum number of chunks in the cache.
const MAX_CHUNKS: usize = 96;
/// Number of chunks that are read at a time for sequential reads.
const READ_AHEAD: u64 = 4;

/// The cache of a disk.
pub struct Cache {
    disk: Disk,
    chunks: HashMap<u64, Chunk>,
    clock: u64,
    /// The chunk accessed last: most reads continue where the last one ended.
    last: u64,
    expected: u64,
    budget: u64,
    scratch: Vec<u8>,
    meter: Option<Shared>,
}

/// An error of the disk itself, as opposed to an error that a library finds in the data.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DiskFailed(io::Error);

struct Chunk {
    bytes: Vec<u8>,
    used: u64,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Cache {
    /// Returns an empty cache; `meter` counts reads of the disk.
    #[must_use]
    pub fn new(disk: Disk, meter: Option<Shared>) -> Self {
        let (chunks, scratch) = (HashMap::new(), Vec::new());
        Self { disk, chunks, clock: 0, last: u64::MAX, expected: 0, budget: 0, scratch, meter }
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// Has the disk do background work (`BlockRead::poll_backend`).
    pub fn poll_backend(&mut self) {
        self.disk.poll_backend();
    }

    /// Sets the budget of the next request in bytes.
    pub fn allow(&mut self, bytes: u64) {
        self.budget = bytes;
    }

    /// Reads, at most to the end of the disk; returns the number of bytes read.
    ///
    /// # Errors
    /// The disk's error, or [`io::ErrorKind::QuotaExceeded`] if the budget is used up.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        // An empty read costs a byte as well; otherwise a loop of them would never end.
        let cost = (len as u64).max(1);
        self.budget = self.budget.checked_sub(cost).ok_or_else(|| {
            let text = "one request made it read more than a sound file system needs";
            io::Error::new(io::ErrorKind::QuotaExceeded, text)
        })?;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (index, within) = (at / CHUNK as u64, (at % CHUNK as u64) as usize);
            let chunk = self.chunk(index)?;
            let part = chunk.get(within..).filter(|p| !p.is_empty());
            let part = part.ok_or(io::ErrorKind::UnexpectedEof)?;
            let take = part.len().min(len - done);
            buf[done..done + take].copy_from_slice(&part[..take]);
            done += take;
        }
        Ok(len)
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// Those of [`Cache::read`], and [`io::ErrorKind::UnexpectedEof`] at the end of the disk.
    pub fn read_exact(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len();
        match self.read(offset, buf)? {
            got if got == len => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it points behind the end of the disk",
            )),
        }
    }

    fn chunk(&mut self, index: u64) -> io::Result<&[u8]> {
        if index != self.last {
            self.clock += 1;
            if !self.chunks.contains_key(&index) {
                self.load(index)?;
            }
            let clock = self.clock;
            if let Some(chunk) = self.chunks.get_mut(&index) {
                chunk.used = clock;
            }
            self.last = index;
        }
        self.chunks.get(&index).map(|c| &c.bytes[..]).ok_or(io::ErrorKind::NotFound.into())
    }

    fn load(&mut self, index: u64) -> io::Result<()> {
        let mut count = if index == self.expected { READ_AHEAD } else { 1 };
        // Chunks that are already cached are not read again.
        count = (1..count).find(|n| self.chunks.contains_key(&(index + n))).unwrap_or(count);
        let from = index * CHUNK as u64;
        let left = self.size().saturating_sub(from);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(count as usize * CHUNK);
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(len, 0);
        let start = Instant::now();
        let result = self.disk.read_at(from, &mut scratch);
        if let Some(meter) = &self.meter {
            match &result {
                Ok(()) => meter.count(len as u64, start.elapsed()),
                Err(_) => meter.count_error(),
            }
        }
        result.map_err(|e| io::Error::new(e.kind(), DiskFailed(e)))?;
        self.expected = index + count;
        for (n, bytes) in scratch.chunks(CHUNK).enumerate() {
            let mut kept = self.evict();
            kept.clear();
            kept.extend_from_slice(bytes);
            self.chunks.insert(index + n as u64, Chunk { bytes: kept, used: self.clock });
        }
        self.scratch = scratch;
        Ok(())
    }

    /// Returns a buffer for another chunk: that of the least recently used chunk, if the cache is
    /// full.
    fn evict(&mut self) -> Vec<u8> {
        if self.chunks.len() < MAX_CHUNKS {
            return Vec::with_capacity(CHUNK);
        }
        let oldest = self.chunks.iter().min_by_key(|(_, c)| c.used).map(|(i, _)| *i);
        oldest.and_then(|i| self.chunks.remove(&i)).map(|c| c.bytes).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::block::MemDisk;
    use super::*;

    #[test]
    fn cached_reads_across_chunks_return_disk_bytes() {
        let bytes: Vec<u8> = (0..CHUNK * 3 + 512).map(|i| (i / 7) as u8 ^ i as u8).collect();
        let mut cache = Cache::new(Disk::new(MemDisk::new(bytes.clone())), None);
        cache.allow(u64::MAX);
        for (offset, len) in [(0, 10), (CHUNK - 3, 6), (CHUNK * 2 - 1, CHUNK + 513), (5, 1)] {
            let mut buf = vec![0; len];
            cache.read_exact(offset as u64, &mut buf).unwrap();
            assert_eq!(buf, &bytes[offset..offset + len], "{offset} + {len}");
        }
        let mut buf = [0; 100];
        assert_eq!(cache.read(bytes.len() as u64 - 40, &mut buf).unwrap(), 40);
        assert_eq!(cache.read(u64::MAX, &mut buf).unwrap(), 0);
        assert!(cache.read_exact(bytes.len() as u64 - 40, &mut buf).is_err());
    }

    #[test]
    fn cache_of_large_disk_is_bounded() {
        let bytes = vec![9; CHUNK * (MAX_CHUNKS + 20)];
        let mut cache = Cache::new(Disk::new(MemDisk::new(bytes)), None);
        cache.allow(u64::MAX);
        let mut buf = vec![0; CHUNK];
        for index in 0..(MAX_CHUNKS + 20) as u64 {
            cache.read_exact(index * CHUNK as u64, &mut buf).unwrap();
            assert!(buf.iter().all(|b| *b == 9));
        }
        assert!(cache.chunks.len() <= MAX_CHUNKS);
    }

    #[test]
    fn read_beyond_budget_fails_with_quota_exceeded() {
        let mut cache = Cache::new(Disk::new(MemDisk::new(vec![0; 4096])), None);
        cache.allow(100);
        let mut buf = [0; 60];
        cache.read(0, &mut buf).unwrap();
        let err = cache.read(0, &mut buf).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::QuotaExceeded);
        assert_eq!(super::super::FsError::from(err).code(), "fs-corrupt");
    }
}
