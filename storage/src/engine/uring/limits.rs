//! Limits of the transfers that a device accepts as one request.
//!
//! A polled request must not wait in the kernel, so the kernel does not split a request that the
//! device cannot accept whole: since Linux 6.1.5 it fails with `EAGAIN`, and io_uring's worker
//! thread retries it endlessly (observed in the lab, scenario `disk-polled`). Such transfers are
//! not polled.

use pvio_ring::IoSeg;
use pvio_runtime::IoBuf;

const PAGE: usize = 4096;

/// Limits of a request to a device. The default is valid for every device: one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TransferLimits {
    /// Maximum length in bytes.
    pub bytes: u64,
    /// Maximum number of memory pages.
    pub pages: usize,
    /// Chunk size in bytes: a request must not cross a chunk boundary. 0 means no restriction.
    pub chunk: u64,
    /// Offset of the disk on the device, in bytes; `None` if the disk is not contiguous, as in a
    /// file.
    pub start: Option<u64>,
}

impl Default for TransferLimits {
    fn default() -> Self {
        Self { bytes: PAGE as u64, pages: 1, chunk: PAGE as u64, start: None }
    }
}

impl TransferLimits {
    /// Returns whether the device accepts a transfer as one request.
    pub fn take<B: IoBuf>(&self, at: u64, len: u64, segments: &[IoSeg<B>]) -> bool {
        len <= self.bytes && self.within_chunk(at, len) && self.takes_memory(segments)
    }

    fn within_chunk(&self, at: u64, len: u64) -> bool {
        let (first, chunk) = match self.start {
            _ if self.chunk == 0 => return true,
            Some(start) => (start.saturating_add(at), self.chunk),
            // File systems have blocks of at least a page, and each is contiguous.
            None => (at, PAGE as u64),
        };
        first / chunk == first.saturating_add(len.saturating_sub(1)) / chunk
    }

    /// Checks the memory: between two segments there must be no gap within a page (NVMe PRP lists).
    fn takes_memory<B: IoBuf>(&self, segments: &[IoSeg<B>]) -> bool {
        let (mut pages, mut end) = (0, None);
        for segment in segments.iter().filter(|segment| segment.len > 0) {
            let start = segment.buf.base().addr().wrapping_add(segment.offset);
            let whole = |at: usize| at.is_multiple_of(PAGE);
            match end {
                Some(end) if end != start && !(whole(start) && whole(end)) => return false,
                _ => {}
            }
            // The page in which two adjacent segments meet counts twice, which errs on the safe
            // side.
            pages += (start % PAGE + segment.len).div_ceil(PAGE);
            end = Some(start.wrapping_add(segment.len));
        }
        pages <= self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use pvio_ring::shm::HeapMemory;

    const DEVICE: TransferLimits =
        TransferLimits { bytes: 128 << 10, pages: 4, chunk: 0, start: Some(0) };

    fn segments(parts: &[(usize, usize)]) -> Vec<IoSeg<HeapMemory>> {
        parts
            .iter()
            .map(|&(offset, len)| IoSeg { buf: HeapMemory::pages(8), offset, len })
            .collect()
    }

    #[test]
    fn transfer_over_device_length_or_segment_limit_is_rejected() {
        let little = segments(&[(0, 4096)]);
        assert!(DEVICE.take(0, 128 << 10, &little));
        assert!(!DEVICE.take(0, (128 << 10) + 512, &little));
        assert!(DEVICE.take(0, 1, &segments(&[(0, 4 * PAGE)])));
        assert!(!DEVICE.take(0, 1, &segments(&[(512, 4 * PAGE)])), "five pages");
    }

    #[test]
    fn transfer_with_gap_inside_page_is_rejected() {
        for (parts, taken) in [
            (&[(512, 3584), (0, 4096), (0, 512)][..], true),
            (&[(0, 512), (0, 4096)], false),
            (&[(0, 4096), (512, 512)], false),
            (&[(0, 4096), (0, 0), (0, 512)], true),
        ] {
            assert_eq!(DEVICE.take(0, 1, &segments(parts)), taken, "{parts:?}");
        }
        // Adjacent segments have no gap.
        let buf = HeapMemory::pages(1);
        let [first, second] = [0, 512].map(|offset| IoSeg { buf: buf.clone(), offset, len: 512 });
        assert!(DEVICE.take(0, 1024, &[first, second]));
    }

    #[test]
    fn transfer_across_chunk_boundary_is_rejected() {
        let page = segments(&[(0, 4096)]);
        let device = TransferLimits { chunk: 64 << 10, start: Some(4096), ..DEVICE };
        assert!(device.take(56 << 10, 4096, &page));
        assert!(
            !device.take(58 << 10, 4096, &page),
            "partition offset moves the range across the chunk boundary"
        );
        let file = TransferLimits { start: None, ..device };
        assert!(file.take(8192, 4096, &page));
        assert!(!file.take(8192, 8192, &page), "blocks of a file are not contiguous");
        assert!(!file.take(8192 + 512, 4096, &page));
    }
}
