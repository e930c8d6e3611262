//! Limits and features of a backend.

use super::{Op, PAGES_PER_SLOT, SECTOR, StartError};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use pvio_ring::proto::blkif::{MAX_INDIRECT_SEGMENTS, Status};
use pvio_ring::shm::PAGE_SIZE;
use pvio_xenbus::handshake::vbd::BackDisk;

/// How written data is flushed to stable storage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushBy {
    /// With flush requests.
    Flush,
    /// With write barriers without data, for old backends that do not support flush.
    Barrier,
    /// Not supported: the backend advertises neither.
    Nothing,
}

/// Limits of a backend, and properties of its disk. Requests beyond these limits are split, or
/// completed without being sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueLimits {
    /// Pages in one request. A request of more than 11 pages is indirect.
    pub segments: usize,
    /// How to flush.
    pub flush: FlushBy,
    /// Whether the backend supports discard.
    pub discard: bool,
    /// Whether the backend supports secure discard.
    pub secure_discard: bool,
    /// Whether the backend rejects writes.
    pub read_only: bool,
    /// Size of a logical sector, in bytes: each part of a request is a multiple of it.
    pub sector_size: usize,
    /// The disk's size, in sectors of 512 bytes: upper bound of all requests.
    pub sectors: u64,
}

impl QueueLimits {
    /// The largest limits, with all features.
    pub const MOST: Self = Self {
        segments: MAX_INDIRECT_SEGMENTS,
        flush: FlushBy::Flush,
        discard: true,
        secure_discard: true,
        read_only: false,
        sector_size: 512,
        sectors: u64::MAX / SECTOR as u64,
    };

    /// Returns the limits that a connected backend advertises. Linux's backend writes most of them
    /// only when it is connected.
    #[must_use]
    pub fn of(disk: &BackDisk) -> Self {
        let offer = &disk.offer;
        Self {
            segments: offer.max_indirect_segments.map_or(0, |most| most as usize),
            flush: match (offer.flush, offer.barrier) {
                (true, _) => FlushBy::Flush,
                (false, true) => FlushBy::Barrier,
                (false, false) => FlushBy::Nothing,
            },
            discard: offer.discard.is_some(),
            secure_discard: offer.discard.is_some_and(|discard| discard.secure),
            read_only: disk.info.read_only,
            sector_size: disk.sector_size as usize,
            sectors: disk.sectors,
        }
    }

    /// Checks that a request lies within the disk. The backend may fail to: QEMU's compares byte
    /// offsets with the disk's size, and its multiplication overflows.
    pub(super) fn check(&self, op: Op) -> Result<(), StartError> {
        let (sector, sectors) = match op {
            Op::Flush => return Ok(()),
            Op::Read { sector, bytes } | Op::Write { sector, bytes } => {
                (sector, (bytes / SECTOR) as u64)
            }
            Op::Discard { sector, sectors } | Op::SecureDiscard { sector, sectors } => {
                if sectors == 0 {
                    return Err(StartError::Size);
                }
                (sector, sectors)
            }
        };
        let size = self.sectors;
        if sector.checked_add(sectors).is_none_or(|end| end > size) {
            return Err(StartError::OutOfRange { sector, sectors, size });
        }
        Ok(())
    }

    /// Returns the size of a part of a split request, in bytes: whole pages and whole sectors.
    pub(super) const fn part(&self) -> usize {
        let most = self.segments * PAGE_SIZE;
        let sector = if self.sector_size == 0 { 512 } else { self.sector_size };
        let whole = most / sector * sector;
        if whole == 0 { most } else { whole }
    }

    /// Returns the status of a request that need not be sent to the backend, if it is known.
    pub(super) fn answer(&self, op: Op) -> Option<Status> {
        match op {
            // The disk has shrunk since the request was started.
            _ if self.check(op).is_err() => Some(Status::Error),
            Op::Write { .. } | Op::Discard { .. } | Op::SecureDiscard { .. } if self.read_only => {
                Some(Status::Error)
            }
            Op::Flush if matches!(self.flush, FlushBy::Nothing) => Some(Status::NotSupported),
            Op::Discard { .. } if !self.discard => Some(Status::NotSupported),
            Op::SecureDiscard { .. } if !self.secure_discard => Some(Status::NotSupported),
            _ => None,
        }
    }
}

/// Returns at least the number of pages of a direct request.
pub(super) const fn at_least_direct(segments: usize) -> usize {
    if segments > PAGES_PER_SLOT { segments } else { PAGES_PER_SLOT }
}

/// State shared by the queues of one session of a disk, including queues that are taken.
#[derive(Debug)]
pub(crate) struct Shared {
    over: AtomicBool,
    sectors: AtomicU64,
}

impl Default for Shared {
    fn default() -> Self {
        Self { over: AtomicBool::new(false), sectors: AtomicU64::new(QueueLimits::MOST.sectors) }
    }
}

impl Shared {
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Sets the disk's size, in sectors of 512 bytes.
    pub fn resize(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Relaxed);
    }

    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }
}
