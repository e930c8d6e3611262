use super::{BackOffer, EventChannels, FrontRequest};

/// Offloads of one direction: what the sender of a frame may leave to its receiver.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Offloads {
    /// Frames may use several slots.
    pub sg: bool,
    /// Checksums over IPv4 may be blank.
    pub csum_v4: bool,
    /// Checksums over IPv6 may be blank.
    pub csum_v6: bool,
    /// TCP over IPv4 may be sent as GSO packets; implies `sg` and `csum_v4`.
    pub gso_v4: bool,
    /// TCP over IPv6 may be sent as GSO packets; implies `sg` and `csum_v6`.
    pub gso_v6: bool,
}

/// Negotiated features of a network interface. Features not listed here are not used.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Negotiated {
    /// Number of queues, at least 1.
    pub queues: usize,
    /// Whether each direction has a separate event channel, in all queues.
    pub split_event_channels: bool,
    /// What the frontend may send: the offloads that the backend supports.
    pub to_back: Offloads,
    /// What the backend may send: the offloads that the frontend supports and the backend
    /// implements.
    pub to_front: Offloads,
    /// Whether the frontend accepts GSO of TCP over IPv4 in the old form: the segment size in a
    /// slot before the packet. Set only if it does not support the new form, `to_front.gso_v4`.
    pub gso_prefix_v4: bool,
    /// The same for IPv6.
    pub gso_prefix_v6: bool,
    /// Whether the frontend notifies the backend of new receive buffers.
    pub rx_notify: bool,
    /// Whether the backend sends only multicast groups that the frontend has added. If
    /// `dynamic_multicast`, the frontend may change this setting while connected.
    pub multicast_control: bool,
    /// Whether the key of `multicast_control` is to be watched while connected.
    pub dynamic_multicast: bool,
    /// Whether there is a control ring.
    pub ctrl_ring: bool,
    /// Headroom before each frame to the frontend, in bytes.
    pub xdp_headroom: u32,
}

impl Negotiated {
    /// Combines an offer and a request.
    ///
    /// Checksums over IPv4 may be blank unless the receiver disables it, over IPv6 only if the
    /// receiver enables it. A feature that depends on another one is off without that one.
    #[must_use]
    pub fn new(offer: &BackOffer, request: &FrontRequest) -> Self {
        let to_back = Takes {
            sg: offer.sg,
            no_csum: offer.no_csum_offload,
            csum_v6: offer.ipv6_csum_offload,
            gso_v4: offer.gso_tcpv4,
            gso_v6: offer.gso_tcpv6,
        }
        .offloads();
        let to_front = Takes {
            sg: request.sg && offer.sg,
            no_csum: request.no_csum_offload,
            csum_v6: request.ipv6_csum_offload && offer.ipv6_csum_offload,
            gso_v4: request.gso_tcpv4 && offer.gso_tcpv4,
            gso_v6: request.gso_tcpv6 && offer.gso_tcpv6,
        }
        .offloads();
        // Frontends that support only the old form predate the keys for offloads: they complete
        // blank checksums, and support packets of several slots if they set `feature-sg`.
        let (sg, blank_v4) = (request.sg, !request.no_csum_offload);
        let gso_prefix_v4 = request.gso_tcpv4_prefix && sg && blank_v4 && !to_front.gso_v4;
        let blank_v6 = request.ipv6_csum_offload;
        let gso_prefix_v6 = request.gso_tcpv6_prefix && sg && blank_v6 && !to_front.gso_v6;
        let split = |q: &super::Queue| matches!(q.events, EventChannels::Split { .. });
        Self {
            queues: request.queues.len(),
            split_event_channels: request.queues.iter().all(split),
            to_back,
            to_front,
            gso_prefix_v4,
            gso_prefix_v6,
            rx_notify: request.rx_notify,
            multicast_control: offer.multicast_control && request.multicast_control,
            dynamic_multicast: offer.multicast_control && offer.dynamic_multicast_control,
            ctrl_ring: offer.ctrl_ring && request.ctrl.is_some(),
            xdp_headroom: if offer.xdp_headroom { request.xdp_headroom } else { 0 },
        }
    }
}

/// What a receiver declares to support.
struct Takes {
    sg: bool,
    no_csum: bool,
    csum_v6: bool,
    gso_v4: bool,
    gso_v6: bool,
}

impl Takes {
    const fn offloads(self) -> Offloads {
        let csum_v4 = !self.no_csum;
        Offloads {
            sg: self.sg,
            csum_v4,
            csum_v6: self.csum_v6,
            gso_v4: self.gso_v4 && self.sg && csum_v4,
            gso_v6: self.gso_v6 && self.sg && self.csum_v6,
        }
    }
}
