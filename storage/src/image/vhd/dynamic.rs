//! Dynamic images: blocks in the order of their allocation, located through a table.
//!
//! A block begins with a bitmap of the sectors that hold data; others read as zeroes. A new block
//! is placed where the footer was, followed by a new footer, which is made durable before the old
//! one is overwritten. Nothing else needs an order: a referenced block whose data was lost reads as
//! zeroes, like before the write.
//!
//! A block device does not grow: its footer is at its end, and new blocks are placed after the last
//! one. The old contents there are not zeroes, so zeroes are written and made durable before the
//! table refers to the block.

use super::super::file::punch;
use super::super::metadata::{Content, ContentError, FileContent, Meter, each_entry, try_vec};
use super::footer::{FOOTER, Footer, Kind};
use super::layout::{RawFooter, TableEntry, UNUSED};
use crate::engine::FlushState;
use crate::engine::store::{FileStore, Store};
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::{PoisonError, RwLock};
use zerocopy::IntoBytes;

const SECTOR: u64 = 512;

/// An open dynamic image.
pub(super) struct Dynamic {
    file: File,
    footer: RawFooter,
    table: u64,
    block: u64,
    /// Bytes of a block's bitmap, in whole sectors.
    bitmap: u64,
    /// Flushes of the footer, in addition to the guest's flushes.
    flushes: Arc<FlushState>,
    /// Offset of the footer on a block device.
    device_end: Option<u64>,
    state: RwLock<State>,
}

struct State {
    /// First sector of each block.
    blocks: Vec<u32>,
    /// Offset of the next block; in a file, also of the footer.
    end: u64,
}

impl Dynamic {
    /// Opens a locked image. With `write`, a missing footer is restored.
    pub fn open(
        file: File,
        footer: &Footer,
        write: bool,
        meter: &Meter,
    ) -> Result<Self, ContentError> {
        let Kind::Dynamic { table, blocks: count, block } = footer.kind else {
            return Err(ContentError::corrupt("it is not a dynamic image"));
        };
        let content = FileContent::new(&file, meter)?;
        let mut blocks = try_vec(count.into())?;
        let mut places = Vec::new();
        each_entry(&content, table, count.into(), |_, entry: TableEntry| {
            let place = entry.get();
            if place != UNUSED {
                places.try_reserve(1).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
                places.push(place);
            }
            blocks.push(place);
            Ok(())
        })?;
        let bitmap = (u64::from(block) / SECTOR / 8).next_multiple_of(SECTOR);
        let whole = bitmap + u64::from(block);
        let first = (table + u64::from(count) * 4).div_ceil(SECTOR);
        places.sort_unstable();
        let place = |place: u32| u64::from(place);
        let apart = places.windows(2).all(|two| place(two[0]) + whole / SECTOR <= place(two[1]));
        if !apart || places.first().is_some_and(|one| place(*one) < first) {
            return Err(ContentError::corrupt("two structures overlap in the file"));
        }
        let used = places.last().map_or(first * SECTOR, |last| place(*last) * SECTOR + whole);
        let device = file.metadata()?.file_type().is_block_device();
        let length = content.length();
        let last = length.saturating_sub(FOOTER).next_multiple_of(SECTOR);
        // A missing footer uses no space.
        if used > if footer.is_copy && !device { length } else { last } {
            let what = format!("data ends at byte {used}, and the file has {length}");
            return Err(ContentError::truncated(what));
        }
        let end = if device { used } else { last.max(used) };
        if write && footer.is_copy {
            file.write_all_at(footer.raw.as_bytes(), if device { last } else { end })?;
            file.sync_data()?;
            tracing::warn!("a disk image had no footer at its end: the copy was written there");
        }
        let device_end = device.then_some(last);
        let state = RwLock::new(State { blocks, end });
        let (block, flushes) = (block.into(), Arc::default());
        Ok(Self { file, footer: footer.raw, table, block, bitmap, flushes, device_end, state })
    }

    /// Returns the offset of a block in the file, if it is allocated.
    fn place(&self, block: u64) -> Option<u64> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let place = usize::try_from(block).ok().and_then(|b| state.blocks.get(b).copied());
        place.filter(|place| *place != UNUSED).map(|place| u64::from(place) * SECTOR)
    }

    /// Calls `each` for every part of a range that lies in one block: offset in the range, block,
    /// offset in the block, length.
    fn parts(
        &self,
        at: u64,
        len: u64,
        mut each: impl FnMut(usize, u64, u64, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let (block, inside) = ((at + done) / self.block, (at + done) % self.block);
            let n = (len - done).min(self.block - inside);
            each(done as usize, block, inside, n as usize)?;
            done += n;
        }
        Ok(())
    }

    /// Reads a block's bitmap.
    fn bits(&self, place: u64) -> io::Result<Vec<u8>> {
        let mut bits = alloc::vec![0; self.bitmap as usize];
        self.file.read_exact_at(&mut bits, place)?;
        Ok(bits)
    }

    /// Writes into a block, which is allocated if necessary.
    fn write_part(&self, block: u64, inside: u64, from: &[u8]) -> io::Result<()> {
        // The lock serializes changes of bitmaps and the table.
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(block).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let found = state.blocks.get(index).copied().ok_or(io::ErrorKind::UnexpectedEof)?;
        if found != UNUSED {
            let place = u64::from(found) * SECTOR;
            let mut bits = self.bits(place)?;
            self.file.write_all_at(from, place + self.bitmap + inside)?;
            let before = bits.clone();
            for sector in inside / SECTOR..(inside + from.len() as u64) / SECTOR {
                if let Some(byte) = bits.get_mut((sector / 8) as usize) {
                    *byte |= 0x80 >> (sector % 8);
                }
            }
            if bits != before {
                self.file.write_all_at(&bits, place)?;
            }
            return Ok(());
        }
        let place = state.end.next_multiple_of(SECTOR);
        let number = u32::try_from(place / SECTOR).ok().filter(|n| *n != UNUSED);
        let number = number.ok_or(io::ErrorKind::FileTooLarge)?;
        let end = place + self.bitmap + self.block;
        match self.device_end {
            Some(device_end) if end > device_end => return Err(io::ErrorKind::StorageFull.into()),
            Some(_) => {
                FileStore::new(self.file.try_clone()?)?.write_zeroes(place, end - place)?;
            }
            // The rest of the block is a hole in the file, after the old footer.
            None => self.file.write_all_at(self.footer.as_bytes(), end)?,
        }
        self.flush()?;
        self.file.write_all_at(&alloc::vec![0xff; self.bitmap as usize], place)?;
        self.file.write_all_at(from, place + self.bitmap + inside)?;
        self.file.write_all_at(TableEntry::new(number).as_bytes(), self.table + block * 4)?;
        state.end = end;
        if let Some(entry) = state.blocks.get_mut(index) {
            *entry = number;
        }
        Ok(())
    }
}

impl Store for Dynamic {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.parts(at, into.len() as u64, |from, block, inside, n| {
            let into = into.get_mut(from..from + n).ok_or(io::ErrorKind::UnexpectedEof)?;
            let Some(place) = self.place(block) else {
                into.fill(0);
                return Ok(());
            };
            self.file.read_exact_at(into, place + self.bitmap + inside)?;
            let bits = self.bits(place)?;
            for (sector, data) in (inside / SECTOR..).zip(into.chunks_mut(SECTOR as usize)) {
                let byte = bits.get((sector / 8) as usize).copied().unwrap_or_default();
                if byte & (0x80 >> (sector % 8)) == 0 {
                    data.fill(0);
                }
            }
            Ok(())
        })
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.parts(at, from.len() as u64, |begin, block, inside, n| {
            let part = from.get(begin..begin + n).ok_or(io::ErrorKind::UnexpectedEof)?;
            self.write_part(block, inside, part)
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.flush_alone(|| self.file.sync_data())
    }

    fn flush_state(&self) -> Option<Arc<FlushState>> {
        Some(Arc::clone(&self.flushes))
    }

    /// Releases the space of a discarded range; its blocks stay allocated.
    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.parts(at, len, |_, block, inside, n| match self.place(block) {
            Some(place) => punch(&self.file, place + self.bitmap + inside, n as u64),
            None => Ok(()),
        })
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.discard(at, len)
    }
}
