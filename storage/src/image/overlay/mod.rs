//! A writable layer over a disk that is only read. Writes go to an unnamed temporary file, which is
//! deleted when the disk is closed.

use crate::engine::store::Store;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Sectors for each bitmap.
const GROUP: u64 = 1 << 15;
const SECTOR: u64 = 512;

/// The set of sectors that were written.
#[derive(Default)]
struct Written(BTreeMap<u64, Box<[u64]>>);

impl Written {
    fn has(&self, sector: u64) -> bool {
        let group = self.0.get(&(sector / GROUP));
        let word = group.and_then(|group| group.get((sector % GROUP / 64) as usize));
        word.is_some_and(|word| word >> (sector % 64) & 1 == 1)
    }

    fn add(&mut self, sectors: core::ops::Range<u64>) {
        for sector in sectors {
            let new = || alloc::vec![0; (GROUP / 64) as usize].into_boxed_slice();
            let group = self.0.entry(sector / GROUP).or_insert_with(new);
            if let Some(word) = group.get_mut((sector % GROUP / 64) as usize) {
                *word |= 1 << (sector % 64);
            }
        }
    }

    /// Returns the number of sectors from `sector` on that have the same state, and whether they
    /// were written.
    fn run(&self, sector: u64, most: u64) -> (u64, bool) {
        let first = self.has(sector);
        let like = (1..most).take_while(|n| self.has(sector + n) == first).count() as u64;
        (1 + like, first)
    }
}

/// The overlay: the disk below and the writable layer.
pub(super) struct Overlay {
    below: Arc<dyn Store>,
    scratch: File,
    written: Mutex<Written>,
}

impl Overlay {
    /// Creates an overlay whose writes go to `scratch`. Data of an earlier overlay in that file is
    /// released.
    pub fn new(below: Arc<dyn Store>, bytes: u64, scratch: File) -> io::Result<Self> {
        scratch.set_len(0)?;
        scratch.set_len(bytes)?;
        Ok(Self { below, scratch, written: Mutex::default() })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Overlay {
    fn read(&self, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let (sectors, above) = self.written().run(at / SECTOR, into.len() as u64 / SECTOR);
            let (part, rest) = into.split_at_mut(into.len().min((sectors * SECTOR) as usize));
            if above {
                self.scratch.read_exact_at(part, at)?;
            } else {
                self.below.read(at, part)?;
            }
            at += part.len() as u64;
            into = rest;
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.scratch.write_all_at(from, at)?;
        // Marked only after the write: until then reads must return the old data.
        self.written().add(at / SECTOR..(at + from.len() as u64) / SECTOR);
        Ok(())
    }

    /// Does nothing, because the writes do not outlive the process.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.scratch, hole, at, len)?;
        self.written().add(at / SECTOR..(at + len) / SECTOR);
        Ok(())
    }
}
