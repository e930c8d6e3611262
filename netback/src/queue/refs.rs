//! Grant references and event channels that a frontend advertises.

use pvio_event_channel::Port;
use pvio_grant_table::GrantRef;

/// Grant references and event channels that a frontend advertises for one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct QueueRefs {
    /// `tx-ring-ref`.
    pub tx_ring: GrantRef,
    /// `rx-ring-ref`.
    pub rx_ring: GrantRef,
    /// `event-channel`, or the pair.
    pub events: EventPorts,
}

/// Grant reference and event channel that a frontend advertises for its control ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ControlRefs {
    /// `ctrl-ring-ref`.
    pub ring: GrantRef,
    /// `event-channel-ctrl`.
    pub event: Port,
}

/// Event channels for notifications to and from the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum EventPorts {
    /// One channel for both rings (`event-channel`).
    Shared(Port),
    /// One channel for each ring (`event-channel-tx`, `event-channel-rx`).
    Split {
        /// Channel of the transmit ring.
        tx: Port,
        /// Channel of the receive ring.
        rx: Port,
    },
}
