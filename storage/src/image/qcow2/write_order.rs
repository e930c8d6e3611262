//! Write ordering of an image.
//!
//! A power loss may lose any of the writes since the last flush of the host's file. Therefore a
//! reference from one part of an image to another is written only after the other part is durable:
//!
//! | before this is written | this must be durable |
//! |---|---|
//! | a second-level table | all data, data copied for it, and reference counts |
//! | an entry of the first-level table or of the reference count table | the table it refers to |
//! | the header, which refers to these two tables | everything |
//!
//! The library orders writes among the tables in its caches, but does not flush between them. This
//! module recognizes what the library writes by its offset: the header refers to the two top
//! tables, and the entries of the first-level table refer to all second-level tables. Reference
//! counts need no further order, since [`refcounts`] repairs counts that are too low.
//!
//! [`refcounts`]: super::refcounts

use super::super::file::punch;
use super::super::metadata::{ContentError, FileContent, Meter, each_entry, try_vec};
use super::header::Header;
use super::layout::L1Entry;
use crate::engine::FlushState;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use pvio_imagefile::Change;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use zerocopy::FromBytes;

/// The write order of one file.
#[derive(Debug)]
pub(super) struct WriteOrder {
    /// The same file as the library's, through the page cache.
    file: File,
    cluster_bits: u32,
    tables: RwLock<Tables>,
    /// Numbers of changes: of anything, and of anything that second-level tables refer to.
    all: AtomicU64,
    data: AtomicU64,
    /// The numbers of both that are durable.
    synced: Mutex<(u64, u64)>,
    /// Records failed flushes: it is unknown which writes they lost.
    flushes: Arc<FlushState>,
    /// Changes of entries that are being made or have failed, in order.
    entries: Mutex<Vec<EntryChange>>,
}

/// A change of entries of the first-level table or of the reference count table. The library has made
/// it in memory, and does not repeat it if it fails.
#[derive(Debug)]
struct EntryChange {
    at: u64,
    bytes: Vec<u8>,
    failed: bool,
}

#[derive(Debug)]
struct Tables {
    /// The first-level table, and the reference count table, as byte ranges.
    l1: Range<u64>,
    refcount_table: Range<u64>,
    /// The cluster of the second-level table for each first-level entry, and the set of these
    /// clusters.
    l1_clusters: Vec<u64>,
    l2_clusters: HashSet<u64>,
}

impl Tables {
    fn none() -> Self {
        Self {
            l1: 0..0,
            refcount_table: 0..0,
            l1_clusters: Vec::new(),
            l2_clusters: HashSet::new(),
        }
    }
}

/// The part of an image that a write changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Header,
    /// An entry of the first-level table or of the reference count table.
    Entry,
    SecondLevel,
    Data,
}

impl WriteOrder {
    /// Creates the order of an image that has no writer so far.
    ///
    /// # Errors
    /// [`ContentError`] if its first-level table cannot be read.
    pub fn new(file: File, header: &Header, meter: &Meter) -> Result<Self, ContentError> {
        let mut this = Self {
            file,
            cluster_bits: header.cluster_bits,
            tables: RwLock::new(Tables::none()),
            all: AtomicU64::new(0),
            data: AtomicU64::new(0),
            synced: Mutex::default(),
            flushes: Arc::default(),
            entries: Mutex::default(),
        };
        let tables = this.tables.get_mut().unwrap_or_else(PoisonError::into_inner);
        tables.read(&FileContent::new(&this.file, meter)?, header)?;
        Ok(this)
    }

    /// Returns whether a flush of the file has failed.
    pub fn flush_state(&self) -> &Arc<FlushState> {
        &self.flushes
    }

    /// Releases a range of the file, which then reads as zeroes.
    ///
    /// # Errors
    /// The system's error; `EOPNOTSUPP` if the file system does not support it.
    pub fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let punched = punch(&self.file, at, len);
        self.changed(Part::Data);
        punched
    }

    fn part(&self, at: u64, len: u64) -> Part {
        let Some(last) = len.checked_sub(1).and_then(|more| at.checked_add(more)) else {
            return Part::Data;
        };
        let (first, last) = (at >> self.cluster_bits, last >> self.cluster_bits);
        let touches = |range: &Range<u64>| range.start < at.saturating_add(len) && at < range.end;
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        if first == 0 {
            Part::Header
        } else if touches(&tables.l1) || touches(&tables.refcount_table) {
            Part::Entry
        } else if (first..=last).any(|cluster| tables.l2_clusters.contains(&cluster)) {
            Part::SecondLevel
        } else {
            Part::Data
        }
    }

    fn changed(&self, part: Part) {
        if part != Part::SecondLevel {
            self.data.fetch_add(1, Ordering::SeqCst);
        }
        self.all.fetch_add(1, Ordering::SeqCst);
    }

    fn entries(&self) -> MutexGuard<'_, Vec<EntryChange>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the changes of entries that have failed. Until then, the file lacks references to tables
    /// that the library uses.
    ///
    /// # Errors
    /// The system's error.
    pub fn repeat_failed(&self) -> io::Result<()> {
        let mut entries = self.entries();
        while let Some(place) = entries.iter().position(|change| change.failed) {
            let Some(EntryChange { at, bytes, .. }) = entries.get(place) else { break };
            self.barrier(true)?;
            let made = self.file.write_all_at(bytes, *at);
            self.changed(Part::Entry);
            made?;
            entries.remove(place);
        }
        Ok(())
    }

    /// Makes completed changes durable: all of them, or at least those of data.
    fn barrier(&self, all: bool) -> io::Result<()> {
        // A concurrent caller waits for the flush in progress, which may already cover its changes.
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.all.load(Ordering::SeqCst), self.data.load(Ordering::SeqCst));
        if !self.flushes.has_failed() && now.1 == synced.1 && (!all || now.0 == synced.0) {
            return Ok(());
        }
        self.flushes.flush(|| self.file.sync_data())?;
        *synced = now;
        Ok(())
    }
}

impl pvio_imagefile::WriteOrdering for WriteOrder {
    fn before(&self, change: &Change<'_>) -> io::Result<()> {
        match self.part(change.at, change.len) {
            Part::Data => return Ok(()),
            Part::SecondLevel => return self.barrier(false),
            Part::Header => {}
            Part::Entry => {
                let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
                tables.add_references(change, self.cluster_bits);
                drop(tables);
                let ready = self.repeat_failed().and_then(|()| self.barrier(true));
                let (at, bytes, failed) = (change.at, change.bytes(), ready.is_err());
                self.entries().push(EntryChange { at, bytes, failed });
                return ready;
            }
        }
        self.barrier(true)
    }

    fn after(&self, at: u64, len: u64, made: bool) -> io::Result<()> {
        let part = self.part(at, len);
        self.changed(part);
        if part == Part::Entry {
            let mut entries = self.entries();
            let begun = |change: &EntryChange| change.at == at && !change.failed;
            if let Some(place) = entries.iter().position(begun) {
                match (made, entries.get_mut(place)) {
                    (false, Some(change)) => change.failed = true,
                    _ => drop(entries.remove(place)),
                }
            }
        }
        if part != Part::Header {
            return Ok(());
        }
        // The old place of a table may be reused as soon as this write completes.
        self.barrier(true)?;
        let meter = Meter::default();
        let content = FileContent::new(&self.file, &meter)?;
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let read = Header::read(&content).and_then(|header| tables.read(&content, &header));
        read.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    fn sync(&self) -> io::Result<()> {
        self.barrier(true)
    }
}

impl Tables {
    /// Reads the locations of the tables by a header.
    fn read(&mut self, content: &FileContent<'_>, header: &Header) -> Result<(), ContentError> {
        let (at, entries) = (header.l1.0, u64::from(header.l1.1));
        let mut named = try_vec(entries)?;
        each_entry(content, at, entries, |_, entry: L1Entry| {
            named.push(entry.table() >> header.cluster_bits);
            Ok(())
        })?;
        let tables = named.iter().filter(|cluster| **cluster != 0);
        let no_memory = |_| ContentError::Io(io::ErrorKind::OutOfMemory.into());
        let mut second = HashSet::new();
        second.try_reserve(tables.clone().count()).map_err(no_memory)?;
        second.extend(tables);
        *self = Self {
            l1: at..at.saturating_add(entries * 8),
            refcount_table: header.refcounts.0
                ..header.refcounts.0.saturating_add(header.refcounts.1),
            l1_clusters: named,
            l2_clusters: second,
        };
        Ok(())
    }

    /// Adds the second-level tables to which a pending write refers.
    fn add_references(&mut self, change: &Change<'_>, cluster_bits: u32) {
        let bytes = change.bytes();
        // Only whole entries, and only of the first-level table.
        let begin = self.l1.start.max(change.at.next_multiple_of(8));
        let end = self.l1.end.min(change.at.saturating_add(change.len));
        let inside = |at: u64| usize::try_from(at.saturating_sub(change.at)).unwrap_or(usize::MAX);
        let named = bytes.get(inside(begin)..inside(end)).unwrap_or_default();
        let entries = <[L1Entry]>::ref_from_prefix(named).map_or(&[][..], |(whole, _)| whole);
        let slot = begin.saturating_sub(self.l1.start) / 8;
        self.set_entries(usize::try_from(slot).unwrap_or(usize::MAX), entries, cluster_bits);
    }

    /// Sets the entries from `slot` on. The cluster of a table without a reference may be reused
    /// for data.
    fn set_entries(&mut self, slot: usize, entries: &[L1Entry], cluster_bits: u32) {
        let slots = self.l1_clusters.get_mut(slot..).unwrap_or_default();
        for (named, entry) in slots.iter_mut().zip(entries) {
            let cluster = entry.table() >> cluster_bits;
            if *named != cluster {
                self.l2_clusters.remove(named);
                *named = cluster;
            }
            if cluster != 0 {
                self.l2_clusters.insert(cluster);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_imagefile::WriteOrdering as _;

    /// Returns the order of an image that has only metadata: clusters of 4 KiB, the first-level
    /// table in the third cluster, reference counts in the second.
    fn order(dir: &std::path::Path) -> WriteOrder {
        let path = dir.join("image");
        let mut bytes = alloc::vec![0; 16 << 12];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
        let mut field = |at: usize, value: u64| {
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        };
        field(20, 12 << 32);
        field(24, 4 << 20);
        field(36, 2 << 32);
        field(40, 2 << 12);
        field(48, 1 << 12);
        field(56, 1 << 32);
        field(2 << 12, 5 << 12 | 1 << 63);
        std::fs::write(&path, &bytes).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let meter = Meter::default();
        let header = Header::read(&FileContent::new(&file, &meter).unwrap()).unwrap();
        WriteOrder::new(file, &header, &meter).unwrap()
    }

    #[test]
    fn write_is_classified_by_offset_and_length() {
        let dir = tempfile::tempdir().unwrap();
        let order = order(dir.path());
        let parts = [
            (0, 8, Part::Header),
            (1 << 12, 8, Part::Entry),
            ((2 << 12) + 8, 8, Part::Entry),
            // Behind the last entry.
            ((2 << 12) + 16, 8, Part::Data),
            (5 << 12, 4096, Part::SecondLevel),
            (4 << 12, 8192, Part::SecondLevel),
            (6 << 12, 4096, Part::Data),
            (u64::MAX, 1, Part::Data),
            (u64::MAX, 2, Part::Data),
        ];
        for (at, len, part) in parts {
            assert!(order.part(at, len) == part, "{at}+{len}");
        }
    }

    #[test]
    fn referenced_cluster_is_synced_before_its_reference_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let order = order(dir.path());
        let zeroes = |at, len| Change::of_zeroes(at, len);
        let synced = || *order.synced.lock().unwrap();
        // Data, then the table.
        order.before(&zeroes(6 << 12, 4096)).unwrap();
        order.after(6 << 12, 4096, true).unwrap();
        assert_eq!(synced(), (0, 0));
        order.before(&zeroes(5 << 12, 4096)).unwrap();
        assert_eq!(synced(), (1, 1));
        order.after(5 << 12, 4096, true).unwrap();
        // No data was written since.
        order.before(&zeroes(5 << 12, 4096)).unwrap();
        assert_eq!(synced(), (1, 1));
        // The table, then the reference to it.
        let entry = (5u64 << 12 | 1 << 63).to_be_bytes();
        let vector = entry.as_slice().into();
        order.before(&Change::of(2 << 12, &vector)).unwrap();
        assert_eq!(synced(), (2, 1));
        order.after(2 << 12, 8, true).unwrap();
        order.sync().unwrap();
        assert_eq!(synced(), (3, 2));
        // A hole counts as a change of data.
        order.punch(7 << 12, 4096).unwrap();
        order.before(&zeroes(5 << 12, 4096)).unwrap();
        assert_eq!(synced(), (4, 3));
        // The header is durable before anything else is written.
        order.before(&zeroes(80, 8)).unwrap();
        order.after(80, 8, true).unwrap();
        assert_eq!(synced(), (5, 4));
    }

    #[test]
    fn failed_change_of_entries_is_made_before_any_other() {
        let dir = tempfile::tempdir().unwrap();
        let order = order(dir.path());
        let entry = |cluster: u64| (cluster << 12 | 1 << 63).to_be_bytes();
        let read = |at: u64| {
            let mut bytes = [0; 8];
            order.file.read_exact_at(&mut bytes, at).unwrap();
            bytes
        };
        let (first, second) = (entry(8), entry(9));
        order.before(&Change::of(2 << 12, &first.as_slice().into())).unwrap();
        order.after(2 << 12, 8, false).unwrap();
        assert_ne!(read(2 << 12), first);
        // The library writes the next entry, and not the first one.
        order.before(&Change::of((2 << 12) + 8, &second.as_slice().into())).unwrap();
        assert_eq!(read(2 << 12), first);
        assert_eq!(order.entries().len(), 1, "the one being made");
        order.after((2 << 12) + 8, 8, true).unwrap();
        order.repeat_failed().unwrap();
        assert!(order.entries().is_empty());
        assert_ne!(read((2 << 12) + 8), second, "a change that was made is not repeated");
    }

    #[test]
    fn written_first_level_entry_marks_its_table_as_second_level() {
        let dir = tempfile::tempdir().unwrap();
        let order = order(dir.path());
        assert!(order.part(9 << 12, 4096) == Part::Data);
        let entry = (9u64 << 12 | 1 << 63).to_be_bytes();
        let vector = entry.as_slice().into();
        order.before(&Change::of((2 << 12) + 8, &vector)).unwrap();
        assert!(order.part(9 << 12, 4096) == Part::SecondLevel);
        // Another table in its place: the old cluster is free.
        let other = (11u64 << 12).to_be_bytes();
        let vector = other.as_slice().into();
        order.before(&Change::of((2 << 12) + 8, &vector)).unwrap();
        assert!(order.part(9 << 12, 4096) == Part::Data);
        assert!(order.part(11 << 12, 4096) == Part::SecondLevel);
        // In one write with adjacent data, as with `O_DIRECT`.
        let mut page = alloc::vec![0; 4096];
        page[8..16].copy_from_slice(&(10u64 << 12).to_be_bytes());
        let vector = page.as_slice().into();
        order.before(&Change::of(2 << 12, &vector)).unwrap();
        assert!(order.part(10 << 12, 4096) == Part::SecondLevel);
    }
}
