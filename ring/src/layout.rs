//! Layout of a shared ring (`ring.h`, `struct name##_sring`): the two index pairs in the first 16
//! bytes, padding to 64 bytes, then slots of equal size. The number of slots is the largest power
//! of two that fits (`__RING_SIZE`).

/// Size of a page in bytes, on every architecture whose PV drivers pvio supports (`XEN_PAGE_SIZE`).
pub const PAGE_SIZE: usize = 4096;
/// Offset of the first slot, in bytes.
pub(crate) const HEADER: usize = 64;
/// Pages of the largest ring that a frontend can request (`ring-page-order` 5).
pub const MAX_RING_PAGES: usize = 32;

/// The geometry of one ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingLayout {
    slot_size: u32,
    slots: u32,
}

impl RingLayout {
    /// Returns the layout of a ring in `bytes` bytes of shared memory with slots of `slot_size`
    /// bytes (the larger of request and response). `None` unless `bytes` is 1 to 32 whole pages and
    /// `slot_size` is a multiple of 4 that fits at least twice.
    #[must_use]
    pub fn new(bytes: usize, slot_size: usize) -> Option<Self> {
        let pages = bytes / PAGE_SIZE;
        if !bytes.is_multiple_of(PAGE_SIZE) || pages == 0 || pages > MAX_RING_PAGES {
            return None;
        }
        if slot_size == 0 || !slot_size.is_multiple_of(4) {
            return None;
        }
        let fit = u32::try_from(bytes.checked_sub(HEADER)?.checked_div(slot_size)?).ok()?;
        let slots = 1_u32.checked_shl(fit.checked_ilog2()?)?;
        (slots >= 2).then_some(Self { slot_size: u32::try_from(slot_size).ok()?, slots })
    }

    /// Returns the number of slots, a power of two.
    #[must_use]
    pub const fn slots(self) -> u32 {
        self.slots
    }

    /// Returns the size of a slot, in bytes.
    #[must_use]
    pub const fn slot_size(self) -> usize {
        self.slot_size as usize
    }

    /// Returns the offset of the end of the last slot, in bytes.
    pub(crate) const fn end(self) -> usize {
        HEADER.saturating_add((self.slots as usize).saturating_mul(self.slot_size as usize))
    }
}

/// No slot is free: back-pressure, not a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the ring is full")]
pub struct Full;

/// Why a ring cannot be used, or can no longer be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingFault {
    /// The shared memory cannot hold such a ring.
    #[error("{bytes} bytes of shared memory cannot hold a ring of {slot_size}-byte slots")]
    Geometry {
        /// Size of the shared memory, in bytes.
        bytes: usize,
        /// Requested size of a slot, in bytes.
        slot_size: usize,
    },
    /// The peer's producer index is further ahead than the ring holds (`RING_REQUEST_PROD_OVERFLOW`
    /// / `RING_RESPONSE_PROD_OVERFLOW`). The contents of the ring are invalid from then on.
    #[error(
        "the peer's producer index {prod} is {ahead} past the consumed index (the limit is {most})"
    )]
    ProducerOverflow {
        /// The producer index found.
        prod: u32,
        /// Its distance from the consumer index.
        ahead: u32,
        /// The maximum distance that is valid.
        most: u32,
    },
    /// The peer's consumer index is ahead of the producer index, or has gone backwards.
    #[error(
        "the peer's consumer index {cons} is {behind} behind the produced index (the limit is {most})"
    )]
    ConsumerOverrun {
        /// The consumer index found.
        cons: u32,
        /// Its distance from the producer index.
        behind: u32,
        /// The maximum distance that is valid.
        most: u32,
    },
}

impl RingFault {
    /// Returns a short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Geometry { .. } => "ring-geometry",
            Self::ProducerOverflow { .. } => "ring-producer-overflow",
            Self::ConsumerOverrun { .. } => "ring-consumer-overrun",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_counts_match_xen_headers() {
        // blkif rings of 1 to 32 pages hold 32 to 1024 requests in both ABIs.
        for (order, slots) in [32, 64, 128, 256, 512, 1024].into_iter().enumerate() {
            for slot_size in [112, 108] {
                let layout = RingLayout::new(PAGE_SIZE << order, slot_size).unwrap();
                assert_eq!(layout.slots(), slots);
            }
        }
        // netif tx, rx and control rings.
        assert_eq!(RingLayout::new(PAGE_SIZE, 12).unwrap().slots(), 256);
        assert_eq!(RingLayout::new(PAGE_SIZE, 8).unwrap().slots(), 256);
        assert_eq!(RingLayout::new(PAGE_SIZE, 16).unwrap().slots(), 128);
    }

    #[test]
    fn invalid_ring_geometry_is_none() {
        for (bytes, slot) in [
            (0, 16),
            (100, 16),
            (PAGE_SIZE * 33, 16),
            (PAGE_SIZE, 0),
            (PAGE_SIZE, 6),
            (PAGE_SIZE, 4096),
        ] {
            assert_eq!(RingLayout::new(bytes, slot), None, "{bytes} bytes, {slot}-byte slots");
        }
    }
}
