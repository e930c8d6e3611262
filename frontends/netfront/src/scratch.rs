use crate::packet::DEFAULT_MTU;
use alloc::boxed::Box;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::netif::MAX_PACKET;

/// Per-queue state for smoltcp: a buffer for one frame to be sent, and a counter.
pub(crate) struct Scratch {
    /// Size of the largest frame that smoltcp may send, in bytes.
    pub frame_max: usize,
    pub scratch: Box<[u8]>,
    pub unverified: u64,
}

impl Scratch {
    pub fn new() -> Self {
        let mut scratch = Self { frame_max: 0, scratch: Box::default(), unverified: 0 };
        scratch.set_mtu(DEFAULT_MTU);
        scratch
    }

    pub fn set_mtu(&mut self, mtu: u32) {
        let frame_max = usize::try_from(mtu).unwrap_or(MAX_PACKET);
        self.frame_max = frame_max.saturating_add(ETHERNET_HEADER).min(MAX_PACKET);
        self.scratch = alloc::vec![0; self.frame_max].into_boxed_slice();
    }
}
