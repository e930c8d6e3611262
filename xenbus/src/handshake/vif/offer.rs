//! The offer of an interface's backend.

use crate::handshake::HandshakeError;
use crate::handshake::fields::{Reader, Writer};
use crate::xenstore::{Xenstore, transaction};

use super::MAX_QUEUES;

/// The offer of an interface's backend, written before it enters `InitWait`. A feature here is one
/// that the backend can **receive from** the frontend; what the frontend can receive is in
/// [`super::FrontRequest`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BackOffer {
    /// `multi-queue-max-queues`.
    pub max_queues: Option<u32>,
    /// `feature-rx-copy`: the backend copies into the frontend's pages. All backends do.
    pub rx_copy: bool,
    /// `feature-rx-flip`: the backend exchanges pages. No current backend does.
    pub rx_flip: bool,
    /// `feature-sg`: frames of several slots.
    pub sg: bool,
    /// `feature-gso-tcpv4`: GSO for TCP over IPv4.
    pub gso_tcpv4: bool,
    /// `feature-gso-tcpv6`: GSO for TCP over IPv6.
    pub gso_tcpv6: bool,
    /// `feature-gso-tcpv4-prefix`: the segment size in a slot before the frame.
    pub gso_tcpv4_prefix: bool,
    /// `feature-gso-tcpv6-prefix`: the segment size in a slot before the frame.
    pub gso_tcpv6_prefix: bool,
    /// `feature-no-csum-offload`: checksums over IPv4 must be complete. Without it, they may be
    /// blank.
    pub no_csum_offload: bool,
    /// `feature-ipv6-csum-offload`: checksums over IPv6 may be blank. Without it, they must be
    /// complete.
    pub ipv6_csum_offload: bool,
    /// `feature-multicast-control`: the frontend may configure a filter of multicast groups.
    pub multicast_control: bool,
    /// `feature-dynamic-multicast-control`: the frontend may request filtering while connected.
    pub dynamic_multicast_control: bool,
    /// `feature-split-event-channels`: an event channel for each direction.
    pub split_event_channels: bool,
    /// `feature-ctrl-ring`: a control ring.
    pub ctrl_ring: bool,
    /// `feature-xdp-headroom`: headroom before each frame (Linux).
    pub xdp_headroom: bool,
}

/// Limits of a frontend's implementation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontLimits {
    /// Maximum number of queues.
    pub max_queues: u32,
}

impl BackOffer {
    /// Reads a backend's offer.
    ///
    /// # Errors
    /// [`HandshakeError`] for values that are not numbers, or zero queues.
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            Ok(Self {
                max_queues: r.opt_u32("multi-queue-max-queues", 1, u32::MAX)?,
                rx_copy: r.flag("feature-rx-copy", false)?,
                rx_flip: r.flag("feature-rx-flip", false)?,
                sg: r.flag("feature-sg", false)?,
                gso_tcpv4: r.flag("feature-gso-tcpv4", false)?,
                gso_tcpv6: r.flag("feature-gso-tcpv6", false)?,
                gso_tcpv4_prefix: r.flag("feature-gso-tcpv4-prefix", false)?,
                gso_tcpv6_prefix: r.flag("feature-gso-tcpv6-prefix", false)?,
                no_csum_offload: r.flag("feature-no-csum-offload", false)?,
                ipv6_csum_offload: r.flag("feature-ipv6-csum-offload", false)?,
                multicast_control: r.flag("feature-multicast-control", false)?,
                dynamic_multicast_control: r.flag("feature-dynamic-multicast-control", false)?,
                split_event_channels: r.flag("feature-split-event-channels", false)?,
                ctrl_ring: r.flag("feature-ctrl-ring", false)?,
                xdp_headroom: r.flag("feature-xdp-headroom", false)?,
            })
        })
    }

    /// Writes the offer, and removes keys of an earlier one.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            w.opt("multi-queue-max-queues", self.max_queues)?;
            w.flag("feature-rx-copy", self.rx_copy)?;
            w.flag("feature-rx-flip", self.rx_flip)?;
            w.flag("feature-sg", self.sg)?;
            w.flag("feature-gso-tcpv4", self.gso_tcpv4)?;
            w.flag("feature-gso-tcpv6", self.gso_tcpv6)?;
            w.flag("feature-gso-tcpv4-prefix", self.gso_tcpv4_prefix)?;
            w.flag("feature-gso-tcpv6-prefix", self.gso_tcpv6_prefix)?;
            w.flag("feature-no-csum-offload", self.no_csum_offload)?;
            w.flag("feature-ipv6-csum-offload", self.ipv6_csum_offload)?;
            w.flag("feature-multicast-control", self.multicast_control)?;
            w.flag("feature-dynamic-multicast-control", self.dynamic_multicast_control)?;
            w.flag("feature-split-event-channels", self.split_event_channels)?;
            w.flag("feature-ctrl-ring", self.ctrl_ring)?;
            w.flag("feature-xdp-headroom", self.xdp_headroom)
        })
    }

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
