//! Protocol violations by a backend. A backend is trusted no more than a guest.

use alloc::borrow::Cow;
use pvio_event_channel::EventError;
use pvio_grant_table::GrantError;
use pvio_ring::RingFault;
use pvio_ring::error::Remedy;
use pvio_ring::proto::netif::ExtraFault;

/// A protocol violation by the backend, or a failure to reach it. The device is unusable; the guest
/// is not affected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackendFault {
    /// Invalid indices in the transmit ring.
    #[error("the transmit ring is invalid")]
    TxRing(#[source] RingFault),
    /// Invalid indices in the receive ring.
    #[error("the receive ring is invalid")]
    RxRing(#[source] RingFault),
    /// A response to a transmit request that is not in flight.
    #[error("the backend answered transmit request {0}, which is not in flight")]
    TxId(u16),
    /// A response to a receive request with the id of another request.
    #[error("the backend answered receive request {expected} as {got}")]
    RxId {
        /// Id of the request in whose slot the response was written.
        expected: u16,
        /// Id in the response.
        got: u16,
    },
    /// Received data that crosses the end of its page.
    #[error(
        "invalid response of the backend: {size} bytes at offset {offset} cross the end of a page"
    )]
    RxCrossesPage {
        /// Offset of the data in the page.
        offset: u16,
        /// Length of the data, in bytes.
        size: u16,
    },
    /// A packet whose first slot is shorter than an Ethernet header (XSA-522).
    #[error("the backend sent a packet whose first slot holds {0} bytes")]
    RxShort(u16),
    /// A packet larger than the maximum (65,535 bytes of IP, an Ethernet header and a VLAN tag).
    #[error("the backend sent a packet of more than 65553 bytes")]
    RxTooLong,
    /// A packet of more slots than the largest packet needs.
    #[error("the backend sent a packet of too many slots")]
    RxSlots,
    /// A malformed extra segment.
    #[error(transparent)]
    RxExtra(#[from] ExtraFault),
    /// A GSO packet, although GSO was not negotiated.
    #[error("the backend sent an unsegmented packet that was not asked for")]
    RxGso,
    /// Headroom before received data that was not requested, does not fit, or is reported twice.
    #[error(
        "invalid response of the backend: headroom of {headroom} bytes before data at offset {offset}"
    )]
    RxHeadroom {
        /// Reported headroom, in bytes.
        headroom: u16,
        /// Offset of the data in the first slot's page.
        offset: u16,
    },
    /// Invalid indices in the control ring.
    #[error("the control ring is invalid")]
    CtrlRing(#[source] RingFault),
    /// A response to a control request that is not outstanding.
    #[error("the backend answered control request {id} of type {kind}, which it was not asked")]
    CtrlAnswer {
        /// Id in the response.
        id: u16,
        /// Request type in the response.
        kind: u16,
    },
    /// The event channel failed.
    #[error("the backend cannot be notified")]
    Event(#[from] EventError),
}

impl BackendFault {
    /// Returns a short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TxRing(_) => "tx-ring-producer-overflow",
            Self::RxRing(_) => "rx-ring-producer-overflow",
            Self::TxId(_) => "tx-unknown-id",
            Self::RxId { .. } => "rx-wrong-id",
            Self::RxCrossesPage { .. } => "rx-crosses-page",
            Self::RxShort(_) => "rx-short-first-slot",
            Self::RxTooLong => "rx-too-long",
            Self::RxSlots => "rx-slots",
            Self::RxExtra(_) => "rx-extra",
            Self::RxGso => "rx-gso",
            Self::RxHeadroom { .. } => "rx-headroom",
            Self::CtrlRing(_) => "ctrl-ring-producer-overflow",
            Self::CtrlAnswer { .. } => "ctrl-wrong-answer",
            Self::Event(error) => error.code(),
        }
    }
}

/// Why a packet was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// The ring or the page pool is full. Back-pressure: [`crate::Queue::final_check`] arms a
    /// notification for free slots.
    #[error("no room to send just now")]
    Full,
    /// Shorter than an Ethernet header, or longer than the backend supports.
    #[error("a packet of {0} bytes cannot be sent here")]
    Size(usize),
    /// The checksum is blank, and the backend did not negotiate checksum offload for such packets.
    #[error("the backend does not complete checksums of such packets")]
    Checksum,
    /// GSO was requested, and the backend did not negotiate it for such packets.
    #[error("the backend does not segment such packets")]
    Gso,
    /// The device has failed.
    #[error(transparent)]
    Fault(#[from] BackendFault),
}

/// Why a queue could not be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SetupError {
    /// Out of memory or grants.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// No event channel is available.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The ring cannot have that size.
    #[error(transparent)]
    Ring(#[from] RingFault),
}

impl Remedy for BackendFault {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        // A backend that violates the protocol: nothing for the guest's operator.
        None
    }
}

impl Remedy for SetupError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        let remedy = match self {
            Self::Grant(error) => error.remedy(),
            Self::Event(error) => error.remedy(),
            Self::Ring(_) => None,
        };
        remedy.map(Cow::Borrowed)
    }
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let fault = RingFault::Geometry { bytes: 1, slot_size: 2 };
        let none = without_remedy(&[
            &BackendFault::TxRing(fault),
            &BackendFault::CtrlAnswer { id: 1, kind: 2 },
            &SetupError::Grant(GrantError::OutOfEntries),
            &SetupError::Event(EventError::NoPorts),
            &SetupError::Ring(fault),
        ]);
        assert_eq!(none, ["TxRing", "CtrlAnswer", "Ring"]);
    }
}
