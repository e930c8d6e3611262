use super::slots::{SlotBytes, SlotRoom};
use core::marker::PhantomData;

/// More was asked of a slot than it holds: a bug of ours, not the peer's doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the slot has no more bytes")]
pub struct ShortSlot;

/// One slot the peer has published, read front to back. A cursor, so that **no byte can be read
/// twice**: what was checked is what is used (XSA-155), by construction.
#[derive(Debug)]
pub struct Slot<'a, M> {
    bytes: SlotBytes<'a>,
    memory: PhantomData<&'a M>,
}

impl<'a, M> Slot<'a, M> {
    #[inline(always)]
    pub(crate) fn new(bytes: SlotBytes<'a>) -> Self {
        Self { bytes, memory: PhantomData }
    }

    pub(crate) fn bytes(&mut self) -> &mut SlotBytes<'a> {
        &mut self.bytes
    }

    /// Copies the next `out.len()` bytes out.
    ///
    /// # Errors
    /// [`ShortSlot`] when fewer are left; nothing is read then.
    #[inline]
    pub fn read(&mut self, out: &mut [u8]) -> Result<(), ShortSlot> {
        self.bytes.fill(out).ok_or(ShortSlot)
    }

    /// Takes the next `N` bytes.
    ///
    /// # Errors
    /// [`ShortSlot`] when fewer are left; nothing is read then.
    #[inline(always)]
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ShortSlot> {
        self.bytes.take().ok_or(ShortSlot)
    }

    /// Takes the next `N` little-endian words of 64 bits.
    ///
    /// # Errors
    /// [`ShortSlot`] when there are fewer left; nothing is read then.
    #[inline(always)]
    pub fn read_words<const N: usize>(&mut self) -> Result<[u64; N], ShortSlot> {
        Ok(self.bytes.take::<u64, N>().ok_or(ShortSlot)?.map(u64::from_le))
    }

    /// Fills `out` with the next little-endian words of 64 bits.
    ///
    /// # Errors
    /// [`ShortSlot`] when there are fewer left; nothing is read then.
    #[inline(always)]
    pub fn read_words_into(&mut self, out: &mut [u64]) -> Result<(), ShortSlot> {
        self.bytes.fill(out).ok_or(ShortSlot)?;
        out.iter_mut().for_each(|word| *word = u64::from_le(*word));
        Ok(())
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.bytes.left()
    }
}

/// One free slot, written front to back and not seen by the peer before its index is published.
#[derive(Debug)]
pub struct SlotMut<'a, M> {
    room: SlotRoom<'a>,
    memory: PhantomData<&'a M>,
}

impl<'a, M> SlotMut<'a, M> {
    #[inline(always)]
    pub(crate) fn new(room: SlotRoom<'a>) -> Self {
        Self { room, memory: PhantomData }
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// [`ShortSlot`] when there is less room; nothing is written then.
    #[inline(always)]
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ShortSlot> {
        self.room.write(bytes).ok_or(ShortSlot)
    }

    /// Writes the next word, little-endian.
    ///
    /// # Errors
    /// [`ShortSlot`] when there is less room; nothing is written then.
    #[inline(always)]
    pub fn write_word(&mut self, word: u64) -> Result<(), ShortSlot> {
        self.write(&word.to_le_bytes())
    }

    /// Bytes not written yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.room.left()
    }
}
