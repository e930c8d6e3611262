use super::{BackOffer, EventChannels, FrontRequest};

/// What may be left undone in frames of one direction, for the receiver of them to take care of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Offloads {
    /// Frames may take several slots.
    pub sg: bool,
    /// Checksums over IPv4 may be blank.
    pub csum_v4: bool,
    /// Checksums over IPv6 may be blank.
    pub csum_v6: bool,
    /// TCP over IPv4 may be unsegmented; implies `sg` and `csum_v4`.
    pub gso_v4: bool,
    /// TCP over IPv6 may be unsegmented; implies `sg` and `csum_v6`.
    pub gso_v6: bool,
}

/// What both ends of a network interface agreed on. What is not in here is not used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// How many queues there are, at least 1.
    pub queues: usize,
    /// Whether each direction has an event channel of its own, in all queues.
    pub split_event_channels: bool,
    /// What the frontend may send: what the backend takes.
    pub to_back: Offloads,
    /// What the backend may send: what the frontend takes and the backend itself knows.
    pub to_front: Offloads,
    /// Whether the frontend takes TCP over IPv4 unsegmented in the old form: the segment size in a slot
    /// before the packet. Only if it does not take the new form, `to_front.gso_v4`.
    pub gso_prefix_v4: bool,
    /// The same over IPv6.
    pub gso_prefix_v6: bool,
    /// Whether the frontend says when there is new room to receive into.
    pub rx_notify: bool,
    /// Whether only the groups that the frontend names are sent to it. If `dynamic_multicast`,
    /// the frontend may change its mind while connected.
    pub multicast_control: bool,
    /// Whether `multicast_control` is to be watched while connected.
    pub dynamic_multicast: bool,
    /// Whether there is a control ring.
    pub ctrl_ring: bool,
    /// Bytes to keep free before each frame to the frontend.
    pub xdp_headroom: u32,
}

impl Negotiated {
    /// What an offer and a request have in common.
    ///
    /// Checksums over IPv4 may be blank unless the receiver forbids it, over IPv6 only if it
    /// allows it. A feature that rests on another is off without that one.
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
        // Frontends that know the old form only are older than every other way to say what they take:
        // they complete blank checksums, and packets of several slots they take if they say so.
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

/// What a receiver says it takes.
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
