//! A disk in memory, shared by its queues; synchronous. Regions that were never written use no
//! memory.

use super::lists::SpareLists;
use super::store::Store;
use super::{BlockEngine, Discard, Done, EngineError, Full, Geometry, Io, Segments};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use pvio_ring::shm::{Region, SharedMemory};
use std::io;
use std::sync::{Mutex, PoisonError};
use zeroize::Zeroize;

/// Memory is allocated and released in pieces of this size.
const PIECE: u64 = 64 << 10;
const EFAULT: i32 = 14;

type Piece = Mutex<Option<Box<[u8]>>>;

/// A disk in memory.
pub struct RamDisk {
    pieces: Vec<Piece>,
    bytes: u64,
}

impl RamDisk {
    /// Creates a disk of zeroes. `None` if there is no memory for its index.
    #[must_use]
    pub fn new(bytes: u64) -> Option<Self> {
        let count = usize::try_from(bytes.div_ceil(PIECE)).ok()?;
        let mut pieces = Vec::new();
        pieces.try_reserve_exact(count).ok()?;
        pieces.resize_with(count, Piece::default);
        Some(Self { pieces, bytes })
    }

    /// Returns the disk's geometry.
    #[must_use]
    pub fn geometry(&self, read_only: bool) -> Geometry {
        Self::geometry_of(self.bytes, read_only)
    }

    /// Returns the geometry of a disk of this size.
    #[must_use]
    pub const fn geometry_of(bytes: u64, read_only: bool) -> Geometry {
        let discard = Discard { granularity: PIECE as u32, alignment: 0, secure: true };
        Geometry {
            sectors: bytes / 512,
            sector_size: 512,
            physical_sector_size: 4096,
            copied: false,
            read_only,
            discard: if read_only { None } else { Some(discard) },
        }
    }

    /// Returns the bytes of allocated memory.
    #[must_use]
    pub fn resident(&self) -> u64 {
        let in_use =
            |piece: &&Piece| piece.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        self.pieces.iter().filter(in_use).count() as u64 * PIECE
    }

    /// Calls `each` for every piece of a range, with the offset and length within the piece.
    fn each(
        &self,
        mut at: u64,
        mut len: u64,
        mut each: impl FnMut(&mut Option<Box<[u8]>>, usize, usize) -> Option<()>,
    ) -> Result<(), EngineError> {
        if at.checked_add(len).is_none_or(|end| end > self.bytes) {
            return Err(EngineError::Short);
        }
        while len > 0 {
            let index = usize::try_from(at / PIECE).map_err(|_| EngineError::Short)?;
            let piece = self.pieces.get(index).ok_or(EngineError::Short)?;
            let from = at % PIECE;
            let n = len.min(PIECE - from);
            let mut piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
            each(&mut piece, from as usize, n as usize).ok_or(EngineError::Os(EFAULT))?;
            (at, len) = (at + n, len - n);
        }
        Ok(())
    }

    fn read_into<B: SharedMemory>(
        &self,
        at: u64,
        segments: &Segments<B>,
    ) -> Result<(), EngineError> {
        let mut at = at;
        for seg in segments {
            let mut to = seg.offset;
            self.each(at, seg.len as u64, |piece, from, n| {
                match piece {
                    Some(piece) => seg.buf.write_bytes(to, piece.get(from..from + n)?)?,
                    None => seg.buf.fill(to, n, 0)?,
                }
                to += n;
                Some(())
            })?;
            at += seg.len as u64;
        }
        Ok(())
    }

    fn write_from<B: SharedMemory>(
        &self,
        at: u64,
        segments: &Segments<B>,
    ) -> Result<(), EngineError> {
        let mut at = at;
        for seg in segments {
            let mut from = seg.offset;
            self.each(at, seg.len as u64, |piece, to, n| {
                let piece = piece.get_or_insert_with(new_piece);
                seg.buf.read_bytes(from, piece.get_mut(to..to + n)?)?;
                from += n;
                Some(())
            })?;
            at += seg.len as u64;
        }
        Ok(())
    }

    /// Releases memory. With `wipe` its data is overwritten first, because released memory may be
    /// reused by others.
    fn forget(&self, at: u64, len: u64, wipe: bool) -> Result<(), EngineError> {
        self.each(at, len, |piece, from, n| {
            if n as u64 == PIECE {
                if let Some(piece) = piece.take().as_mut().filter(|_| wipe) {
                    piece.zeroize();
                }
            } else if let Some(piece) = piece {
                piece.get_mut(from..from + n)?.fill(0);
            }
            Some(())
        })
    }
}

impl Store for RamDisk {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let mut to = 0;
        self.each(at, into.len() as u64, |piece, from, n| {
            let into = into.get_mut(to..to + n)?;
            match piece {
                Some(piece) => into.copy_from_slice(piece.get(from..from + n)?),
                None => into.fill(0),
            }
            to += n;
            Some(())
        })
        .map_err(io::Error::other)
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let mut done = 0;
        self.each(at, from.len() as u64, |piece, to, n| {
            let piece = piece.get_or_insert_with(new_piece);
            piece.get_mut(to..to + n)?.copy_from_slice(from.get(done..done + n)?);
            done += n;
            Some(())
        })
        .map_err(io::Error::other)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.forget(at, len, false).map_err(io::Error::other)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.discard(at, len)
    }
}

fn new_piece() -> Box<[u8]> {
    alloc::vec![0; PIECE as usize].into_boxed_slice()
}

impl fmt::Debug for RamDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamDisk").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// The engine of one queue over a [`RamDisk`].
pub struct RamEngine<B> {
    disk: Arc<RamDisk>,
    geometry: Geometry,
    done: VecDeque<(u32, Result<(), EngineError>, Segments<B>)>,
    lists: SpareLists<B>,
}

impl<B> RamEngine<B> {
    /// Creates an engine for any number of operations at a time.
    #[must_use]
    pub fn new(disk: Arc<RamDisk>, geometry: Geometry) -> Self {
        Self { disk, geometry, done: VecDeque::new(), lists: SpareLists::default() }
    }
}

impl<B: SharedMemory> BlockEngine<B> for RamEngine<B> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let bytes = |sectors: u64| sectors.saturating_mul(512);
        let result = match io {
            Io::Read { sector } => self.disk.read_into(bytes(sector), segments),
            Io::Write { sector } => self.disk.write_from(bytes(sector), segments),
            Io::Flush => Ok(()),
            Io::Discard { sector, sectors, secure } => {
                self.disk.forget(bytes(sector), bytes(sectors), secure)
            }
            Io::WriteZeroes { sector, sectors } => {
                self.disk.forget(bytes(sector), bytes(sectors), false)
            }
        };
        let list = self.lists.list(segments);
        self.done.push_back((tag, result, list));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, B>) {
        for (tag, result, mut list) in self.done.drain(..) {
            done(tag, result, &mut list);
            self.lists.keep(list);
        }
    }
}
