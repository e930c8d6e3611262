//! Validation of requests against the disk.

use crate::engine::Geometry;
use pvio_ring::proto::blkif::{DataOp, RefusalReason, Segment, Status};

/// Checks a data request against the disk. Returns the number of bytes it transfers.
pub(super) fn data(
    disk: &Geometry,
    op: DataOp,
    sector: u64,
    segments: impl ExactSizeIterator<Item = Segment>,
) -> Result<u32, RefusalReason> {
    let moves = segments.len() > 0;
    let writes = match op {
        DataOp::Read => false,
        DataOp::Write | DataOp::WriteBarrier => true,
        DataOp::Flush => moves,
    };
    if disk.read_only && writes {
        return Err(RefusalReason::ReadOnly);
    }
    if !moves {
        return Ok(0);
    }
    let unit = (disk.sector_size / 512).max(1);
    let mut whole = sector.is_multiple_of(u64::from(unit));
    // The sum cannot overflow: at most 4096 segments of 8 sectors.
    let sectors: u32 = segments
        .inspect(|s| {
            whole &= u32::from(s.first).is_multiple_of(unit) && s.sectors().is_multiple_of(unit);
        })
        .map(Segment::sectors)
        .sum();
    range(disk, sector, u64::from(sectors))?;
    if whole { Ok(sectors * 512) } else { Err(RefusalReason::Misaligned) }
}

/// Checks a discard against the disk, in the order of Linux's backend (`dispatch_discard_io`,
/// `blkdev_issue_discard`): the first failing check determines the status.
pub(super) fn discard(
    disk: &Geometry,
    sector: u64,
    sectors: u64,
) -> Result<(), (Status, RefusalReason)> {
    let error = |reason| (Status::Error, reason);
    if disk.read_only {
        return Err(error(RefusalReason::ReadOnly));
    }
    range(disk, sector, sectors).map_err(error)?;
    if disk.discard.is_none() {
        return Err((Status::NotSupported, RefusalReason::UnknownOperation));
    }
    let unit = u64::from(disk.sector_size / 512).max(1);
    if !sector.is_multiple_of(unit) || !sectors.is_multiple_of(unit) {
        return Err(error(RefusalReason::Misaligned));
    }
    if sectors == 0 { Err(error(RefusalReason::Empty)) } else { Ok(()) }
}

fn range(disk: &Geometry, sector: u64, sectors: u64) -> Result<(), RefusalReason> {
    match sector.checked_add(sectors) {
        Some(end) if end <= disk.sectors || pvio_ring::planted!(SectorBound) => Ok(()),
        _ => Err(RefusalReason::OutOfRange),
    }
}
