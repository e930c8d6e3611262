use crate::packet::DEFAULT_MTU;
use alloc::boxed::Box;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::netif::MAX_PACKET;

/// What a queue keeps for smoltcp: memory for one frame to be sent, and a counter.
pub(crate) struct Scratch {
    /// Bytes of the largest frame smoltcp is told it may send.
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
