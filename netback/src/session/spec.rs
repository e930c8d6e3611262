//! Description of a session, as validated from what the frontend advertises.

use crate::queue::{ControlRefs, EventPorts, Features, Policy, QueueRefs, SessionRefs};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use pvio_event_channel::Port;
use pvio_grant_table::GrantRef;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{
    EventChannels, FrontRequest, Negotiated, Queue as QueueKeys, VifRate,
};

/// Everything that a [`Session`](super::Session) needs to know of a frontend: plain values, which
/// may be sent to another process.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SessionSpec {
    /// Address of the device.
    pub addr: DeviceAddr,
    /// Rings and event channels of each queue, at least one.
    pub queues: Vec<QueueRefs>,
    /// The control ring, if it was negotiated.
    pub control: Option<ControlRefs>,
    /// Negotiated features.
    pub negotiated: Negotiated,
    /// How the guest's pages are accessed.
    pub policy: Policy,
    /// Headroom before each frame to the guest in bytes, which may
    /// [change](super::Session::set_headroom).
    pub headroom: u16,
    /// Limit of the guest's transmit rate, which may [change](super::Session::set_rate).
    pub rate: Option<VifRate>,
    /// Whether the guest receives only the multicast groups that it selected, which may
    /// [change](super::Session::filter_groups).
    pub filter_groups: bool,
}

impl SessionSpec {
    /// Returns the description of the session that a frontend requests, with the negotiated
    /// headroom and multicast filter, and no rate limit.
    #[must_use]
    pub fn new(
        addr: DeviceAddr,
        request: &FrontRequest,
        negotiated: &Negotiated,
        policy: Policy,
    ) -> Self {
        let control = request.ctrl.filter(|_| negotiated.ctrl_ring);
        let control = control.map(|keys| ControlRefs {
            ring: GrantRef(keys.ring_ref),
            event: Port(keys.event_channel),
        });
        Self {
            addr,
            queues: request.queues.iter().map(queue_refs).collect(),
            control,
            negotiated: negotiated.clone(),
            policy,
            headroom: u16::try_from(negotiated.xdp_headroom).unwrap_or(u16::MAX),
            rate: None,
            filter_groups: negotiated.multicast_control,
        }
    }

    /// Returns the identity of the session, from which the key of its in-flight record is computed.
    #[must_use]
    pub fn refs(&self) -> SessionRefs<'_> {
        let Self { addr, queues, control, .. } = self;
        SessionRefs { peer: addr.front, device: addr.index, queues, control: *control }
    }

    /// Returns the size of the in-flight record in bytes.
    #[must_use]
    pub fn record_len(&self) -> usize {
        self.refs().record_len()
    }

    /// Returns the negotiated features that a queue needs.
    #[must_use]
    pub fn features(&self) -> Features {
        let Negotiated { to_front, to_back, .. } = &self.negotiated;
        Features {
            sg: to_front.sg,
            checksum_v4: to_front.csum_v4,
            checksum_v6: to_front.csum_v6,
            gso_v4: to_front.gso_v4,
            gso_v6: to_front.gso_v6,
            gso_prefix_v4: self.negotiated.gso_prefix_v4,
            gso_prefix_v6: self.negotiated.gso_prefix_v6,
            sends_gso_v4: to_back.gso_v4,
            sends_gso_v6: to_back.gso_v6,
            names_groups: true,
            rx_notify: self.negotiated.rx_notify,
        }
    }

    /// Returns the configuration that the port of the vif needs.
    #[must_use]
    pub fn config(&self) -> SessionConfig {
        SessionConfig { queues: self.queues.len(), features: self.features() }
    }
}

/// Configuration of a guest's session, from connect to disconnect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SessionConfig {
    /// Number of queues.
    pub queues: usize,
    /// Negotiated features.
    pub features: Features,
}

/// Returns the name of a device's in-flight record.
#[must_use]
pub fn record_name(addr: DeviceAddr) -> String {
    format!("{}-{}-{}", addr.kind.as_str(), addr.front, addr.index)
}

fn queue_refs(keys: &QueueKeys) -> QueueRefs {
    QueueRefs {
        tx_ring: GrantRef(keys.tx_ring_ref),
        rx_ring: GrantRef(keys.rx_ring_ref),
        events: match keys.events {
            EventChannels::Shared(port) => EventPorts::Shared(Port(port)),
            EventChannels::Split { tx, rx } => EventPorts::Split { tx: Port(tx), rx: Port(rx) },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_grant_table::DomId;
    use pvio_xenbus::handshake::common::BackendKind;
    use pvio_xenbus::handshake::vif::{BackOffer, ControlRing};

    fn spec(request: &FrontRequest) -> SessionSpec {
        let addr = DeviceAddr::new(BackendKind::Vif, DomId(1), DomId(7), 3);
        let offer = BackOffer { ctrl_ring: true, xdp_headroom: true, ..BackOffer::default() };
        SessionSpec::new(addr, request, &Negotiated::new(&offer, request), Policy::Map)
    }

    fn request() -> FrontRequest {
        let events = [EventChannels::Shared(11), EventChannels::Split { tx: 12, rx: 13 }];
        let queue = |(n, events)| QueueKeys { tx_ring_ref: n, rx_ring_ref: n + 100, events };
        FrontRequest {
            queues: (8..).zip(events).map(queue).collect(),
            ctrl: Some(ControlRing { ring_ref: 55, event_channel: 66 }),
            xdp_headroom: 256,
            ..FrontRequest::default()
        }
    }

    #[test]
    fn session_spec_has_rings_and_initial_values_of_request() {
        let spec = spec(&request());
        let refs =
            |n, events| QueueRefs { tx_ring: GrantRef(n), rx_ring: GrantRef(n + 100), events };
        let split = EventPorts::Split { tx: Port(12), rx: Port(13) };
        assert_eq!(spec.queues, [refs(8, EventPorts::Shared(Port(11))), refs(9, split)]);
        assert_eq!(spec.control, Some(ControlRefs { ring: GrantRef(55), event: Port(66) }));
        assert_eq!((spec.headroom, spec.rate, spec.filter_groups), (256, None, false));
        assert_eq!(record_name(spec.addr), "vif-7-3");
        // The record belongs to this request only.
        let mut other = spec.clone();
        other.control = None;
        assert!(other.record_len() < spec.record_len());
    }

    #[cfg(feature = "serde")]
    #[test]
    fn session_spec_sent_as_json_arrives_unchanged() {
        let mut spec = spec(&request());
        for rate in [None, Some(VifRate { bytes: u64::MAX, usec: 50_000 })] {
            spec.rate = rate;
            let text = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<SessionSpec>(&text).unwrap(), spec, "{text}");
        }
        let text = serde_json::to_string(&spec).unwrap();
        let bad = text.replace("\"Map\"", "\"Cached\"");
        assert!(serde_json::from_str::<SessionSpec>(&bad).is_err(), "{bad}");
    }
}
