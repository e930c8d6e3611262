//! Where things are in a shared ring (`ring.h`, `struct name##_sring`): the two index pairs in the
//! first 16 bytes, padding to 64, then slots of one size, their number the largest power of two
//! that fits (`__RING_SIZE`).

/// Bytes in a page on every architecture whose PV drivers pvio speaks to (`XEN_PAGE_SIZE`).
pub const PAGE_SIZE: usize = 4096;
/// Bytes before the first slot.
pub(crate) const HEADER: usize = 64;
/// Pages of the largest ring any frontend asks for (`ring-page-order` 5).
pub const MAX_RING_PAGES: usize = 32;

/// The geometry of one ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingLayout {
    slot_size: u32,
    slots: u32,
}

impl RingLayout {
    /// The ring that `bytes` of shared memory hold with slots of `slot_size` bytes (the larger of
    /// request and response). `None` unless `bytes` is 1 to 32 whole pages and `slot_size` is a
    /// multiple of 4 that fits at least twice.
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

    /// Number of slots, a power of two.
    #[must_use]
    pub const fn slots(self) -> u32 {
        self.slots
    }

    /// Bytes per slot.
    #[must_use]
    pub const fn slot_size(self) -> usize {
        self.slot_size as usize
    }

    /// Where the last slot ends, in bytes.
    pub(crate) const fn end(self) -> usize {
        HEADER.saturating_add((self.slots as usize).saturating_mul(self.slot_size as usize))
    }
}

/// There is no free slot: back-pressure, not a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the ring is full")]
pub struct Full;

/// A ring that cannot be used (any more).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingFault {
    /// The shared memory cannot hold such a ring.
    #[error("{bytes} bytes of shared memory cannot hold a ring of {slot_size}-byte slots")]
    Geometry {
        /// Bytes of shared memory offered.
        bytes: usize,
        /// Bytes per slot asked for.
        slot_size: usize,
    },
    /// The peer claims to have produced more than the ring holds
    /// (`RING_REQUEST_PROD_OVERFLOW` / `RING_RESPONSE_PROD_OVERFLOW`). Nothing in the ring can be
    /// believed afterwards.
    #[error(
        "the peer's producer index {prod} is {ahead} past the consumed index; at most {most} can be"
    )]
    ProducerOverflow {
        /// The producer index found.
        prod: u32,
        /// How far it is past what was consumed.
        ahead: u32,
        /// How far it could honestly be.
        most: u32,
    },
    /// The peer claims to have consumed what was never produced, or has gone backwards.
    #[error(
        "the peer's consumer index {cons} is {behind} behind the produced index; at most {most} can be"
    )]
    ConsumerOverrun {
        /// The consumer index found.
        cons: u32,
        /// How far it is behind what was produced.
        behind: u32,
        /// How far it could honestly be.
        most: u32,
    },
}

impl RingFault {
    /// A short stable code for logs, counters and `error` nodes.
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
    fn slot_counts_are_those_of_the_header() {
        // PROTOCOLS: blkif rings of 1..32 pages hold 32..1024 requests in both ABIs.
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
    fn impossible_geometry_is_refused() {
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
