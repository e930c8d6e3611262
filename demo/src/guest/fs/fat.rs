//! FAT12, FAT16 and FAT32, read with the library `fatfs`.
//!
//! The library is stricter about the first sectors than Linux and mtools, which read volumes with
//! both sector counts set, with an FSInfo sector of zeros, and FAT32 with few clusters. The library
//! therefore reads corrected versions of these sectors (`Overlay`) and everything else from the
//! disk.

use super::cache::{Cache, DiskFailed};
use super::{
    Entry, FsError, FsInfo, Handle, Kind, MAX_ENTRIES, MAX_OPEN, Meta, Mounted, Target, components,
    sort_entries,
};
use fatfs::{DateTime, Dir, DirEntry, FatType, File, FileSystem, FsOptions};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::rc::Rc;

/// The library's view of the disk; writes are rejected.
pub(super) struct Reader {
    cache: Rc<RefCell<Cache>>,
    overlay: Overlay,
    at: u64,
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.cache.borrow_mut().read(self.at, buf)?;
        self.overlay.apply(self.at, buf.get_mut(..got).unwrap_or_default());
        self.at += got as u64;
        Ok(got)
    }
}

/// Sectors that replace those on the disk: offset in bytes, and contents.
struct Overlay(Vec<(u64, Vec<u8>)>);

/// Minimum number of clusters that the library accepts for FAT32.
const FAT32_CLUSTERS: u64 = 65_525;

impl Overlay {
    /// Returns the corrected sectors for a volume with this first sector.
    fn new(boot: &[u8; 512]) -> Self {
        let mut sector = boot.to_vec();
        let u16_at = |at: usize| u16::from_le_bytes([boot[at], boot[at + 1]]);
        let (small, large) =
            (u16_at(19), u32::from_le_bytes([boot[32], boot[33], boot[34], boot[35]]));
        // Linux uses the 16-bit count if it is not zero.
        let sectors = if small == 0 { large } else { small.into() };
        let is_fat32 = u16_at(22) == 0;
        if !is_fat32 {
            if small != 0 {
                sector[32..36].fill(0);
            }
            return Self(vec![(0, sector)]);
        }
        let sectors_per_fat = u32::from_le_bytes([boot[36], boot[37], boot[38], boot[39]]);
        let before = u64::from(u16_at(14)) + u64::from(boot[16]) * u64::from(sectors_per_fat);
        // Linux recognises FAT32 by its zero 16-bit FAT size, whatever the number of clusters.
        // Clusters beyond the end of the disk cannot be read in any case.
        let least = before.saturating_add(FAT32_CLUSTERS * u64::from(boot[13]));
        let sectors = sectors.max(u32::try_from(least).unwrap_or(sectors));
        sector[19..21].fill(0);
        sector[32..36].copy_from_slice(&sectors.to_le_bytes());
        // Version 0, FSInfo in sector 1, and no backup boot sector, which could be out of range.
        sector[42..44].fill(0);
        sector[48..50].copy_from_slice(&1_u16.to_le_bytes());
        sector[50..52].fill(0);
        let mut info = vec![0; 512];
        info[..4].copy_from_slice(b"RRaA");
        info[484..488].copy_from_slice(b"rrAa");
        // The number of free clusters and the next free one are unknown.
        info[488..496].fill(0xff);
        info[510..].copy_from_slice(&[0x55, 0xaa]);
        Self(vec![(0, sector), (u16_at(11).into(), info)])
    }

    /// Replaces the overlapping part of data that was read from offset `at`.
    fn apply(&self, at: u64, read: &mut [u8]) {
        let end = at.saturating_add(read.len() as u64);
        for (start, bytes) in &self.0 {
            let (from, to) = (at.max(*start), end.min(start.saturating_add(bytes.len() as u64)));
            if from < to {
                // The overlap is within both.
                let len = (to - from) as usize;
                let (into, of) = ((from - at) as usize, (from - start) as usize);
                read[into..into + len].copy_from_slice(&bytes[of..of + len]);
            }
        }
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let base = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.cache.borrow().size().checked_add_signed(by),
        };
        self.at = base.ok_or(io::ErrorKind::InvalidData)?;
        Ok(self.at)
    }
}

impl Write for Reader {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn open(cache: &Rc<RefCell<Cache>>) -> Result<FileSystem<Reader>, FsError> {
    let mut boot = [0; 512];
    cache.borrow_mut().read_exact(0, &mut boot)?;
    let reader = Reader { cache: Rc::clone(cache), overlay: Overlay::new(&boot), at: 0 };
    FileSystem::new(reader, FsOptions::new()).map_err(error)
}

/// The mounted volume. Open files borrow from the file system, so the latter is owned elsewhere.
pub(super) struct FatFs<'fs> {
    fs: &'fs FileSystem<Reader>,
    files: HashMap<Handle, Open<'fs>>,
    size: u64,
}

struct Open<'fs> {
    file: File<'fs, Reader>,
    at: u64,
    len: u64,
}

impl<'fs> FatFs<'fs> {
    pub(super) fn new(fs: &'fs FileSystem<Reader>, size: u64) -> Self {
        Self { fs, files: HashMap::new(), size }
    }

    fn open(&mut self, entry: &DirEntry<'fs, Reader>, handle: Handle) -> Result<Target, FsError> {
        if self.files.len() >= MAX_OPEN {
            return Err(FsError::TooManyOpen);
        }
        self.files.insert(handle, Open { file: entry.to_file(), at: 0, len: entry.len() });
        Ok(Target::File { handle, meta: stat(entry), is_index: false })
    }
}

impl Mounted for FatFs<'_> {
    fn info(&self) -> FsInfo {
        let kind = match self.fs.fat_type() {
            FatType::Fat12 => "FAT12",
            FatType::Fat16 => "FAT16",
            FatType::Fat32 => "FAT32",
        };
        let label = self.fs.volume_label().trim().to_owned();
        FsInfo { kind, label, size: self.size, id: format!("{:08x}", self.fs.volume_id()) }
    }

    fn visit(&mut self, path: &[u8], index: bool, handle: Handle) -> Result<Target, FsError> {
        let mut dir = self.fs.root_dir();
        let mut names = components(path).into_iter().peekable();
        while let Some(name) = names.next() {
            let entry = find(&dir, name)?.ok_or(FsError::NotFound)?;
            if entry.is_dir() {
                dir = entry.to_dir();
            } else if names.peek().is_none() {
                return self.open(&entry, handle);
            } else {
                return Err(FsError::NotFound);
            }
        }
        if index
            && let Ok(Some(entry)) = find(&dir, b"index.html")
            && !entry.is_dir()
            && let Ok(Target::File { meta, .. }) = self.open(&entry, handle)
        {
            return Ok(Target::File { handle, meta, is_index: true });
        }
        list(&dir)
    }

    fn read(&mut self, handle: Handle, offset: u64, buf: &mut [u8]) -> Result<usize, FsError> {
        let open = self.files.get_mut(&handle).ok_or(FsError::Stale)?;
        let left = usize::try_from(open.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        if len == 0 {
            return Ok(0);
        }
        if open.at != offset {
            open.at = open.file.seek(SeekFrom::Start(offset)).map_err(error)?;
        }
        if open.at != offset {
            return Err(FsError::Corrupt("a file's clusters end before the file".into()));
        }
        let mut done = 0;
        while done < len {
            match open.file.read(&mut buf[done..len]).map_err(error)? {
                0 => return Err(FsError::Corrupt("a file's clusters end before the file".into())),
                n => done += n,
            }
            open.at = offset + done as u64;
        }
        Ok(done)
    }

    fn close(&mut self, handle: Handle) {
        self.files.remove(&handle);
    }
}

fn find<'fs>(
    dir: &Dir<'fs, Reader>,
    name: &[u8],
) -> Result<Option<DirEntry<'fs, Reader>>, FsError> {
    // Names are UTF-8 here; other names do not exist.
    let Ok(name) = std::str::from_utf8(name) else { return Ok(None) };
    let folded = name.to_uppercase();
    for entry in dir.iter() {
        let entry = entry.map_err(error)?;
        if entry.file_name().to_uppercase() == folded
            || entry.short_file_name().to_uppercase() == folded
        {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

fn list(dir: &Dir<'_, Reader>) -> Result<Target, FsError> {
    let mut entries = Vec::new();
    let mut left_out = 0;
    for entry in dir.iter() {
        let entry = entry.map_err(error)?;
        let name = entry.file_name();
        if name == "." || name == ".." {
            continue;
        }
        if entries.len() == MAX_ENTRIES {
            left_out += 1;
            continue;
        }
        let kind = if entry.is_dir() { Kind::Dir } else { Kind::File };
        entries.push(Entry { name: name.into_bytes(), kind, meta: stat(&entry) });
    }
    sort_entries(&mut entries);
    Ok(Target::Dir { entries, left_out })
}

fn stat(entry: &DirEntry<'_, Reader>) -> Meta {
    Meta { len: entry.len(), modified: seconds(entry.modified()) }
}

/// Converts FAT's date and time to seconds since 1970; `None` if the date does not exist.
fn seconds(at: DateTime) -> Option<i64> {
    let (date, time) = (at.date, at.time);
    if !(1..=12).contains(&date.month) || !(1..=31).contains(&date.day) || time.hour > 23 {
        return None;
    }
    // Days of the proleptic Gregorian calendar, with years that begin in March.
    let (month, year) = (i64::from(date.month), i64::from(date.year));
    let (month, year) = if month > 2 { (month - 3, year) } else { (month + 9, year - 1) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5;
    let days = days + i64::from(date.day) - 1 - 719_468;
    let clock = i64::from(time.hour) * 3600 + i64::from(time.min) * 60 + i64::from(time.sec);
    Some(days * 86_400 + clock)
}

fn error(e: io::Error) -> FsError {
    // The library reports its own errors with kind `Other`, which the disk never uses.
    let own =
        e.kind() == io::ErrorKind::Other && !e.get_ref().is_some_and(|e| e.is::<DiskFailed>());
    if own { FsError::Corrupt(e.to_string()) } else { e.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fatfs::{Date, Time};

    #[test]
    fn fat_timestamps_convert_to_unix_time() {
        let at = |year, month, day| {
            let time = Time { hour: 1, min: 2, sec: 3, millis: 0 };
            seconds(DateTime { date: Date { year, month, day }, time })
        };
        // Expected values from `date -u -d … +%s`.
        assert_eq!(at(1980, 1, 1), Some(315_536_523));
        assert_eq!(at(2024, 2, 29), Some(1_709_168_523));
        assert_eq!(at(2107, 12, 31), Some(4_354_736_523));
        assert_eq!(at(2000, 0, 1), None);
        assert_eq!(at(2000, 13, 1), None);
        assert_eq!(at(2000, 1, 0), None);
    }
}
