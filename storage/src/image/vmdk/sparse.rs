//! Sparse extents: grains in the order of their allocation, located through a directory and its
//! tables. Both the directory and the tables exist twice.
//!
//! # Crash consistency
//! New grains and tables are only placed at the end of the file. A reference that becomes durable
//! before the grain's data leads to zeroes, the previous contents of the disk. Therefore writes
//! need no order, and a flush is a flush of the file. A reference may then point behind the end of
//! the file, as in a truncated image: for this reason the header marks the extent as not closed
//! while it is written.

use super::super::file::punch;
use super::super::metadata::{
    Content, ContentError, FileContent, Meter, each_entry, read_struct, try_vec,
};
use super::super::storage::Purpose;
use super::header::Header;
use super::layout::{GrainMarker, RawHeader, SECTOR, TableEntry};
use crate::engine::FlushState;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock};
use zerocopy::{FromZeros, IntoBytes};

/// An open sparse extent.
pub(super) struct Sparse {
    file: File,
    header: Header,
    write: bool,
    state: RwLock<State>,
    flushes: FlushState,
}

struct State {
    /// The first sector of each table, and of its redundant copy.
    tables: Vec<[u32; 2]>,
    /// End of the file, where the next grain is placed.
    end: u64,
}

impl Sparse {
    /// Opens a locked extent. If it is `written`, and is to be served, it is repaired and marked as
    /// not closed.
    pub fn open(
        file: File,
        header: Header,
        written: Option<Purpose>,
        meter: &Meter,
    ) -> Result<Self, ContentError> {
        let content = FileContent::new(&file, meter)?;
        let state = State::read(&content, &header)?;
        if written.is_none() && state.end > content.length() {
            return Err(ContentError::corrupt(
                "its last writer did not close it; it is repaired when it is attached for writing",
            ));
        }
        let write = written == Some(Purpose::Serve);
        let (state, flushes) = (RwLock::new(state), FlushState::default());
        let this = Self { write, state, flushes, header, file };
        if write {
            this.repair()?;
            this.set_unclean(true)?;
        }
        Ok(this)
    }

    /// Returns its properties as text.
    pub fn features(&self) -> Vec<String> {
        let mut features = alloc::vec![format!("grains of {} bytes", self.header.grain)];
        features.extend(self.header.compressed.then(|| "compressed".into()));
        features.extend(self.header.unclean.then(|| "not closed".into()));
        features
    }

    /// Makes both copies of the tables equal, and extends the file to cover everything it refers
    /// to.
    fn repair(&self) -> io::Result<()> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if self.file.metadata()?.len() < state.end {
            self.file.set_len(state.end)?;
        }
        if !self.header.unclean {
            return Ok(());
        }
        let tables = state.tables.iter().filter(|[first, other]| *first != 0 && *other != 0);
        for [first, other] in tables {
            let mut table = alloc::vec![0; self.header.entries as usize * 4];
            self.file.read_exact_at(&mut table, u64::from(*first) * SECTOR)?;
            self.file.write_all_at(&table, u64::from(*other) * SECTOR)?;
        }
        tracing::warn!("a disk image had not been closed: its tables are consistent");
        Ok(())
    }

    fn set_unclean(&self, unclean: bool) -> io::Result<()> {
        self.file.write_all_at(&[unclean.into()], RawHeader::UNCLEAN_SHUTDOWN)?;
        self.flush()
    }

    /// Returns the offset of a grain's data in the file, if it is allocated. Reads the table each
    /// time, because the tables of a disk of terabytes exceed the memory budget.
    fn place(&self, number: u64) -> io::Result<Option<u64>> {
        self.place_in(&self.state.read().unwrap_or_else(PoisonError::into_inner), number)
    }

    fn place_in(&self, state: &State, number: u64) -> io::Result<Option<u64>> {
        let (table, inside) = (number / self.header.entries, number % self.header.entries);
        let tables = usize::try_from(table).ok().and_then(|table| state.tables.get(table));
        let [table, _] = *tables.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut entry = TableEntry::ZERO;
        if table != 0 {
            let at = u64::from(table) * SECTOR + inside * 4;
            match self.file.read_exact_at(entry.as_mut_bytes(), at) {
                // It may be behind the end of a file that was not closed.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                other => other?,
            }
        }
        let place = Some(entry.get()).filter(|grain| self.header.has(*grain));
        Ok(place.map(|sector| u64::from(sector) * SECTOR))
    }

    pub fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        for part in Parts::of(at, into.len() as u64, self.header.grain) {
            let n = part.len as usize;
            let into = into.get_mut((part.at - at) as usize..).and_then(|rest| rest.get_mut(..n));
            let into = into.ok_or(io::ErrorKind::UnexpectedEof)?;
            match self.place(part.at / self.header.grain)? {
                None => into.fill(0),
                Some(place) if self.header.compressed => {
                    self.inflate(part.at / self.header.grain, place, part.inside, into)?;
                }
                Some(place) => self.file.read_exact_at(into, place + part.inside)?,
            }
        }
        Ok(())
    }

    /// Decompresses a part of a compressed grain, after checking its marker: first sector and
    /// length.
    fn inflate(&self, number: u64, place: u64, inside: u64, into: &mut [u8]) -> io::Result<()> {
        let wrong = |what: &str| {
            io::Error::new(io::ErrorKind::InvalidData, format!("grain {number}: {what}"))
        };
        let mut marker = GrainMarker::new_zeroed();
        self.file.read_exact_at(marker.as_mut_bytes(), place)?;
        let packed = u64::from(marker.size.get());
        if marker.lba.get() != number * self.header.grain / SECTOR {
            return Err(wrong("another is there"));
        }
        // Compression adds only a little to data that is not compressible.
        if packed > 2 * self.header.grain + 1024 {
            return Err(wrong("it is longer than it can be"));
        }
        let mut data = alloc::vec![0; packed as usize];
        self.file.read_exact_at(&mut data, place + GrainMarker::LEN)?;
        let limit = self.header.grain as usize;
        let mut whole = decompress_to_vec_zlib_with_limit(&data, limit)
            .map_err(|_| wrong("it cannot be unpacked"))?;
        // The last grain may end with the disk.
        whole.resize(limit, 0);
        let part = whole.get(inside as usize..).and_then(|rest| rest.get(..into.len()));
        into.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    pub fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        for part in Parts::of(at, from.len() as u64, self.header.grain) {
            let data = from.get((part.at - at) as usize..).and_then(|r| r.get(..part.len as usize));
            let data = data.ok_or(io::ErrorKind::UnexpectedEof)?;
            let number = part.at / self.header.grain;
            match self.place(number)? {
                Some(place) => self.file.write_all_at(data, place + part.inside)?,
                None => self.write_new(number, part.inside, data)?,
            }
        }
        Ok(())
    }

    /// Writes into a newly allocated grain, unless another thread allocated it in the meantime.
    fn write_new(&self, number: u64, inside: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = self.place_in(&state, number)? {
            return self.file.write_all_at(data, place + inside);
        }
        let tables = self.tables_of(&mut state, number / self.header.entries)?;
        let (place, sector) = self.end(&mut state, self.header.grain)?;
        self.file.write_all_at(data, place + inside)?;
        for table in tables.into_iter().filter(|table| *table != 0) {
            let at = u64::from(table) * SECTOR + number % self.header.entries * 4;
            self.file.write_all_at(TableEntry::new(sector).as_bytes(), at)?;
        }
        Ok(())
    }

    /// Returns the tables that refer to a grain, which are allocated if necessary.
    fn tables_of(&self, state: &mut State, table: u64) -> io::Result<[u32; 2]> {
        let index = usize::try_from(table).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let mut found = state.tables.get(index).copied().ok_or(io::ErrorKind::UnexpectedEof)?;
        let directories = [Some(self.header.directory), self.header.redundant];
        for (found, directory) in found.iter_mut().zip(directories) {
            let Some(directory) = directory.filter(|_| *found == 0) else { continue };
            let bytes = (self.header.entries * 4).next_multiple_of(SECTOR);
            let (_, sector) = self.end(state, bytes)?;
            self.file.write_all_at(TableEntry::new(sector).as_bytes(), directory + table * 4)?;
            *found = sector;
        }
        if let Some(tables) = state.tables.get_mut(index) {
            *tables = found;
        }
        Ok(found)
    }

    /// Extends the file. Returns the offset and the sector of the new range.
    fn end(&self, state: &mut State, bytes: u64) -> io::Result<(u64, u32)> {
        let place = state.end.next_multiple_of(SECTOR);
        let sector = u32::try_from(place / SECTOR).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let end = place.checked_add(bytes).ok_or(io::ErrorKind::FileTooLarge)?;
        self.file.set_len(end)?;
        state.end = end;
        Ok((place, sector))
    }

    /// Flushes the extent; calls must not overlap. After a failure, the extent stays marked as not
    /// closed.
    pub fn flush(&self) -> io::Result<()> {
        self.flushes.flush(|| self.file.sync_data())
    }

    /// Releases the space of a discarded range; its grains stay allocated.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        for part in Parts::of(at, len, self.header.grain) {
            if let Some(place) = self.place(part.at / self.header.grain)? {
                punch(&self.file, place + part.inside, part.len)?;
            }
        }
        Ok(())
    }
}

impl Drop for Sparse {
    fn drop(&mut self) {
        if self.write
            && let Err(error) = self.flush().and_then(|()| self.set_unclean(false))
        {
            tracing::error!(%error, "the dirty mark of a disk image cannot be removed");
        }
    }
}

impl State {
    /// Reads all tables, and checks that no parts of the file overlap.
    fn read(content: &dyn Content, header: &Header) -> Result<Self, ContentError> {
        content.meter().retain(header.tables * size_of::<[u32; 2]>() as u64)?;
        let mut tables = try_vec(header.tables)?;
        each_entry(content, header.directory, header.tables, |_, entry: TableEntry| {
            tables.push([entry.get(), 0]);
            Ok(())
        })?;
        if let Some(redundant) = header.redundant {
            each_entry(content, redundant, header.tables, |index, entry: TableEntry| {
                if let Some([_, other]) = tables.get_mut(index as usize) {
                    *other = entry.get();
                }
                Ok(())
            })?;
        }
        let end = Places::of(content, header, &tables)?.end();
        Ok(Self { tables, end })
    }
}

/// The layout of the file. Positions are in sectors, as in the file.
struct Places<'a> {
    header: &'a Header,
    length: u64,
    /// Header, directories and descriptor as sector ranges; all three lists are sorted.
    parts: Vec<(u64, u64)>,
    tables: Vec<u32>,
    grains: Vec<u32>,
    /// End of the last grain, in bytes.
    last: u64,
}

/// Maximum number of grains of one extent: 256 GiB of data in grains of 64 KiB.
const MOST_GRAINS: usize = 1 << 22;

impl<'a> Places<'a> {
    fn of(
        content: &dyn Content,
        header: &'a Header,
        tables: &[[u32; 2]],
    ) -> Result<Self, ContentError> {
        let sectors = |(at, bytes): (u64, u64)| (at / SECTOR, (at + bytes).div_ceil(SECTOR));
        let mut parts = alloc::vec![(0, 1), sectors((header.directory, header.tables * 4))];
        parts.extend(header.redundant.map(|at| sectors((at, header.tables * 4))));
        parts.extend(header.descriptor.map(sectors));
        parts.sort_unstable();
        let (tables_there, grains) = (try_vec(tables.len() as u64 * 2)?, Vec::new());
        let length = content.length();
        let mut this = Self { header, length, parts, tables: tables_there, grains, last: 0 };
        // First checks that no two tables are in the same place, because their number bounds the
        // reads below.
        for table in tables.iter().flatten().filter(|table| **table != 0) {
            this.inside(*table, header.entries * 4, "a grain table")?;
            this.tables.push(*table);
        }
        this.tables.sort_unstable();
        this.check()?;
        this.read_grains(content, tables)?;
        this.grains.sort_unstable();
        this.check()?;
        Ok(this)
    }

    fn read_grains(
        &mut self,
        content: &dyn Content,
        tables: &[[u32; 2]],
    ) -> Result<(), ContentError> {
        let header = self.header;
        let len = if header.compressed { GrainMarker::LEN } else { header.grain };
        let whole = header.sectors.div_ceil(header.grain / SECTOR);
        for (first, [table, _]) in (0..).step_by(header.entries as usize).zip(tables) {
            let at = u64::from(*table) * SECTOR;
            // It may be behind the end of a file that was not closed.
            if *table == 0 || at + header.entries * 4 > self.length {
                continue;
            }
            let count = header.entries.min(whole.saturating_sub(first));
            each_entry(content, at, count, |_, entry: TableEntry| {
                let grain = entry.get();
                if !header.has(grain) {
                    return Ok(());
                }
                self.inside(grain, len, "a grain")?;
                if self.grains.len() == MOST_GRAINS {
                    let what = format!("more than {MOST_GRAINS} grains in one extent");
                    return Err(ContentError::unsupported(what));
                }
                let no_memory = |_| io::Error::from(io::ErrorKind::OutOfMemory);
                self.grains.try_reserve(1).map_err(no_memory)?;
                self.grains.push(grain);
                Ok(())
            })?;
        }
        let Some(last) = self.grains.iter().max().copied() else { return Ok(()) };
        let mut len = len;
        if header.compressed {
            let marker: GrainMarker = read_struct(content, u64::from(last) * SECTOR)?;
            len += u64::from(marker.size.get());
            self.inside(last, len, "a grain")?;
        }
        self.last = u64::from(last) * SECTOR + len;
        Ok(())
    }

    fn inside(&self, sector: u32, bytes: u64, what: &str) -> Result<(), ContentError> {
        if u64::from(sector) * SECTOR + bytes > self.length && !self.header.unclean {
            return Err(ContentError::truncated(format!("{what} is in sector {sector}")));
        }
        Ok(())
    }

    /// Merges all three lists in the order of positions.
    fn check(&self) -> Result<(), ContentError> {
        let len = |bytes: u64| bytes.div_ceil(SECTOR);
        let (table, grain) = (len(self.header.entries * 4), self.grain_sectors());
        let mut parts = self.parts.iter().copied().peekable();
        let of = |len| move |sector: &u32| (u64::from(*sector), u64::from(*sector) + len);
        let mut tables = self.tables.iter().map(of(table)).peekable();
        let mut grains = self.grains.iter().map(of(grain)).peekable();
        let mut end = 0;
        loop {
            let heads = [parts.peek(), tables.peek(), grains.peek()];
            let Some((at, _)) = heads.into_iter().flatten().min().copied() else { return Ok(()) };
            let next = parts
                .next_if(|part| part.0 == at)
                .or_else(|| tables.next_if(|part| part.0 == at))
                .or_else(|| grains.next_if(|part| part.0 == at));
            if at < end {
                return Err(ContentError::corrupt("two structures overlap in the file"));
            }
            end = next.map_or(end, |part| part.1);
        }
    }

    fn grain_sectors(&self) -> u64 {
        // Compressed grains have any length.
        if self.header.compressed { 1 } else { self.header.grain / SECTOR }
    }

    /// Returns the end of the last part, or of the file.
    fn end(&self) -> u64 {
        let table = self
            .tables
            .last()
            .map_or(0, |table| u64::from(*table) * SECTOR + self.header.entries * 4);
        self.last.max(table).max(self.length)
    }
}

/// The part of a range that lies in one grain.
struct Part {
    at: u64,
    inside: u64,
    len: u64,
}

struct Parts {
    at: u64,
    end: u64,
    grain: u64,
}

impl Parts {
    fn of(at: u64, len: u64, grain: u64) -> Self {
        Self { at, end: at.saturating_add(len), grain }
    }
}

impl Iterator for Parts {
    type Item = Part;

    fn next(&mut self) -> Option<Part> {
        let (at, inside) = (self.at, self.at % self.grain);
        let len = (self.end - at).min(self.grain - inside);
        self.at += len;
        (len > 0).then_some(Part { at, inside, len })
    }
}
