//! Settings of a disk that do not come from the toolstack's keys.

use crate::pages::PAGES_MOST;
use crate::path::Policy;
use pvio_ring::proto::blkif::{Abi, MAX_INDIRECT_SEGMENTS};
use pvio_xenbus::handshake::vbd::{MAX_QUEUES, MAX_RING_PAGE_ORDER, Protocol};

/// Settings of a disk that do not come from the toolstack's keys. They determine the features that
/// the backend advertises. Values above a bound are reduced to the bound
/// ([`bounded`](Self::bounded)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Config {
    /// The policy for access to guest pages.
    pub policy: Policy,
    /// Maximum number of segments of an indirect request, at most 2048 ([`PAGES_MOST`]). 0 disables
    /// indirect requests.
    pub max_indirect_segments: u32,
    /// Maximum ring size, as a power of two in pages; at most 5.
    pub max_ring_page_order: u32,
    /// Maximum number of queues, at most 256. Each queue has its own thread, so more queues than
    /// CPUs bring no benefit.
    pub max_queues: u32,
}

impl Default for Config {
    /// The defaults of Linux's backend, except for one queue: the number of CPUs is not known
    /// without `std`.
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
    /// Returns the default settings with as many queues as this process has CPUs.
    #[cfg(feature = "std")]
    #[must_use]
    pub fn for_this_machine() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self { max_queues: u32::try_from(cpus).unwrap_or(MAX_QUEUES), ..Self::default() }
    }

    /// Returns these settings with every value reduced to its bound.
    #[must_use]
    pub fn bounded(self) -> Self {
        let most = MAX_INDIRECT_SEGMENTS.min(PAGES_MOST) as u32;
        Self {
            policy: self.policy,
            max_indirect_segments: self.max_indirect_segments.min(most),
            max_ring_page_order: self.max_ring_page_order.min(MAX_RING_PAGE_ORDER),
            max_queues: self.max_queues.clamp(1, MAX_QUEUES),
        }
    }
}

/// Returns the request layout for a frontend that named this protocol, or none.
///
/// Every current frontend names its protocol (Linux, the BSDs, Windows, OVMF, GRUB, Mini-OS and its
/// derivatives). Frontends that do not are older than the key, which was introduced when a 64-bit
/// backend first served 32-bit guests: they are 32-bit x86. On x86, Linux's backend treats them as
/// such (`BLKIF_PROTOCOL_DEFAULT`), because these guests were found not to work otherwise, and most
/// guests were tested with it. QEMU, NetBSD and tapback assume the backend's native layout. On
/// other architectures there is only one layout.
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
    fn config_with_out_of_range_limits_is_clamped() {
        let endless = |policy| Config {
            policy,
            max_indirect_segments: u32::MAX,
            max_ring_page_order: u32::MAX,
            max_queues: u32::MAX,
        };
        for policy in Policy::ALL {
            let c = endless(policy).bounded();
            let seen = (c.max_indirect_segments, c.max_ring_page_order, c.max_queues);
            assert_eq!(seen, (2048, 5, 256), "{policy}");
        }
        assert_eq!(Config { max_queues: 0, ..Config::default() }.bounded().max_queues, 1);
        assert_eq!(Config::default().bounded(), Config::default());
    }
}
