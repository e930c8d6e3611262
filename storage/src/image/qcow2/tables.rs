//! The second-level tables of an image, its snapshots' included. Each is visited once, however often
//! it is named.

use super::super::content::{Content, ContentError, each_entry};
use super::header::{Header, incompatible};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use std::collections::HashMap;

/// `L1E_OFFSET_MASK`, `L2E_OFFSET_MASK`.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// `QCOW_OFLAG_COMPRESSED`.
const COMPRESSED: u64 = 1 << 62;
/// Second-level tables that are visited. Each takes a read at least.
const MOST_TABLES: usize = 1 << 18;

/// A part of the file that is used, and by how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Use {
    /// Its first byte.
    pub at: u64,
    /// How many bytes, or how many there may be: the last sector of compressed data need not be there
    /// in whole.
    pub len: u64,
    /// How often.
    pub times: u32,
}

/// Calls `each` for all that the image and its snapshots use: tables and data.
///
/// # Errors
/// [`ContentError`] when a table makes no sense, or there are too many; what `each` says.
pub(super) fn each_use(
    content: &dyn Content,
    header: &Header,
    mut each: impl FnMut(Use) -> Result<(), ContentError>,
) -> Result<(), ContentError> {
    let (at, len) = header.snapshot_table;
    each(Use { at, len, times: 1 })?;
    let mut first = BTreeMap::new();
    for l1 in header.snapshots.iter().map(|s| s.l1).chain([header.l1]) {
        *first.entry(l1).or_insert(0u32) += 1;
    }
    for (at, times, entries) in first.iter().map(|((at, entries), times)| (*at, *times, *entries)) {
        each(Use { at, len: u64::from(entries) * 8, times })?;
    }
    for (at, times) in second_level(content, header, &first)? {
        each(Use { at, len: header.cluster(), times })?;
        each_entry(content, at, header.cluster() / 8, |_, entry| {
            match data(header, u64::from_be_bytes(entry))? {
                Some((at, len)) => each(Use { at, len, times }),
                None => Ok(()),
            }
        })?;
    }
    Ok(())
}

/// Where each second-level table is, and how often it is named.
fn second_level(
    content: &dyn Content,
    header: &Header,
    first: &BTreeMap<(u64, u32), u32>,
) -> Result<Vec<(u64, u32)>, ContentError> {
    let mut second: HashMap<u64, u32> = HashMap::new();
    for ((at, entries), times) in first {
        each_entry(content, *at, u64::from(*entries), |_, entry| {
            let table = u64::from_be_bytes(entry) & OFFSET;
            if table == 0 {
                return Ok(());
            }
            if !table.is_multiple_of(header.cluster()) {
                let what = "a second-level table begins inside a cluster";
                return Err(ContentError::corrupt(what));
            }
            let named = second.entry(table).or_insert(0);
            *named = named.saturating_add(*times);
            if second.len() > MOST_TABLES {
                let what = alloc::format!("more than {MOST_TABLES} second-level tables");
                return Err(ContentError::unsupported(what));
            }
            Ok(())
        })?;
    }
    let mut second: Vec<_> = second.into_iter().collect();
    second.sort_unstable();
    Ok(second)
}

/// Which bytes of the file an entry of a second-level table names.
fn data(header: &Header, entry: u64) -> Result<Option<(u64, u64)>, ContentError> {
    if header.incompatible & incompatible::DATA_FILE != 0 {
        return Ok(None);
    }
    if entry & COMPRESSED != 0 {
        let bits = 62 - (header.cluster_bits - 8);
        let at = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        return Ok(Some((at, sectors * 512 - (at & 511))));
    }
    match entry & OFFSET {
        0 => Ok(None),
        at if !at.is_multiple_of(header.cluster()) => {
            Err(ContentError::corrupt("data begins inside a cluster"))
        }
        at => Ok(Some((at, header.cluster()))),
    }
}
