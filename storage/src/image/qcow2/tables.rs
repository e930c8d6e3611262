//! Iteration over the second-level tables of an image, including those of its snapshots. Each table
//! is visited once, even if there are several references to it.

use super::super::metadata::{Content, ContentError, each_entry};
use super::header::{Header, incompatible};
use super::layout::{L1Entry, L2Entry};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use std::collections::HashMap;

/// Maximum number of second-level tables to visit. Each takes at least one read.
const MOST_TABLES: usize = 1 << 18;

/// A part of the file that is in use, and the number of its uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Use {
    /// Offset of its first byte.
    pub at: u64,
    /// Its length in bytes; an upper bound for compressed data, whose last sector may be
    /// incomplete.
    pub len: u64,
    /// Number of references to it.
    pub times: u32,
}

/// Calls `each` for all parts that the image and its snapshots use: tables and data.
///
/// # Errors
/// [`ContentError`] if a table is inconsistent, or there are too many; the error of `each`.
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
        each_entry(content, at, header.cluster() / 8, |_, entry: L2Entry| {
            match data(header, entry)? {
                Some((at, len)) => each(Use { at, len, times }),
                None => Ok(()),
            }
        })?;
    }
    Ok(())
}

/// Returns the offset of each second-level table, and the number of references to it.
fn second_level(
    content: &dyn Content,
    header: &Header,
    first: &BTreeMap<(u64, u32), u32>,
) -> Result<Vec<(u64, u32)>, ContentError> {
    let mut second: HashMap<u64, u32> = HashMap::new();
    for ((at, entries), times) in first {
        each_entry(content, *at, u64::from(*entries), |_, entry: L1Entry| {
            let table = entry.table();
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

/// Returns the byte range of the file to which a second-level entry refers.
fn data(header: &Header, entry: L2Entry) -> Result<Option<(u64, u64)>, ContentError> {
    if header.incompatible & incompatible::DATA_FILE != 0 {
        return Ok(None);
    }
    if let Some(range) = entry.compressed(header.cluster_bits) {
        return Ok(Some(range));
    }
    match entry.cluster() {
        0 => Ok(None),
        at if !at.is_multiple_of(header.cluster()) => {
            Err(ContentError::corrupt("data begins inside a cluster"))
        }
        at => Ok(Some((at, header.cluster()))),
    }
}
