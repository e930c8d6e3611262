//! The offer of an interface's backend.

use crate::handshake::encoding::{FLAG, POSITIVE};
use crate::handshake::record::{Optional, Or, read_and_write, record};

use super::MAX_QUEUES;

record! {
    /// The offer of an interface's backend, written before it enters `InitWait`. A feature here is one
    /// that the backend can **receive from** the frontend; what the frontend can receive is in
    /// [`super::FrontRequest`].
    #[derive(Clone, PartialEq, Eq, Debug, Default)]
    pub struct BackOffer {
        /// `multi-queue-max-queues`.
        pub max_queues: Option<u32> = "multi-queue-max-queues" => Optional(POSITIVE),
        /// `feature-rx-copy`: the backend copies into the frontend's pages. All backends do.
        pub rx_copy: bool = "feature-rx-copy" => Or(FLAG, false),
        /// `feature-rx-flip`: the backend exchanges pages. No current backend does.
        pub rx_flip: bool = "feature-rx-flip" => Or(FLAG, false),
        /// `feature-sg`: frames of several slots.
        pub sg: bool = "feature-sg" => Or(FLAG, false),
        /// `feature-gso-tcpv4`: GSO for TCP over IPv4.
        pub gso_tcpv4: bool = "feature-gso-tcpv4" => Or(FLAG, false),
        /// `feature-gso-tcpv6`: GSO for TCP over IPv6.
        pub gso_tcpv6: bool = "feature-gso-tcpv6" => Or(FLAG, false),
        /// `feature-gso-tcpv4-prefix`: the segment size in a slot before the frame.
        pub gso_tcpv4_prefix: bool = "feature-gso-tcpv4-prefix" => Or(FLAG, false),
        /// `feature-gso-tcpv6-prefix`: the segment size in a slot before the frame.
        pub gso_tcpv6_prefix: bool = "feature-gso-tcpv6-prefix" => Or(FLAG, false),
        /// `feature-no-csum-offload`: checksums over IPv4 must be complete. Without it, they may be
        /// blank.
        pub no_csum_offload: bool = "feature-no-csum-offload" => Or(FLAG, false),
        /// `feature-ipv6-csum-offload`: checksums over IPv6 may be blank. Without it, they must be
        /// complete.
        pub ipv6_csum_offload: bool = "feature-ipv6-csum-offload" => Or(FLAG, false),
        /// `feature-multicast-control`: the frontend may configure a filter of multicast groups.
        pub multicast_control: bool = "feature-multicast-control" => Or(FLAG, false),
        /// `feature-dynamic-multicast-control`: the frontend may request filtering while connected.
        pub dynamic_multicast_control: bool =
            "feature-dynamic-multicast-control" => Or(FLAG, false),
        /// `feature-split-event-channels`: an event channel for each direction.
        pub split_event_channels: bool = "feature-split-event-channels" => Or(FLAG, false),
        /// `feature-ctrl-ring`: a control ring.
        pub ctrl_ring: bool = "feature-ctrl-ring" => Or(FLAG, false),
        /// `feature-xdp-headroom`: headroom before each frame (Linux).
        pub xdp_headroom: bool = "feature-xdp-headroom" => Or(FLAG, false),
    }
}
read_and_write!(BackOffer);

/// Limits of a frontend's implementation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontLimits {
    /// Maximum number of queues.
    pub max_queues: u32,
}

impl BackOffer {
    /// Returns the number of queues that is advertised, at most [`MAX_QUEUES`].
    #[must_use]
    pub fn queues(&self) -> u32 {
        self.max_queues.unwrap_or(1).clamp(1, MAX_QUEUES)
    }

    /// Returns the number of queues that a frontend with these limits should set up, at least 1.
    #[must_use]
    pub fn plan(&self, limits: FrontLimits) -> u32 {
        limits.max_queues.clamp(1, self.queues())
    }
}
