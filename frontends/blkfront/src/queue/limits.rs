//! What a backend takes.

use super::{Op, PAGES_PER_SLOT, SECTOR, StartError};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use pvio_ring::proto::blkif::{MAX_INDIRECT_SEGMENTS, Status};
use pvio_ring::shm::PAGE_SIZE;
use pvio_xenbus::handshake::vbd::BackDisk;

/// How what was written is brought to the medium.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushBy {
    /// By a flush.
    Flush,
    /// By a write barrier without data, to old backends that know no flush.
    Barrier,
    /// Not at all: the backend offers neither.
    Nothing,
}

/// What a backend takes, and what the disk is. Requests beyond that are done in parts, or answered
/// without asking it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueLimits {
    /// Pages in one request. More than 11 are asked for by indirect ones.
    pub segments: usize,
    /// How to flush.
    pub flush: FlushBy,
    /// Whether it discards.
    pub discard: bool,
    /// Whether it discards beyond recovery.
    pub secure_discard: bool,
    /// Whether it refuses to be written.
    pub read_only: bool,
    /// Bytes of a logical sector: parts of a request are whole ones.
    pub sector_size: usize,
    /// The disk's size, in sectors of 512 bytes: no request goes beyond.
    pub sectors: u64,
}

impl QueueLimits {
    /// All there is.
    pub const MOST: Self = Self {
        segments: MAX_INDIRECT_SEGMENTS,
        flush: FlushBy::Flush,
        discard: true,
        secure_discard: true,
        read_only: false,
        sector_size: 512,
        sectors: u64::MAX / SECTOR as u64,
    };

    /// What a connected backend says. Linux's says most of it only then.
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

    /// Checks that a request lies on the disk. A backend may not find that out: QEMU's compares bytes
    /// with the disk's end, and its multiplication wraps.
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

    /// Bytes of a part of a request that is too large for one: whole pages, and whole sectors.
    pub(super) const fn part(&self) -> usize {
        let most = self.segments * PAGE_SIZE;
        let sector = if self.sector_size == 0 { 512 } else { self.sector_size };
        let whole = most / sector * sector;
        if whole == 0 { most } else { whole }
    }

    /// What to answer without asking the backend, if that is known.
    pub(super) fn answer(&self, op: Op) -> Option<Status> {
        match op {
            // The disk is smaller than the one it was started for.
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

/// As many pages as a direct request has, at least.
pub(super) const fn at_least_direct(segments: usize) -> usize {
    if segments > PAGES_PER_SLOT { segments } else { PAGES_PER_SLOT }
}

/// What the queues of one session of a disk share, also those that are out.
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

    /// The disk has this size from now on.
    pub fn resize(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Relaxed);
    }

    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }
}
