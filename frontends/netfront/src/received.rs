//! A packet that came in, as it is handed on.

use crate::packet::{Checksum, Gso};
use crate::steering::Hash;
use core::fmt;

/// A packet that came in: a private copy, which the backend cannot change any more.
pub struct Incoming<'a> {
    /// How far its transport checksum can be relied on.
    pub checksum: Checksum,
    /// How it has still to be cut into segments, by whoever passes it on.
    pub gso: Option<Gso>,
    /// Its hash, where the backend was asked for that of such packets: by its word.
    pub hash: Option<Hash>,
    room: &'a mut [u8],
    headroom: usize,
}

impl<'a> Incoming<'a> {
    /// `room` is the headroom and the frame behind it.
    pub(crate) const fn new(
        room: &'a mut [u8],
        headroom: usize,
        (checksum, gso, hash): (Checksum, Option<Gso>, Option<Hash>),
    ) -> Self {
        Self { checksum, gso, hash, room, headroom }
    }

    /// The Ethernet frame, without FCS.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        self.room.get(self.headroom..).unwrap_or_default()
    }

    /// The same, to be changed.
    pub fn frame_mut(&mut self) -> &mut [u8] {
        self.room.get_mut(self.headroom..).unwrap_or_default()
    }

    /// Bytes that the backend left free before the frame. Other than 0 only if it was asked to; while that
    /// changes, packets of both kinds come.
    #[must_use]
    pub const fn headroom(&self) -> usize {
        self.headroom
    }

    /// The frame and, before it, [`headroom`](Self::headroom) zeroed bytes, in one piece: for a header
    /// that is put in front, say.
    pub fn with_headroom(&mut self) -> &mut [u8] {
        self.room
    }
}

impl fmt::Debug for Incoming<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("len", &self.frame().len())
            .field("headroom", &self.headroom)
            .field("hash", &self.hash)
            .finish_non_exhaustive()
    }
}
