//! Sparse extents: grains where they came to be, found through a directory and its tables, which are
//! both there twice.
//!
//! # What a loss of power leaves
//! New grains and tables are put at the end of the file and nowhere else, so that one which is named
//! before its content is on the medium reads as zeroes: what the disk held there before. Nothing is
//! ordered for that, and a flush is one of the file. What is named may lie behind the end of the file
//! then, which is also how an image looks that was cut short: as long as it is written, the
//! header says that it was not closed.

use super::super::content::{Bytes, Content, ContentError, FileContent};
use super::header::{Header, SECTOR, UNCLEAN};
use crate::engine::FlushState;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock};

/// A grain that was never written.
const UNUSED: u32 = 0;
/// A grain of zeroes, if the header says so.
const ZEROED: u32 = 1;

/// A sparse extent that is open.
pub(super) struct Sparse {
    file: File,
    header: Header,
    write: bool,
    state: RwLock<State>,
    flushes: FlushState,
}

struct State {
    /// In which sector each table is, and its other copy.
    tables: Vec<[u32; 2]>,
    /// In which sector each grain begins.
    grains: Vec<u32>,
    /// Where the file ends, and the next grain will be.
    end: u64,
}

impl Sparse {
    /// One that is locked. If it is to be written it is marked as not closed.
    pub fn open(file: File, header: Header, write: bool) -> Result<Self, ContentError> {
        let state = State::read(&file, &header)?;
        if !write && state.end > file.metadata()?.len() {
            return Err(ContentError::corrupt(
                "it was not closed by who wrote it last; attached to be written it is repaired",
            ));
        }
        let (state, flushes) = (RwLock::new(state), FlushState::default());
        let this = Self { write, state, flushes, header, file };
        if write {
            this.mend()?;
            this.mark(true)?;
        }
        Ok(this)
    }

    /// What there is to say of it.
    pub fn words(&self) -> Vec<String> {
        let mut words = alloc::vec![format!("grains of {} bytes", self.header.grain)];
        words.extend(self.header.compressed.then(|| "compressed".into()));
        words.extend(self.header.unclean.then(|| "not closed".into()));
        words
    }

    /// Makes the copies of the tables equal, and the file as long as what is in it.
    fn mend(&self) -> io::Result<()> {
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
        tracing::warn!("a disk image was not closed by who wrote it last; its tables are in order");
        Ok(())
    }

    fn mark(&self, unclean: bool) -> io::Result<()> {
        self.file.write_all_at(&[unclean.into()], UNCLEAN)?;
        self.flush()
    }

    fn grain(&self, number: u64) -> io::Result<u32> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let found = usize::try_from(number).ok().and_then(|n| state.grains.get(n).copied());
        found.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Where a grain's data is in the file, if it is.
    fn place(&self, number: u64) -> io::Result<Option<u64>> {
        Ok(match self.grain(number)? {
            UNUSED => None,
            ZEROED if self.header.zeroed_grains => None,
            sector => Some(u64::from(sector) * SECTOR),
        })
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

    /// Unpacks a part of a compressed grain: its first sector, how many bytes there are, and these.
    fn inflate(&self, number: u64, place: u64, inside: u64, into: &mut [u8]) -> io::Result<()> {
        let wrong = |what: &str| {
            io::Error::new(io::ErrorKind::InvalidData, format!("grain {number}: {what}"))
        };
        let mut marker = [0; 12];
        self.file.read_exact_at(&mut marker, place)?;
        let (sector, packed) = (Bytes(&marker).u64_le(0), u64::from(Bytes(&marker).u32_le(8)));
        if sector != number * self.header.grain / SECTOR {
            return Err(wrong("another is there"));
        }
        // Packing adds little to what cannot be packed.
        if packed > 2 * self.header.grain + 1024 {
            return Err(wrong("it is longer than it can be"));
        }
        let mut data = alloc::vec![0; packed as usize];
        self.file.read_exact_at(&mut data, place + 12)?;
        let limit = self.header.grain as usize;
        let mut whole = decompress_to_vec_zlib_with_limit(&data, limit)
            .map_err(|_| wrong("it cannot be unpacked"))?;
        // The last is as long as the disk.
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

    /// Writes into a grain that is made for it, unless another made it meanwhile.
    fn write_new(&self, number: u64, inside: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(number).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let found = state.grains.get(index).copied().ok_or(io::ErrorKind::UnexpectedEof)?;
        if found != UNUSED && !(found == ZEROED && self.header.zeroed_grains) {
            return self.file.write_all_at(data, u64::from(found) * SECTOR + inside);
        }
        let tables = self.tables_of(&mut state, number / self.header.entries)?;
        let (place, sector) = self.end(&mut state, self.header.grain)?;
        self.file.write_all_at(data, place + inside)?;
        for table in tables.into_iter().filter(|table| *table != 0) {
            let at = u64::from(table) * SECTOR + number % self.header.entries * 4;
            self.file.write_all_at(&sector.to_le_bytes(), at)?;
        }
        if let Some(grain) = state.grains.get_mut(index) {
            *grain = sector;
        }
        Ok(())
    }

    /// The tables a grain is named by, which are made if need be.
    fn tables_of(&self, state: &mut State, table: u64) -> io::Result<[u32; 2]> {
        let index = usize::try_from(table).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let mut found = state.tables.get(index).copied().ok_or(io::ErrorKind::UnexpectedEof)?;
        let directories = [Some(self.header.directory), self.header.redundant];
        for (found, directory) in found.iter_mut().zip(directories) {
            let Some(directory) = directory.filter(|_| *found == 0) else { continue };
            let bytes = (self.header.entries * 4).next_multiple_of(SECTOR);
            let (_, sector) = self.end(state, bytes)?;
            self.file.write_all_at(&sector.to_le_bytes(), directory + table * 4)?;
            *found = sector;
        }
        if let Some(tables) = state.tables.get_mut(index) {
            *tables = found;
        }
        Ok(found)
    }

    /// Makes the file longer: where what is new begins, and in which sector.
    fn end(&self, state: &mut State, bytes: u64) -> io::Result<(u64, u32)> {
        let place = state.end.next_multiple_of(SECTOR);
        let sector = u32::try_from(place / SECTOR).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let end = place.checked_add(bytes).ok_or(io::ErrorKind::FileTooLarge)?;
        self.file.set_len(end)?;
        state.end = end;
        Ok((place, sector))
    }

    /// To be called by one at a time. After one failed, the extent stays marked as not closed.
    pub fn flush(&self) -> io::Result<()> {
        self.flushes.flush(|| self.file.sync_data())
    }

    /// Gives back the room of what is discarded; the grains stay.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for part in Parts::of(at, len, self.header.grain) {
            if let Some(place) = self.place(part.at / self.header.grain)? {
                fallocate(&self.file, hole, place + part.inside, part.len)?;
            }
        }
        Ok(())
    }
}

impl Drop for Sparse {
    fn drop(&mut self) {
        if self.write
            && let Err(error) = self.flush().and_then(|()| self.mark(false))
        {
            tracing::error!(%error, "a disk image stays marked as not closed");
        }
    }
}

impl State {
    /// Reads all tables, and checks that nothing is where something else is.
    fn read(file: &File, header: &Header) -> Result<Self, ContentError> {
        let content = FileContent::new(file)?;
        let directory = read_u32s(&content, header.directory, header.tables)?;
        let redundant = match header.redundant {
            Some(at) => read_u32s(&content, at, header.tables)?,
            None => alloc::vec![0; directory.len()],
        };
        let tables: Vec<[u32; 2]> =
            directory.into_iter().zip(redundant).map(<[u32; 2]>::from).collect();
        let mut places = Places::new(content.length(), header);
        let bytes = header.entries * 4;
        // First that each is there once: their number bounds what is read then.
        for table in tables.iter().flatten().filter(|table| **table != 0) {
            places.add(*table, bytes, "a grain table")?;
        }
        places.check()?;
        let whole = header.sectors.div_ceil(header.grain / SECTOR);
        let mut grains = Vec::new();
        let room = grains.try_reserve_exact(whole as usize);
        room.map_err(|_| ContentError::Io(io::ErrorKind::OutOfMemory.into()))?;
        for [table, _] in &tables {
            let count = header.entries.min(whole - grains.len() as u64);
            match table {
                // It may lie behind the end of a file that was not closed.
                0 => grains.resize(grains.len() + count as usize, UNUSED),
                table if u64::from(*table) * SECTOR + bytes > content.length() => {
                    grains.resize(grains.len() + count as usize, UNUSED);
                }
                table => grains.extend(read_u32s(&content, u64::from(*table) * SECTOR, count)?),
            }
        }
        let len = if header.compressed { 12 } else { header.grain };
        let named =
            |grain: &&u32| **grain != UNUSED && !(**grain == ZEROED && header.zeroed_grains);
        for grain in grains.iter().filter(named) {
            places.add(*grain, len, "a grain")?;
        }
        if let Some(last) = grains.iter().filter(named).max().filter(|_| header.compressed) {
            let mut marker = [0; 12];
            content.read(u64::from(*last) * SECTOR, &mut marker)?;
            places.add(*last, 12 + u64::from(Bytes(&marker).u32_le(8)), "a grain")?;
            places.taken.pop();
        }
        places.check()?;
        Ok(Self { tables, grains, end: places.end() })
    }
}

/// What is where in the file.
struct Places {
    taken: Vec<(u64, u64)>,
    length: u64,
    unclean: bool,
}

impl Places {
    fn new(length: u64, header: &Header) -> Self {
        let mut taken = alloc::vec![(0, SECTOR), (header.directory, header.tables * 4)];
        taken.extend(header.redundant.map(|at| (at, header.tables * 4)));
        taken.extend(header.descriptor);
        Self { taken, length, unclean: header.unclean }
    }

    fn add(&mut self, sector: u32, bytes: u64, what: &str) -> Result<(), ContentError> {
        let at = u64::from(sector) * SECTOR;
        if at + bytes > self.length && !self.unclean {
            return Err(ContentError::truncated(format!("{what} is in sector {sector}")));
        }
        self.taken.push((at, bytes));
        Ok(())
    }

    fn check(&mut self) -> Result<(), ContentError> {
        self.taken.sort_unstable();
        if self.taken.windows(2).any(|two| two[0].0 + two[0].1 > two[1].0) {
            return Err(ContentError::corrupt("two things are in one place of the file"));
        }
        Ok(())
    }

    /// Where the last of it ends, or the file.
    fn end(&self) -> u64 {
        self.taken.last().map_or(0, |(at, bytes)| at + bytes).max(self.length)
    }
}

fn read_u32s(content: &dyn Content, at: u64, count: u64) -> Result<Vec<u32>, ContentError> {
    let mut bytes = alloc::vec![0; count as usize * 4];
    content.read(at, &mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|b| Bytes(b).u32_le(0)).collect())
}

/// A part of a range that lies in one grain.
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
