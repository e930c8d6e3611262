use super::slots::{SlotBytes, SlotRoom};
use core::marker::PhantomData;

/// An access beyond the end of a slot: a bug in this program, not caused by the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the slot has no more bytes")]
pub struct ShortSlot;

/// One slot that the peer has published, read front to back. It is a cursor, so that **no byte can
/// be read twice**: the bytes that were validated are the bytes that are used (XSA-155).
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

    /// Copies the next `out.len()` bytes.
    ///
    /// # Errors
    /// [`ShortSlot`] if fewer are left; nothing is read in that case.
    #[inline]
    pub fn read(&mut self, out: &mut [u8]) -> Result<(), ShortSlot> {
        self.bytes.fill(out).ok_or(ShortSlot)
    }

    /// Takes the next `N` bytes.
    ///
    /// # Errors
    /// [`ShortSlot`] if fewer are left; nothing is read in that case.
    #[inline(always)]
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ShortSlot> {
        self.bytes.take().ok_or(ShortSlot)
    }

    /// Takes the next `N` little-endian words of 64 bits.
    ///
    /// # Errors
    /// [`ShortSlot`] if fewer are left; nothing is read in that case.
    #[inline(always)]
    pub fn read_words<const N: usize>(&mut self) -> Result<[u64; N], ShortSlot> {
        Ok(self.bytes.take::<u64, N>().ok_or(ShortSlot)?.map(u64::from_le))
    }

    /// Fills `out` with the next little-endian words of 64 bits.
    ///
    /// # Errors
    /// [`ShortSlot`] if fewer are left; nothing is read in that case.
    #[inline(always)]
    pub fn read_words_into(&mut self, out: &mut [u64]) -> Result<(), ShortSlot> {
        self.bytes.fill(out).ok_or(ShortSlot)?;
        out.iter_mut().for_each(|word| *word = u64::from_le(*word));
        Ok(())
    }

    /// Returns the number of bytes that are not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.bytes.left()
    }
}

/// One free slot, written front to back; the peer sees it only after its index is published.
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
    /// [`ShortSlot`] if there is less room; nothing is written in that case.
    #[inline(always)]
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ShortSlot> {
        self.room.write(bytes).ok_or(ShortSlot)
    }

    /// Writes the next word, little-endian.
    ///
    /// # Errors
    /// [`ShortSlot`] if there is less room; nothing is written in that case.
    #[inline(always)]
    pub fn write_word(&mut self, word: u64) -> Result<(), ShortSlot> {
        self.write(&word.to_le_bytes())
    }

    /// Returns the number of bytes that are not written yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.room.left()
    }
}
