//! Buffers for the data of offloaded operations.

use alloc::vec::Vec;

/// Maximum bytes of data of all offloaded operations of a queue.
pub const DATA_MOST: usize = 1 << 20;
/// Maximum bytes of data of one job. Larger operations are split into several jobs.
pub const JOB_MOST: usize = 64 << 10;
/// Bytes of the smallest buffer; each further size is twice the previous one.
pub(super) const DATA_LEAST: usize = 4 << 10;
const SIZES: usize = (JOB_MOST / DATA_LEAST).ilog2() as usize + 1;

/// The buffers of one queue: in use and free together at most [`DATA_MOST`] bytes.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// Free buffers, by size.
    free: [Vec<Vec<u8>>; SIZES],
    /// Bytes of all buffers, in use and free.
    bytes: usize,
}

impl Buffers {
    /// Takes a buffer of a length of at most [`JOB_MOST`]; `None` until others are returned. It
    /// contains data of an earlier operation of the queue.
    pub fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        let (number, size) = size_for(len);
        let free = self.free.get_mut(number)?;
        let mut data = match free.pop() {
            Some(data) => data,
            None => {
                while self.bytes.saturating_add(size) > DATA_MOST {
                    let other = self.free.iter_mut().rev().find_map(Vec::pop)?;
                    self.bytes = self.bytes.saturating_sub(other.capacity());
                }
                self.bytes += size;
                Vec::with_capacity(size)
            }
        };
        data.resize(len, 0);
        Some(data)
    }

    /// Returns the bytes of all buffers, in use and free.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns a buffer that was taken for a length of `len`.
    pub fn give_back(&mut self, data: Vec<u8>, len: usize) {
        let (number, size) = size_for(len);
        match self.free.get_mut(number) {
            Some(free) if data.capacity() == size => free.push(data),
            // The user of the buffer replaced its allocation.
            _ => self.bytes = self.bytes.saturating_sub(size),
        }
    }
}

/// Returns the index of the buffer size for a length, and the size.
fn size_for(len: usize) -> (usize, usize) {
    let size = len.clamp(DATA_LEAST, JOB_MOST).next_power_of_two();
    ((size / DATA_LEAST).ilog2() as usize, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_all_sizes_stay_within_one_limit_and_evict_free_ones() {
        let mut buffers = Buffers::default();
        for len in [512, 4096, 4097, 65_536, 20_000, 1] {
            let taken: Vec<_> = core::iter::from_fn(|| buffers.take(len)).collect();
            assert_eq!(taken.len(), DATA_MOST / size_for(len).1, "{len}");
            assert!(taken.iter().all(|data| data.len() == len));
            assert_eq!(buffers.bytes, DATA_MOST);
            taken.into_iter().for_each(|data| buffers.give_back(data, len));
            let free: usize = buffers.free.iter().flatten().map(Vec::capacity).sum();
            assert_eq!(free, DATA_MOST);
        }
        // A replaced buffer does not stay in the count.
        drop(buffers.take(512));
        buffers.give_back(Vec::new(), 512);
        assert_eq!(buffers.bytes, DATA_MOST - DATA_LEAST);
    }
}
