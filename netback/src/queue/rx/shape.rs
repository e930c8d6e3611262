//! Layout of a packet in the guest's receive slots.

use crate::port::{Checksum, Gso, Packet};
use crate::queue::Features;
use crate::queue::queue_set::Arrival;
use pvio_ring::proto::netif::{ExtraKind, GsoKind, HASH_TOEPLITZ, RxFlags};
use pvio_ring::shm::PAGE_SIZE;

/// Largest number of extra segments of one packet: GSO, hash, headroom.
const EXTRAS: usize = 3;

/// Layout of a packet in receive slots: a prefix slot (for old guests), the first data slot, the
/// extra segments, the other data slots.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Segment size, in a separate slot before the packet.
    prefix: Option<u16>,
    extras: [Option<ExtraKind>; EXTRAS],
    /// Bytes left free before the data in each slot.
    headroom: u16,
}

impl Shape {
    pub fn of<B>(arrival: &Arrival<B>, features: &Features, headroom: u16) -> Self {
        let (mut prefix, mut segments) = (None, None);
        if let Some(Gso { size, kind }) = arrival.packet.offload.gso {
            let old = match kind {
                GsoKind::TcpV4 => features.gso_prefix_v4 && !features.gso_v4,
                GsoKind::TcpV6 => features.gso_prefix_v6 && !features.gso_v6,
            };
            if old { prefix = Some(size) } else { segments = Some(ExtraKind::Gso { size, kind }) }
        }
        let hash = arrival.hash.map(|(kind, value)| ExtraKind::Hash {
            kind: kind as u8,
            algorithm: HASH_TOEPLITZ as u8,
            value,
        });
        let xdp = (headroom > 0).then_some(ExtraKind::Xdp { headroom });
        Self { prefix, extras: [segments, hash, xdp], headroom }
    }

    /// Returns the number of data bytes per page.
    pub fn page(headroom: u16) -> usize {
        PAGE_SIZE.saturating_sub(headroom.into()).max(1)
    }

    /// Returns the number of slots that a packet of this length needs.
    pub fn slots(&self, len: usize) -> u32 {
        let others = self.extras().count().saturating_add(usize::from(self.prefix.is_some()));
        (len.div_ceil(self.room()).saturating_add(others)) as u32
    }

    /// Returns the number of data bytes per slot.
    pub fn room(&self) -> usize {
        Self::page(self.headroom)
    }

    /// Returns the number of free bytes before the data of a slot.
    pub const fn headroom(&self) -> u16 {
        self.headroom
    }

    /// Returns the number of slots before the first data slot.
    pub fn before(&self) -> usize {
        self.prefix.is_some().into()
    }

    /// Returns the extra segments, in the order of their types.
    pub fn extras(&self) -> impl Iterator<Item = ExtraKind> {
        self.extras.into_iter().flatten()
    }

    /// Returns the contents of the prefix slot: the segment size, and the number of slots that
    /// follow.
    pub fn prefix(&self, len: usize) -> Option<(u16, i16)> {
        let follow = self.slots(len).saturating_sub(1);
        self.prefix.map(|size| (size, i16::try_from(follow).unwrap_or(i16::MAX)))
    }

    /// Returns the flags of the first data slot.
    pub fn flags<B>(&self, packet: &Packet<B>) -> RxFlags {
        let checksum = match packet.offload.checksum {
            Checksum::Unknown => RxFlags::empty(),
            Checksum::Validated => RxFlags::DATA_VALIDATED,
            Checksum::Partial { .. } => RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED,
        };
        let extra = self.extras().next().map_or(RxFlags::empty(), |_| RxFlags::EXTRA_INFO);
        checksum | extra
    }
}
