//! The request of an interface's frontend: rings, event channels, features.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::handshake::HandshakeError;
use crate::handshake::common::{NUM_QUEUES, Used, read_count, read_each, write_each};
use crate::handshake::encoding::{ANY, Between, FLAG};
use crate::handshake::fields::{Reader, Writer};
use crate::handshake::record::{Or, OrZero, Presence as _, Record as _, concat, record};
use crate::xenstore::{Xenstore, transaction};

use super::BackOffer;

/// Headroom that a frontend may request, in bytes: up to Linux's `XEN_NETIF_MAX_XDP_HEADROOM`.
/// (Linux's frontend requests 256.)
const HEADROOM: Between<u32> = Between(0, 0x7fff);

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

record! {
    /// The request of an interface's frontend, written before it enters `Connected` (4) or, in some
    /// implementations, `Initialised` (3). A feature here is one that the frontend can **receive
    /// from** the backend.
    ///
    /// `request-rx-copy` is not a field: it is required, because only copying is supported.
    #[derive(Clone, PartialEq, Eq, Debug, Default)]
    pub struct FrontRequest {
        /// `feature-rx-notify`: the frontend notifies the backend of new receive buffers.
        pub rx_notify: bool = "feature-rx-notify" => Or(FLAG, false),
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
        /// `feature-no-csum-offload`: checksums over IPv4 must be complete.
        pub no_csum_offload: bool = "feature-no-csum-offload" => Or(FLAG, false),
        /// `feature-ipv6-csum-offload`: checksums over IPv6 may be blank.
        pub ipv6_csum_offload: bool = "feature-ipv6-csum-offload" => Or(FLAG, false),
        /// `request-multicast-control`: send only the multicast groups that the frontend has added.
        pub multicast_control: bool = MULTICAST_CONTROL => Or(FLAG, false),
        /// `xdp-headroom`: headroom before each frame, in bytes; 0 for none.
        pub xdp_headroom: u32 = XDP_HEADROOM => OrZero(HEADROOM),
    }
    other keys(&concat::<10>(&[RX_COPY], RING_KEYS)) {
        /// The queues, at least one.
        pub queues: Vec<Queue>,
        /// The control ring, if there is one.
        pub ctrl: Option<ControlRing>,
    }
}

const RX_COPY: &str = "request-rx-copy";
const MULTICAST_CONTROL: &str = "request-multicast-control";
const XDP_HEADROOM: &str = "xdp-headroom";

/// Keys of the rings, which depend on the number of queues and event channels.
const RING_KEYS: &[&str] = &[
    NUM_QUEUES,
    "queue-%u",
    "tx-ring-ref",
    "rx-ring-ref",
    "event-channel",
    "event-channel-tx",
    "event-channel-rx",
    "ctrl-ring-ref",
    "event-channel-ctrl",
];

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
            if !r.flag(RX_COPY, false)? {
                let value = r.raw(RX_COPY)?.unwrap_or_default();
                return Err(r.malformed(RX_COPY, &value, "1, since only copies are served"));
            }
            let count = read_count(&mut r, offer.queues())?;
            let mut used = Used::default();
            let ctrl = read_ctrl(&mut r, offer, &mut used)?;
            let mut request = Self::read_keys(&mut r, Vec::new(), ctrl)?;
            request.queues = read_each(&mut r, count, |r| read_queue(r, offer, &mut used))?;
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
            w.clear_listed(RING_KEYS)?;
            w.put(RX_COPY, 1)?;
            self.write_keys(&mut w)?;
            if let Some(ctrl) = self.ctrl {
                w.put("ctrl-ring-ref", ctrl.ring_ref)?;
                w.put("event-channel-ctrl", ctrl.event_channel)?;
            }
            write_each(&mut w, &self.queues, write_queue)
        })
    }
}

/// Returns the path of the key by which a connected frontend enables and disables its multicast
/// filter; to be watched if [`BackOffer::dynamic_multicast_control`] was advertised.
#[must_use]
pub fn multicast_request_path(frontend: &str) -> String {
    format!("{frontend}/{MULTICAST_CONTROL}")
}

/// Reads the key that enables the multicast filter.
///
/// # Errors
/// An error of xenstore; the key is not a number.
pub fn read_multicast_request<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    frontend: &str,
) -> Result<bool, HandshakeError> {
    Reader { xs: &mut xs, base: frontend }.flag(MULTICAST_CONTROL, false)
}

/// Writes the key that enables the multicast filter. A connected frontend may do that if
/// [`BackOffer::dynamic_multicast_control`] was advertised.
///
/// # Errors
/// An error of xenstore.
pub fn write_multicast_request<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    frontend: &str,
    chosen: bool,
) -> Result<(), HandshakeError> {
    Writer { xs: &mut xs, base: frontend }.flag(MULTICAST_CONTROL, chosen)
}

/// Reads the headroom that a Reconfiguring frontend requests before received data, in bytes.
///
/// # Errors
/// An error of xenstore; the key is not a number, or more than Linux allows.
pub fn read_xdp_headroom<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    frontend: &str,
) -> Result<u32, HandshakeError> {
    OrZero(HEADROOM).read(&mut Reader { xs: &mut xs, base: frontend }, XDP_HEADROOM)
}

/// Writes the requested headroom, before the frontend enters `Reconfiguring`.
///
/// # Errors
/// An error of xenstore.
pub fn write_xdp_headroom<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    frontend: &str,
    bytes: u32,
) -> Result<(), HandshakeError> {
    Writer { xs: &mut xs, base: frontend }.put(XDP_HEADROOM, bytes)
}

fn read_ctrl(
    r: &mut Reader<'_>,
    offer: &BackOffer,
    used: &mut Used,
) -> Result<Option<ControlRing>, HandshakeError> {
    let Some(ring_ref) = r.get("ctrl-ring-ref", ANY)? else {
        return Ok(None);
    };
    if !offer.ctrl_ring {
        return Err(HandshakeError::NotOffered { path: r.path("ctrl-ring-ref") });
    }
    let ring_ref = used.add_ref(r, "ctrl-ring-ref", ring_ref)?;
    let event_channel = used.read_channel(r, "event-channel-ctrl")?;
    Ok(Some(ControlRing { ring_ref, event_channel }))
}

fn read_queue(
    r: &mut Reader<'_>,
    offer: &BackOffer,
    used: &mut Used,
) -> Result<Queue, HandshakeError> {
    let tx_ring_ref = used.read_ref(r, "tx-ring-ref")?;
    let rx_ring_ref = used.read_ref(r, "rx-ring-ref")?;
    let events = if r.raw("event-channel-tx")?.is_some() {
        if !offer.split_event_channels {
            return Err(HandshakeError::NotOffered { path: r.path("event-channel-tx") });
        }
        EventChannels::Split {
            tx: used.read_channel(r, "event-channel-tx")?,
            rx: used.read_channel(r, "event-channel-rx")?,
        }
    } else {
        EventChannels::Shared(used.read_channel(r, "event-channel")?)
    };
    Ok(Queue { tx_ring_ref, rx_ring_ref, events })
}

fn write_queue(w: &mut Writer<'_>, queue: &Queue) -> Result<(), HandshakeError> {
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
