//! Repair of reference counts after a writer was killed.
//!
//! A cluster that is in use but has a count of 0 would be allocated again, so that two uses
//! overlap. The library can leave such clusters behind when its process is killed (it links a new
//! table before it writes the table's count), and any writer can when power is lost. Therefore an
//! image is marked as not closed ([`incompatible::DIRTY`]) while it is written, as QEMU does for
//! lazy reference counts, and counts that are too low are raised before it is written again. An
//! image of version 2 has no such mark and is checked each time. Counts that are too high only
//! waste space; `qemu-img check -r leaks` releases it.

use super::super::metadata::{Content, ContentError, buffer, each_entry, try_vec};
use super::header::{Header, incompatible};
use super::layout::{RawHeader, RefcountTableEntry};
use super::tables::{Use, each_use};
use alloc::format;
use alloc::vec::Vec;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Maximum number of clusters of a file whose references are counted here: 32 MiB of counters.
const MOST: u64 = 1 << 25;
/// Maximum number of clusters with more references than a counter of one byte can hold.
const MOST_SHARED: usize = 1 << 17;

/// Sets or clears the dirty mark in an image with these incompatible features, durably.
pub(super) fn set_dirty(file: &File, features: u64, dirty: bool) -> io::Result<()> {
    let features = match dirty {
        true => features | incompatible::DIRTY,
        false => features & !incompatible::DIRTY,
    };
    file.write_all_at(&features.to_be_bytes(), RawHeader::INCOMPATIBLE_FEATURES)?;
    file.sync_data()
}

/// Clears the autoclear features (`autoclear_features`), as a writer that does not support them
/// must.
pub(super) fn clear_autoclear(file: &File) -> io::Result<()> {
    file.write_all_at(&[0; 8], RawHeader::AUTOCLEAR_FEATURES)
}

/// Raises every count that is too low. Returns their number. Fails if a reference points outside of
/// the file.
///
/// # Errors
/// [`ContentError`] if the metadata is inconsistent, or cannot be repaired here.
pub(super) fn raise_counts(
    file: &File,
    content: &dyn Content,
    header: &Header,
) -> Result<u64, ContentError> {
    let mut used = Used::new(content, header)?;
    used.range(Use { at: 0, len: 1, times: 1 })?;
    used.range(Use { at: header.refcounts.0, len: header.refcounts.1, times: 1 })?;
    each_block(content, header, |_, at| used.range(Use { at, len: header.cluster(), times: 1 }))?;
    each_use(content, header, |part| used.range(part))?;

    let mut raised = 0;
    let mut next = 0;
    let (per_block, clusters) = (per_block(header), used.counts.len() as u64);
    each_block(content, header, |index, at| {
        let first = index.saturating_mul(per_block);
        if first >= clusters {
            return Ok(());
        }
        used.check_unused(next..first)?;
        next = clusters.min(first + per_block);
        raised += raise_block(file, content, header.refcount_order, at, &used, first..next)?;
        Ok(())
    })?;
    used.check_unused(next..clusters)?;
    file.sync_data()?;
    Ok(raised)
}

/// Returns the number of counts in one block.
fn per_block(header: &Header) -> u64 {
    1 << (header.cluster_bits + 3 - header.refcount_order)
}

/// Calls `each` for every existing block of counts, with its index and offset.
fn each_block(
    content: &dyn Content,
    header: &Header,
    mut each: impl FnMut(u64, u64) -> Result<(), ContentError>,
) -> Result<(), ContentError> {
    let (at, bytes) = header.refcounts;
    each_entry(content, at, bytes / 8, |index, entry: RefcountTableEntry| match entry.get() {
        0 => Ok(()),
        block if !block.is_multiple_of(header.cluster()) => {
            Err(ContentError::corrupt("a block of reference counts begins inside a cluster"))
        }
        block => each(index, block),
    })
}

/// Raises the counts of these clusters in one block.
fn raise_block(
    file: &File,
    content: &dyn Content,
    order: u32,
    at: u64,
    used: &Used,
    clusters: core::ops::Range<u64>,
) -> Result<u64, ContentError> {
    let mut block = buffer(((clusters.end - clusters.start) << order).div_ceil(8))?;
    content.read(at, &mut block)?;
    let (mut raised, mut changed) = (0, None);
    for cluster in clusters.clone() {
        let count = used.get(cluster);
        let position = CountPosition::of(cluster - clusters.start, order);
        if count == 0 || position.get(&block) >= u64::from(count) {
            continue;
        }
        if order < 6 && u64::from(count) >= 1 << (1 << order) {
            return Err(ContentError::corrupt(format!("{count} uses of cluster {cluster}")));
        }
        position.set(&mut block, count.into());
        let (first, _) = changed.unwrap_or((position.byte, 0));
        changed = Some((first, position.byte + position.len));
        raised += 1;
    }
    if let Some((first, end)) = changed {
        let bytes = block.get(first..end).unwrap_or_default();
        file.write_all_at(bytes, at.saturating_add(first as u64))?;
    }
    Ok(raised)
}

/// The position of a count in its block.
struct CountPosition {
    byte: usize,
    len: usize,
    /// For counts of less than a byte: the lowest bit, and the mask.
    bit: u32,
    mask: u64,
}

impl CountPosition {
    fn of(index: u64, order: u32) -> Self {
        let (bit, bits) = (index << order, 1u32 << order);
        let mask = if order < 3 { (1 << bits) - 1 } else { u64::MAX };
        let bit_in_byte = if order < 3 { (bit % 8) as u32 } else { 0 };
        Self { byte: (bit / 8) as usize, len: bits.div_ceil(8) as usize, bit: bit_in_byte, mask }
    }

    fn raw(&self, block: &[u8]) -> u64 {
        let bytes = block.get(self.byte..self.byte + self.len).unwrap_or_default();
        bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn get(&self, block: &[u8]) -> u64 {
        self.raw(block) >> self.bit & self.mask
    }

    fn set(&self, block: &mut [u8], count: u64) {
        let value = self.raw(block) & !(self.mask << self.bit) | count << self.bit;
        let bytes = block.get_mut(self.byte..self.byte + self.len).unwrap_or_default();
        bytes.copy_from_slice(value.to_be_bytes().get(8 - bytes.len()..).unwrap_or_default());
    }
}

/// Rejects an image with references behind the end of its file. Counts may refer there: a writer
/// that is killed after it allocated clusters and before it wrote them leaves such counts behind,
/// without loss of data.
///
/// # Errors
/// [`ContentError::Truncated`], and the errors of reading the tables.
pub(super) fn check_complete(content: &dyn Content, header: &Header) -> Result<(), ContentError> {
    let length = content.length();
    // If the last used cluster is inside the file, it was not truncated, and the full check is not
    // needed.
    let counted = last_counted(content, header)?.unwrap_or(0);
    if counted < length {
        return Ok(());
    }
    each_use(content, header, |part| match part.len == 0 || part.at < length {
        true => Ok(()),
        false => {
            let at = part.at;
            let what = format!("something is at byte {at}, and the file has {length}");
            Err(ContentError::truncated(what))
        }
    })
}

/// Returns the offset of the last cluster with a count above 0.
fn last_counted(content: &dyn Content, header: &Header) -> Result<Option<u64>, ContentError> {
    let mut last = None;
    each_block(content, header, |index, at| {
        last = Some((index, at));
        Ok(())
    })?;
    let Some((index, at)) = last else { return Ok(None) };
    let mut block = buffer(header.cluster())?;
    content.read(at, &mut block)?;
    let Some(byte) = block.iter().rposition(|byte| *byte != 0) else { return Ok(None) };
    let top = block.get(byte).map_or(0, |byte| byte.ilog2());
    let inside = (byte as u64 * 8 + u64::from(top)) >> header.refcount_order;
    let cluster = index.saturating_mul(per_block(header)).saturating_add(inside);
    Ok(cluster.checked_mul(header.cluster()))
}

/// Number of references to each cluster of the file.
struct Used {
    /// [`u8::MAX`] means that the count is in `shared`.
    counts: Vec<u8>,
    shared: HashMap<u64, u32>,
    cluster_bits: u32,
}

impl Used {
    fn new(content: &dyn Content, header: &Header) -> Result<Self, ContentError> {
        let clusters = content.length().div_ceil(header.cluster());
        if clusters > MOST {
            let what = format!("repair of an unclosed image of {clusters} clusters");
            return Err(ContentError::unsupported(what));
        }
        let mut counts = try_vec(clusters)?;
        counts.resize(clusters as usize, 0);
        Ok(Self { counts, shared: HashMap::new(), cluster_bits: header.cluster_bits })
    }

    fn get(&self, cluster: u64) -> u32 {
        match usize::try_from(cluster).ok().and_then(|c| self.counts.get(c)).copied() {
            Some(u8::MAX) => self.shared.get(&cluster).copied().unwrap_or(0),
            count => count.unwrap_or(0).into(),
        }
    }

    /// Adds a reference to every cluster that the range touches.
    fn range(&mut self, part: Use) -> Result<(), ContentError> {
        let Some(last) = part.len.checked_sub(1).and_then(|more| part.at.checked_add(more)) else {
            return Ok(());
        };
        let clusters = part.at >> self.cluster_bits..=last >> self.cluster_bits;
        clusters.into_iter().try_for_each(|cluster| self.add(cluster, part.times))
    }

    fn add(&mut self, cluster: u64, times: u32) -> Result<(), ContentError> {
        let count = usize::try_from(cluster).ok().and_then(|c| self.counts.get_mut(c));
        let count = count.ok_or_else(|| {
            ContentError::corrupt(format!("cluster {cluster} is used and behind the file's end"))
        })?;
        match u8::try_from(times).ok().and_then(|times| count.checked_add(times)) {
            Some(sum) if sum < u8::MAX => *count = sum,
            _ => {
                let before = u32::from(*count);
                *count = u8::MAX;
                let shared = self.shared.entry(cluster).or_insert(before);
                *shared = shared.saturating_add(times);
                if self.shared.len() > MOST_SHARED {
                    let what = format!("more than {MOST_SHARED} clusters in use by hundreds");
                    return Err(ContentError::unsupported(what));
                }
            }
        }
        Ok(())
    }

    /// Rejects clusters that are in use but have no block of counts.
    fn check_unused(&self, mut clusters: core::ops::Range<u64>) -> Result<(), ContentError> {
        match clusters.any(|cluster| self.get(cluster) > 0) {
            false => Ok(()),
            true => Err(ContentError::corrupt(
                "its last writer did not close it, and its reference counts lack a block",
            )),
        }
    }
}
