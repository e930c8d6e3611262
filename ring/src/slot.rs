use crate::shm::{Region, SharedMemory};

/// More was asked of a slot than it holds: a bug of ours, not the peer's doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the slot has no more bytes")]
pub struct ShortSlot;

/// One slot the peer has published, read front to back. A cursor, so that **no byte can be read
/// twice**: what was checked is what is used (XSA-155), by construction.
#[derive(Debug)]
pub struct Slot<'a, M> {
    mem: &'a M,
    at: usize,
    end: usize,
}

impl<'a, M: SharedMemory> Slot<'a, M> {
    #[inline]
    pub(crate) fn new(mem: &'a M, at: usize, size: usize) -> Self {
        Self { mem, at, end: at.saturating_add(size) }
    }

    /// Copies the next `out.len()` bytes out.
    ///
    /// # Errors
    /// [`ShortSlot`] when fewer are left; nothing is read then.
    #[inline]
    pub fn read(&mut self, out: &mut [u8]) -> Result<(), ShortSlot> {
        let next = self.at.checked_add(out.len()).filter(|&n| n <= self.end).ok_or(ShortSlot)?;
        self.mem.read_words(self.at, out).ok_or(ShortSlot)?;
        self.at = next;
        Ok(())
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.end.saturating_sub(self.at)
    }
}
