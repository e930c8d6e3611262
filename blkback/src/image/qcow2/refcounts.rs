//! Reference counts after a writer that was killed.
//!
//! A cluster that is used and whose count says that it is not would be given away again: two things
//! in one place. The library can leave that behind when its process is killed (it links a new table
//! before the table's count is written), and any writer when power is lost. So an image is marked as
//! not closed ([`incompatible::DIRTY`]) for as long as it is written, as QEMU does for lazy
//! reference counts, and counts that are too low are raised before it is written again; an image of
//! version 2 has no such mark, and is looked at each time. Counts that are too high only waste
//! room; `qemu-img check -r leaks` gives it back.

use super::super::content::{Content, ContentError};
use super::header::{Header, incompatible};
use alloc::format;
use alloc::vec::Vec;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// `L1E_OFFSET_MASK`, `L2E_OFFSET_MASK`.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// `QCOW_OFLAG_COMPRESSED`.
const COMPRESSED: u64 = 1 << 62;
/// Clusters of a file beyond which its references are not counted here: 1 GiB of counters.
const MOST: u64 = 1 << 28;
/// Where the incompatible features are in the header.
const FEATURES: u64 = 72;

/// Marks an image as being written, on the medium.
pub(super) fn set_dirty(file: &File, header: &Header, dirty: bool) -> io::Result<()> {
    let features = match dirty {
        true => header.incompatible | incompatible::DIRTY,
        false => header.incompatible & !incompatible::DIRTY,
    };
    file.write_all_at(&features.to_be_bytes(), FEATURES)?;
    file.sync_data()
}

/// Clears the features that only who knows them may keep (`autoclear_features`), as a writer must.
pub(super) fn clear_autoclear(file: &File) -> io::Result<()> {
    const AUTOCLEAR: u64 = 88;
    file.write_all_at(&[0; 8], AUTOCLEAR)
}

/// Raises every count that is too low; how many there were.
///
/// # Errors
/// [`ContentError`] when what is there makes no sense, or is more than this can mend.
pub(super) fn raise(
    file: &File,
    content: &dyn Content,
    header: &Header,
) -> Result<u64, ContentError> {
    let mut used = Used::new(content, header)?;
    used.structures(content, header)?;
    let counts = Counts::read(content, header)?;
    used.add(0, 1)?;
    used.range(header.refcounts.0, header.refcounts.1)?;
    for block in counts.table.iter().filter(|block| **block != 0) {
        used.range(*block, header.cluster())?;
    }
    let mut raised = 0;
    for (cluster, count) in (0u64..).zip(&used.counts).filter(|(_, count)| **count > 0) {
        if counts.get(content, cluster)? < u64::from(*count) {
            counts.set(file, content, cluster, (*count).into())?;
            raised += 1;
        }
    }
    // A cluster that was given away, and that power was lost before anything was written to.
    if let Some(begin) = last_counted(content, header, &counts)?
        && begin >= content.length()
    {
        file.set_len(begin.saturating_add(header.cluster()))?;
    }
    file.sync_data()?;
    Ok(raised)
}

/// Where the last cluster begins whose count says that it is used.
fn last_counted(
    content: &dyn Content,
    header: &Header,
    counts: &Counts,
) -> Result<Option<u64>, ContentError> {
    let Some(block) = counts.table.iter().rposition(|block| *block != 0) else { return Ok(None) };
    let per_block = 1u64 << (header.cluster_bits + 3 - header.refcount_order);
    let first = (block as u64).saturating_mul(per_block);
    let mut last = None;
    for cluster in first..first.saturating_add(per_block) {
        if counts.get(content, cluster)? != 0 {
            last = Some(cluster);
        }
    }
    Ok(last.and_then(|cluster| cluster.checked_mul(header.cluster())))
}

/// Refuses an image whose file ends before the last cluster that is counted as used. To be asked of
/// one that is in order and that nobody writes.
///
/// # Errors
/// [`ContentError::Truncated`], and what reading the counts says.
pub(super) fn is_whole(content: &dyn Content, header: &Header) -> Result<(), ContentError> {
    let counts = Counts::read(content, header)?;
    let begin = last_counted(content, header, &counts)?.unwrap_or(0);
    if begin >= content.length() {
        return Err(ContentError::truncated(format!(
            "data is at byte {begin}, and the file has {}",
            content.length()
        )));
    }
    Ok(())
}

/// How often each cluster of the file is used.
struct Used {
    counts: Vec<u32>,
    cluster_bits: u32,
}

impl Used {
    fn new(content: &dyn Content, header: &Header) -> Result<Self, ContentError> {
        let clusters = content.length().div_ceil(header.cluster());
        if clusters > MOST {
            return Err(ContentError::corrupt(
                "it was not closed by who wrote it last, and is too large to be repaired here",
            ));
        }
        let mut counts = Vec::new();
        let room = counts.try_reserve_exact(clusters as usize);
        room.map_err(|_| ContentError::Io(io::ErrorKind::OutOfMemory.into()))?;
        counts.resize(clusters as usize, 0);
        Ok(Self { counts, cluster_bits: header.cluster_bits })
    }

    fn add(&mut self, cluster: u64, n: u32) -> Result<(), ContentError> {
        let count = usize::try_from(cluster).ok().and_then(|c| self.counts.get_mut(c));
        let count = count.ok_or_else(|| {
            ContentError::corrupt(format!("cluster {cluster} is used and behind the file's end"))
        })?;
        *count = count.saturating_add(n);
        Ok(())
    }

    /// Every cluster that a range of bytes touches.
    fn range(&mut self, at: u64, len: u64) -> Result<(), ContentError> {
        let Some(last) = len.checked_sub(1).and_then(|more| at.checked_add(more)) else {
            return Ok(());
        };
        (at >> self.cluster_bits..=last >> self.cluster_bits).try_for_each(|c| self.add(c, 1))
    }

    /// What the image itself and its snapshots use.
    fn structures(&mut self, content: &dyn Content, header: &Header) -> Result<(), ContentError> {
        self.tables(content, header.l1)?;
        self.range(header.snapshot_table.0, header.snapshot_table.1)?;
        header.snapshots.iter().try_for_each(|snapshot| self.tables(content, snapshot.l1))
    }

    fn tables(
        &mut self,
        content: &dyn Content,
        (at, entries): (u64, u32),
    ) -> Result<(), ContentError> {
        let bytes = u64::from(entries) * 8;
        self.range(at, bytes)?;
        let size = 1u64 << self.cluster_bits;
        for l2 in read_u64s(content, at, bytes)?.into_iter().map(|e| e & OFFSET).filter(|t| *t != 0)
        {
            if !l2.is_multiple_of(size) {
                return Err(ContentError::corrupt("a second-level table begins inside a cluster"));
            }
            self.range(l2, size)?;
            for entry in read_u64s(content, l2, size)? {
                self.data(entry)?;
            }
        }
        Ok(())
    }

    fn data(&mut self, entry: u64) -> Result<(), ContentError> {
        if entry & COMPRESSED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let at = entry & ((1 << bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
            // The last sector need not be there in whole, but its cluster is.
            return self.range(at, sectors * 512 - (at & 511));
        }
        match entry & OFFSET {
            0 => Ok(()),
            at if !at.is_multiple_of(1 << self.cluster_bits) => {
                Err(ContentError::corrupt("data begins inside a cluster"))
            }
            at => self.add(at >> self.cluster_bits, 1),
        }
    }
}

/// The counts as they are in the file.
struct Counts {
    /// Where each block of counts is.
    table: Vec<u64>,
    cluster_bits: u32,
    /// Logarithm of a count's bits.
    order: u32,
}

impl Counts {
    fn read(content: &dyn Content, header: &Header) -> Result<Self, ContentError> {
        let table = read_u64s(content, header.refcounts.0, header.refcounts.1)?;
        let (cluster_bits, order) = (header.cluster_bits, header.refcount_order);
        Ok(Self { table, cluster_bits, order })
    }

    /// Where a cluster's count is: its byte, and for those of less than one, its lowest bit.
    fn place(&self, cluster: u64) -> Option<(u64, u32)> {
        let per_block = self.cluster_bits + 3 - self.order;
        let block = usize::try_from(cluster >> per_block).ok().and_then(|b| self.table.get(b))?;
        let bit = (cluster & ((1 << per_block) - 1)) << self.order;
        (*block != 0).then_some((block + bit / 8, (bit % 8) as u32))
    }

    fn get(&self, content: &dyn Content, cluster: u64) -> Result<u64, ContentError> {
        let Some((at, bit)) = self.place(cluster) else { return Ok(0) };
        let mut bytes = [0; 8];
        let len = (1usize << self.order).div_ceil(8);
        content.read(at, &mut bytes[8 - len..])?;
        let value = u64::from_be_bytes(bytes);
        Ok(if self.order < 3 { value >> bit & ((1 << (1 << self.order)) - 1) } else { value })
    }

    fn set(
        &self,
        file: &File,
        content: &dyn Content,
        cluster: u64,
        count: u64,
    ) -> Result<(), ContentError> {
        let Some((at, bit)) = self.place(cluster) else {
            return Err(ContentError::corrupt(
                "it was not closed by who wrote it last, and its reference counts lack a block",
            ));
        };
        let bits = 1u32 << self.order;
        if bits < 64 && count >= 1 << bits {
            return Err(ContentError::corrupt(format!("{count} uses of cluster {cluster}")));
        }
        let len = (bits as usize).div_ceil(8);
        let mut value = count;
        if self.order < 3 {
            let mut byte = [0];
            content.read(at, &mut byte)?;
            value = u64::from(byte[0]) & !(((1 << bits) - 1) << bit) | count << bit;
        }
        Ok(file.write_all_at(&value.to_be_bytes()[8 - len..], at)?)
    }
}

/// Numbers of a table.
pub(super) fn read_u64s(
    content: &dyn Content,
    at: u64,
    bytes: u64,
) -> Result<Vec<u64>, ContentError> {
    let mut raw = alloc::vec![0; bytes as usize];
    content.read(at, &mut raw)?;
    Ok(raw.chunks_exact(8).map(|b| u64::from_be_bytes(b.try_into().unwrap_or_default())).collect())
}
