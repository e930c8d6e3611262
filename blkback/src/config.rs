//! What is decided for a disk beyond what the toolstack says of it.

use crate::pages::most_pages;
use crate::path::Policy;
use pvio_ring::proto::blkif::{Abi, MAX_INDIRECT_SEGMENTS};
use pvio_xenbus::handshake::vbd::{MAX_QUEUES, MAX_RING_PAGE_ORDER, Protocol};

/// What is decided for a disk beyond what the toolstack says of it, and so what is offered to its
/// frontend. Anything past a bound is taken for the bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// How its data reaches the guest.
    pub policy: Policy,
    /// Segments in one indirect request, at most 4096 (2048 where data may be copied, see
    /// [`POOL_MOST`](crate::pages::POOL_MOST)); 0 offers none.
    pub max_indirect_segments: u32,
    /// A ring may have 2 to this power pages; at most 5.
    pub max_ring_page_order: u32,
    /// Queues, each with a thread of its own, at most 256. More than the machine has CPUs are of
    /// no use.
    pub max_queues: u32,
}

impl Default for Config {
    /// What Linux's backend offers, but one queue: how many CPUs there are is not known here.
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            max_indirect_segments: 256,
            max_ring_page_order: 4,
            max_queues: 1,
        }
    }
}

impl Config {
    /// The default, with as many queues as there are CPUs for this process.
    #[cfg(feature = "std")]
    #[must_use]
    pub fn for_this_machine() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self { max_queues: u32::try_from(cpus).unwrap_or(MAX_QUEUES), ..Self::default() }
    }

    /// The same, within all bounds.
    #[must_use]
    pub fn bounded(self) -> Self {
        // What the frontend will agree to is not known when this is offered.
        let paths = [self.policy.path(true), self.policy.path(false)].map(most_pages);
        let most = MAX_INDIRECT_SEGMENTS.min(paths[0]).min(paths[1]) as u32;
        Self {
            policy: self.policy,
            max_indirect_segments: self.max_indirect_segments.min(most),
            max_ring_page_order: self.max_ring_page_order.min(MAX_RING_PAGE_ORDER),
            max_queues: self.max_queues.clamp(1, MAX_QUEUES),
        }
    }
}

/// How the requests of a frontend that named this protocol, or none, are laid out.
///
/// Every frontend of today names one (Linux, the BSDs, Windows, OVMF, GRUB, Mini-OS and its kin).
/// Those that do not are older than the key, which came when a 64-bit backend first served 32-bit
/// guests: they are 32-bit x86. Linux's backend, the one most guests were tested with, takes them for
/// that on x86 (`BLKIF_PROTOCOL_DEFAULT`), because such guests were found not to work otherwise;
/// QEMU, NetBSD and tapback take them for their own. Elsewhere than on x86 there is but one layout.
pub(crate) const fn abi(protocol: Option<Protocol>) -> Abi {
    match protocol {
        Some(Protocol::X86_32) => Abi::X86_32,
        Some(Protocol::X86_64 | Protocol::Arm) => Abi::X86_64,
        None if cfg!(any(target_arch = "x86", target_arch = "x86_64")) => Abi::X86_32,
        None => Abi::X86_64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_bounded() {
        let endless = |policy| Config {
            policy,
            max_indirect_segments: u32::MAX,
            max_ring_page_order: u32::MAX,
            max_queues: u32::MAX,
        };
        for (policy, segments) in [
            (Policy::Map, 4096),
            (Policy::Copy, 2048),
            (Policy::PersistentOrMap, 4096),
            (Policy::PersistentOrCopy, 2048),
        ] {
            let c = endless(policy).bounded();
            let seen = (c.max_indirect_segments, c.max_ring_page_order, c.max_queues);
            assert_eq!(seen, (segments, 5, 256), "{policy}");
        }
        assert_eq!(Config { max_queues: 0, ..Config::default() }.bounded().max_queues, 1);
        assert_eq!(Config::default().bounded(), Config::default());
    }
}
