//! What a backend may have done that it must not. A backend is trusted no more than a guest.

use pvio_event_channel::EventError;
use pvio_grant_table::GrantError;
use pvio_ring::RingFault;
use pvio_ring::proto::netif::ExtraFault;

/// What the backend did that it must not, or that it cannot be reached. The device is finished;
/// the guest is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackendFault {
    /// The transmit ring cannot be believed any more.
    #[error("transmit ring: {0}")]
    TxRing(RingFault),
    /// The receive ring cannot be believed any more.
    #[error("receive ring: {0}")]
    RxRing(RingFault),
    /// It answered a transmit request that is not in flight.
    #[error("the backend answered transmit request {0}, which is not in flight")]
    TxId(u16),
    /// It answered a receive request with another's number.
    #[error("the backend answered receive request {expected} as {got}")]
    RxId {
        /// The request in whose slot the answer stands.
        expected: u16,
        /// What the answer says.
        got: u16,
    },
    /// Received data would not lie in its page.
    #[error("the backend says that {size} bytes lie at offset {offset} of a page")]
    RxCrossesPage {
        /// Where they begin.
        offset: u16,
        /// How many they are.
        size: u16,
    },
    /// A packet whose first slot does not even hold an Ethernet header (XSA-522).
    #[error("the backend sent a packet whose first slot holds {0} bytes")]
    RxShort(u16),
    /// A packet larger than any (65,535 bytes of IP, an Ethernet header and a VLAN tag).
    #[error("the backend sent a packet of more than 65553 bytes")]
    RxTooLong,
    /// A packet of more slots than the largest needs.
    #[error("the backend sent a packet of too many slots")]
    RxSlots,
    /// An extra segment that means nothing.
    #[error(transparent)]
    RxExtra(#[from] ExtraFault),
    /// A packet still to be segmented, which was never asked for.
    #[error("the backend sent an unsegmented packet that was not asked for")]
    RxGso,
    /// Room before received data that was not asked for, is not there, or is told of twice.
    #[error("the backend says that {headroom} bytes are free before data at offset {offset}")]
    RxHeadroom {
        /// How much room.
        headroom: u16,
        /// Where the data begin, by the first slot.
        offset: u16,
    },
    /// The control ring cannot be believed any more.
    #[error("control ring: {0}")]
    CtrlRing(RingFault),
    /// It answered a control request that it was not asked.
    #[error("the backend answered control request {id} of type {kind}, which it was not asked")]
    CtrlAnswer {
        /// The request's number, by its word.
        id: u16,
        /// The request's type, by its word.
        kind: u16,
    },
    /// The event channel failed.
    #[error("event channel: {0}")]
    Event(#[from] EventError),
}

impl BackendFault {
    /// A short stable code for logs, counters and `error` nodes.
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
    /// No room just now. Back-pressure: [`crate::Queue::final_check`] asks to be woken when there
    /// is some.
    #[error("no room to send just now")]
    Full,
    /// Shorter than an Ethernet header, or longer than the backend takes.
    #[error("a packet of {0} bytes cannot be sent here")]
    Size(usize),
    /// Its checksum was left blank, and the backend does not complete it for such packets.
    #[error("the backend does not complete checksums of such packets")]
    Checksum,
    /// It was to be segmented, and the backend does not do that for such packets.
    #[error("the backend does not segment such packets")]
    Gso,
    /// The device is finished.
    #[error(transparent)]
    Fault(#[from] BackendFault),
}

/// Why a queue could not be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SetupError {
    /// No memory or no grants.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// No event channel.
    #[error(transparent)]
    Event(#[from] EventError),
    /// No ring of that size.
    #[error(transparent)]
    Ring(#[from] RingFault),
}
