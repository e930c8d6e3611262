//! The request of an interface's frontend: rings, event channels, features.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::handshake::HandshakeError;
use crate::handshake::fields::{Reader, Writer, is_numbered};
use crate::xenstore::{Xenstore, transaction};

use super::BackOffer;

/// Maximum headroom that a frontend may request, in bytes: Linux's `XEN_NETIF_MAX_XDP_HEADROOM`.
/// (Linux's frontend requests 256.)
const MAX_XDP_HEADROOM: u32 = 0x7fff;

/// The event channels of a queue; never 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EventChannels {
    /// `event-channel`: one for both directions.
    Shared(u32),
    /// `event-channel-tx` and `event-channel-rx`, one for each ring.
    Split {
        /// For the transmit ring.
        tx: u32,
        /// For the receive ring.
        rx: u32,
    },
}

/// One queue of a [`FrontRequest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queue {
    /// `tx-ring-ref`: the grant reference of the transmit ring.
    pub tx_ring_ref: u32,
    /// `rx-ring-ref`: the grant reference of the receive ring.
    pub rx_ring_ref: u32,
    /// The event channels.
    pub events: EventChannels,
}

/// The control ring of a [`FrontRequest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlRing {
    /// `ctrl-ring-ref`: the grant reference of the ring.
    pub ring_ref: u32,
    /// `event-channel-ctrl`; never 0.
    pub event_channel: u32,
}

/// The request of an interface's frontend, written before it enters `Connected` (4) or, in some
/// implementations, `Initialised` (3). A feature here is one that the frontend can **receive from**
/// the backend.
///
/// `request-rx-copy` is not a field: it is required, because only copying is supported.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FrontRequest {
    /// The queues, at least one.
    pub queues: Vec<Queue>,
    /// The control ring, if there is one.
    pub ctrl: Option<ControlRing>,
    /// `feature-rx-notify`: the frontend notifies the backend of new receive buffers.
    pub rx_notify: bool,
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
    /// `feature-no-csum-offload`: checksums over IPv4 must be complete.
    pub no_csum_offload: bool,
    /// `feature-ipv6-csum-offload`: checksums over IPv6 may be blank.
    pub ipv6_csum_offload: bool,
    /// `request-multicast-control`: send only the multicast groups that the frontend has added.
    pub multicast_control: bool,
    /// `xdp-headroom`: headroom before each frame, in bytes; 0 for none.
    pub xdp_headroom: u32,
}

impl FrontRequest {
    /// Reads a frontend's request, and validates it against the offer. A single queue has its keys
    /// at the top level, several queues have theirs in `queue-<n>`.
    ///
    /// # Errors
    /// [`HandshakeError`] for values that are missing, malformed or used twice; for more queues,
    /// split event channels or a control ring than were advertised; if the frontend does not
    /// request copying.
    pub fn read<X: Xenstore + ?Sized>(
        xs: &mut X,
        base: &str,
        offer: &BackOffer,
    ) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            if !r.flag("request-rx-copy", false)? {
                let value = r.raw("request-rx-copy")?.unwrap_or_default();
                return Err(r.malformed(
                    "request-rx-copy",
                    &value,
                    "1, since only copies are served",
                ));
            }
            let queues = r.opt_u32("multi-queue-num-queues", 1, offer.queues())?.unwrap_or(1);
            let mut used = Used::default();
            let mut request = Self {
                queues: Vec::new(),
                ctrl: read_ctrl(&mut r, offer, &mut used)?,
                rx_notify: r.flag("feature-rx-notify", false)?,
                sg: r.flag("feature-sg", false)?,
                gso_tcpv4: r.flag("feature-gso-tcpv4", false)?,
                gso_tcpv6: r.flag("feature-gso-tcpv6", false)?,
                gso_tcpv4_prefix: r.flag("feature-gso-tcpv4-prefix", false)?,
                gso_tcpv6_prefix: r.flag("feature-gso-tcpv6-prefix", false)?,
                no_csum_offload: r.flag("feature-no-csum-offload", false)?,
                ipv6_csum_offload: r.flag("feature-ipv6-csum-offload", false)?,
                multicast_control: r.flag("request-multicast-control", false)?,
                xdp_headroom: r.opt_u32("xdp-headroom", 0, MAX_XDP_HEADROOM)?.unwrap_or(0),
            };
            for n in 0..queues {
                let dir =
                    if queues == 1 { String::from(base) } else { format!("{base}/queue-{n}") };
                let mut r = Reader { xs: &mut *r.xs, base: &dir };
                request.queues.push(read_queue(&mut r, offer, &mut used)?);
            }
            Ok(request)
        })
    }

    /// Writes the request, and removes keys of an earlier one.
    ///
    /// # Errors
    /// [`HandshakeError::Unwritable`] if there is no queue.
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        if self.queues.is_empty() {
            return Err(HandshakeError::Unwritable("no queue"));
        }
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            w.clear_all(|key| {
                let old_rings = [
                    "tx-ring-ref",
                    "rx-ring-ref",
                    "event-channel",
                    "event-channel-tx",
                    "event-channel-rx",
                ];
                is_numbered(key, "queue-")
                    || old_rings.contains(&key)
                    || key == "multi-queue-num-queues"
            })?;
            w.put("request-rx-copy", 1)?;
            w.flag("feature-rx-notify", self.rx_notify)?;
            w.flag("feature-sg", self.sg)?;
            w.flag("feature-gso-tcpv4", self.gso_tcpv4)?;
            w.flag("feature-gso-tcpv6", self.gso_tcpv6)?;
            w.flag("feature-gso-tcpv4-prefix", self.gso_tcpv4_prefix)?;
            w.flag("feature-gso-tcpv6-prefix", self.gso_tcpv6_prefix)?;
            w.flag("feature-no-csum-offload", self.no_csum_offload)?;
            w.flag("feature-ipv6-csum-offload", self.ipv6_csum_offload)?;
            w.flag("request-multicast-control", self.multicast_control)?;
            w.opt("ctrl-ring-ref", self.ctrl.map(|c| c.ring_ref))?;
            w.opt("event-channel-ctrl", self.ctrl.map(|c| c.event_channel))?;
            w.opt("xdp-headroom", Some(self.xdp_headroom).filter(|&h| h > 0))?;
            if let [queue] = self.queues.as_slice() {
                return write_queue(&mut w, *queue);
            }
            w.put("multi-queue-num-queues", self.queues.len())?;
            for (n, queue) in self.queues.iter().enumerate() {
                let dir = format!("{base}/queue-{n}");
                write_queue(&mut Writer { xs: &mut *w.xs, base: &dir }, *queue)?;
            }
            Ok(())
        })
    }
}

/// Returns the path of the key by which a connected frontend enables and disables its multicast
/// filter; to be watched if [`BackOffer::dynamic_multicast_control`] was advertised.
#[must_use]
pub fn multicast_request_path(frontend: &str) -> String {
    format!("{frontend}/request-multicast-control")
}

/// Reads the key that enables the multicast filter.
///
/// # Errors
/// An error of xenstore; the key is not a number.
pub fn read_multicast_request<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
) -> Result<bool, HandshakeError> {
    Reader { xs, base: frontend }.flag("request-multicast-control", false)
}

/// Writes the key that enables the multicast filter. A connected frontend may do that if
/// [`BackOffer::dynamic_multicast_control`] was advertised.
///
/// # Errors
/// An error of xenstore.
pub fn write_multicast_request<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
    chosen: bool,
) -> Result<(), HandshakeError> {
    Writer { xs, base: frontend }.flag("request-multicast-control", chosen)
}

/// Reads the headroom that a Reconfiguring frontend requests before received data, in bytes.
///
/// # Errors
/// An error of xenstore; the key is not a number, or more than Linux allows.
pub fn read_xdp_headroom<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
) -> Result<u32, HandshakeError> {
    let mut r = Reader { xs, base: frontend };
    Ok(r.opt_u32("xdp-headroom", 0, MAX_XDP_HEADROOM)?.unwrap_or(0))
}

/// Writes the requested headroom, before the frontend enters `Reconfiguring`.
///
/// # Errors
/// An error of xenstore.
pub fn write_xdp_headroom<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
    bytes: u32,
) -> Result<(), HandshakeError> {
    Writer { xs, base: frontend }.put("xdp-headroom", bytes)
}

#[derive(Default)]
struct Used {
    refs: BTreeSet<u32>,
    channels: BTreeSet<u32>,
}

fn read_ctrl<X: Xenstore + ?Sized>(
    r: &mut Reader<'_, X>,
    offer: &BackOffer,
    used: &mut Used,
) -> Result<Option<ControlRing>, HandshakeError> {
    let Some(ring_ref) = r.opt_u32("ctrl-ring-ref", 0, u32::MAX)? else {
        return Ok(None);
    };
    if !offer.ctrl_ring {
        return Err(HandshakeError::NotOffered { path: r.path("ctrl-ring-ref") });
    }
    used.refs.insert(ring_ref);
    let event_channel = r.need_u32("event-channel-ctrl", 1, u32::MAX)?;
    used.channels.insert(event_channel);
    Ok(Some(ControlRing { ring_ref, event_channel }))
}

fn read_queue<X: Xenstore + ?Sized>(
    r: &mut Reader<'_, X>,
    offer: &BackOffer,
    used: &mut Used,
) -> Result<Queue, HandshakeError> {
    let tx_ring_ref = once(r, "tx-ring-ref", 0, &mut used.refs)?;
    let rx_ring_ref = once(r, "rx-ring-ref", 0, &mut used.refs)?;
    let events = if r.raw("event-channel-tx")?.is_some() {
        if !offer.split_event_channels {
            return Err(HandshakeError::NotOffered { path: r.path("event-channel-tx") });
        }
        EventChannels::Split {
            tx: once(r, "event-channel-tx", 1, &mut used.channels)?,
            rx: once(r, "event-channel-rx", 1, &mut used.channels)?,
        }
    } else {
        EventChannels::Shared(once(r, "event-channel", 1, &mut used.channels)?)
    };
    Ok(Queue { tx_ring_ref, rx_ring_ref, events })
}

/// Reads a number that must not be used by another ring.
fn once<X: Xenstore + ?Sized>(
    r: &mut Reader<'_, X>,
    key: &str,
    min: u32,
    used: &mut BTreeSet<u32>,
) -> Result<u32, HandshakeError> {
    let value = r.need_u32(key, min, u32::MAX)?;
    if used.insert(value) {
        return Ok(value);
    }
    Err(HandshakeError::Duplicate { path: r.path(key), value: u64::from(value) })
}

fn write_queue<X: Xenstore + ?Sized>(
    w: &mut Writer<'_, X>,
    queue: Queue,
) -> Result<(), HandshakeError> {
    w.put("tx-ring-ref", queue.tx_ring_ref)?;
    w.put("rx-ring-ref", queue.rx_ring_ref)?;
    match queue.events {
        EventChannels::Shared(port) => w.put("event-channel", port),
        EventChannels::Split { tx, rx } => {
            w.put("event-channel-tx", tx)?;
            w.put("event-channel-rx", rx)
        }
    }
}
