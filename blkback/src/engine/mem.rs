//! A disk in private memory that completes operations synchronously, for tests, benchmarks and the
//! simulator.

use super::{BlockEngine, Discard, Done, EngineError, Full, Geometry, Io, Segments};
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use pvio_ring::shm::{Region, SharedMemory};

/// Bytes per sector of the protocol.
const SECTOR: usize = 512;

/// A disk in private memory.
#[derive(Debug)]
pub struct MemEngine<B> {
    data: Vec<u8>,
    done: VecDeque<(u32, Result<(), EngineError>, Segments<B>)>,
    /// Segment lists of completed operations, for reuse.
    spare: Vec<Segments<B>>,
    read_only: bool,
}

impl<B> MemEngine<B> {
    /// Creates a disk of zeroes.
    #[must_use]
    pub fn zeroed(sectors: usize) -> Self {
        Self {
            data: vec![0; sectors.saturating_mul(SECTOR)],
            done: VecDeque::with_capacity(64),
            spare: Vec::new(),
            read_only: false,
        }
    }

    /// Makes the disk reject writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Returns the disk's contents.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    fn transfer(
        &mut self,
        sector: u64,
        segments: &Segments<B>,
        write: bool,
    ) -> Result<(), EngineError>
    where
        B: SharedMemory,
    {
        let mut at = usize::try_from(sector).ok().and_then(|s| s.checked_mul(SECTOR));
        for seg in segments {
            let from = at.ok_or(EngineError::Short)?;
            let end = from.checked_add(seg.len).ok_or(EngineError::Short)?;
            let bytes = self.data.get_mut(from..end).ok_or(EngineError::Short)?;
            let moved = if write {
                seg.buf.read_bytes(seg.offset, bytes)
            } else {
                seg.buf.write_bytes(seg.offset, bytes)
            };
            moved.ok_or(EngineError::Os(EFAULT))?;
            at = Some(end);
        }
        Ok(())
    }
}

const EFAULT: i32 = 14;

impl<B: SharedMemory> BlockEngine<B> for MemEngine<B> {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: (self.data.len() / SECTOR) as u64,
            sector_size: 512,
            physical_sector_size: 512,
            copied: false,
            read_only: self.read_only,
            discard: Some(Discard { granularity: 512, alignment: 0, secure: false }),
        }
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let result = match io {
            Io::Read { sector } => self.transfer(sector, segments, false),
            Io::Write { sector } => self.transfer(sector, segments, true),
            Io::Flush => Ok(()),
            Io::Discard { sector, sectors, .. } | Io::WriteZeroes { sector, sectors } => {
                let range = || {
                    let from = usize::try_from(sector).ok()?.checked_mul(SECTOR)?;
                    let len = usize::try_from(sectors).ok()?.checked_mul(SECTOR)?;
                    Some(from..from.checked_add(len)?)
                };
                match range().and_then(|r| self.data.get_mut(r)) {
                    Some(gone) => {
                        gone.fill(0);
                        Ok(())
                    }
                    None => Err(EngineError::Short),
                }
            }
        };
        let mut moved = self.spare.pop().unwrap_or_default();
        moved.append(segments);
        self.done.push_back((tag, result, moved));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, B>) {
        for (tag, result, mut segments) in self.done.drain(..) {
            done(tag, result, &mut segments);
            segments.clear();
            self.spare.push(segments);
        }
    }
}
