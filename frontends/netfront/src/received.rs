//! A received packet and its metadata.

use crate::packet::{Checksum, Gso};
use crate::steering::Hash;
use core::fmt;

/// A received packet: a private copy that the backend can no longer change.
pub struct Incoming<'a> {
    /// State of the transport checksum.
    pub checksum: Checksum,
    /// How a forwarder has to divide the packet into segments, if it is a GSO packet.
    pub gso: Option<Gso>,
    /// Hash of the packet, as the backend reports it, if hashes of such packets were requested.
    pub hash: Option<Hash>,
    room: &'a mut [u8],
    headroom: usize,
}

impl<'a> Incoming<'a> {
    /// Creates a packet; `room` is the headroom followed by the frame.
    pub(crate) const fn new(
        room: &'a mut [u8],
        headroom: usize,
        (checksum, gso, hash): (Checksum, Option<Gso>, Option<Hash>),
    ) -> Self {
        Self { checksum, gso, hash, room, headroom }
    }

    /// Returns the Ethernet frame, without FCS.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        self.room.get(self.headroom..).unwrap_or_default()
    }

    /// Returns the Ethernet frame, without FCS, for modification.
    pub fn frame_mut(&mut self) -> &mut [u8] {
        self.room.get_mut(self.headroom..).unwrap_or_default()
    }

    /// Returns the number of bytes that the backend left free before the frame. It is 0 unless
    /// headroom was requested. While the setting changes, packets with and without headroom arrive.
    #[must_use]
    pub const fn headroom(&self) -> usize {
        self.headroom
    }

    /// Returns [`headroom`](Self::headroom) zeroed bytes followed by the frame, as one slice, for
    /// example to prepend a header.
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
