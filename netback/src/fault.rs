//! Why a vif ends, and why a packet is dropped: the rules of Linux's netback, each with its name.

use pvio_event_channel::EventError;
use pvio_grant_table::{GrantRef, GrantStatus};
use pvio_ring::RingFault;
use pvio_ring::inflight::RecordError;
use pvio_ring::proto::netif::ExtraFault;

/// Data slots of one packet that are carried: the first and 18 more (`XEN_NETIF_NR_SLOTS_MIN`
/// counts the slots after the first, as every Linux netback has read it).
pub const SLOTS_MAX: usize = 19;
/// Data slots of one packet that are dropped with an error; one more ends the vif
/// (Linux's `fatal_skb_slots`, 20 after the first).
pub const SLOTS_FATAL: usize = 21;

/// The frontend did what no honest frontend does: the vif ends. Nothing it has in its rings can be
/// believed afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// The transmit ring's producer is impossible.
    #[error("transmit ring: {0}")]
    TxRing(RingFault),
    /// The receive ring's producer is impossible.
    #[error("receive ring: {0}")]
    RxRing(RingFault),
    /// The control ring's producer is impossible.
    #[error("control ring: {0}")]
    CtrlRing(RingFault),
    /// A slot announces another that was not produced.
    #[error("a packet goes on beyond the {have} slots produced")]
    MissingSlots {
        /// Data slots of the packet that are there.
        have: usize,
    },
    /// More slots than even a buggy frontend sends.
    #[error("a packet of more than {SLOTS_FATAL} slots")]
    TooManySlots,
    /// A slot's data does not lie in its page.
    #[error("a slot of {size} bytes at offset {offset} crosses its page")]
    CrossesPage {
        /// Where in the page it begins.
        offset: u16,
        /// Its size in bytes.
        size: u16,
    },
    /// An extra segment was announced and not produced.
    #[error("an announced extra segment is missing")]
    MissingExtra,
    /// An extra segment means nothing.
    #[error(transparent)]
    Extra(#[from] ExtraFault),
}

impl Fault {
    /// Every [code](Self::code).
    pub const CODES: &[&str] = &[
        "tx-ring-producer-overflow",
        "rx-ring-producer-overflow",
        "ctrl-ring-producer-overflow",
        "tx-slots-missing",
        "tx-slots-fatal",
        "tx-slot-crosses-page",
        "tx-extra-missing",
        "tx-extra-type",
        "tx-gso-size",
        "tx-gso-type",
    ];

    /// Where its code stands among all.
    pub(crate) fn number(&self) -> usize {
        Self::CODES.iter().position(|code| *code == self.code()).unwrap_or(usize::MAX)
    }

    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TxRing(_) => "tx-ring-producer-overflow",
            Self::RxRing(_) => "rx-ring-producer-overflow",
            Self::CtrlRing(_) => "ctrl-ring-producer-overflow",
            Self::MissingSlots { .. } => "tx-slots-missing",
            Self::TooManySlots => "tx-slots-fatal",
            Self::CrossesPage { .. } => "tx-slot-crosses-page",
            Self::MissingExtra => "tx-extra-missing",
            Self::Extra(ExtraFault::Type(_)) => "tx-extra-type",
            Self::Extra(ExtraFault::GsoSize) => "tx-gso-size",
            Self::Extra(ExtraFault::GsoType(_)) => "tx-gso-type",
        }
    }
}

/// Why a queue cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QueueError {
    /// The frontend's doing.
    #[error("the frontend broke the protocol: {0}")]
    Fault(#[from] Fault),
    /// The frontend cannot be woken.
    #[error("event channel: {0}")]
    Event(#[from] EventError),
}

impl QueueError {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Fault(fault) => fault.code(),
            Self::Event(error) => error.code(),
        }
    }
}

/// Why a queue could not be attached to what the frontend named.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttachError {
    /// A ring's page cannot be mapped.
    #[error("the {ring} ring cannot be mapped: {status}")]
    Map {
        /// Which ring.
        ring: &'static str,
        /// What the hypervisor said.
        status: GrantStatus,
    },
    /// A ring is not one, or is in an impossible state.
    #[error("the {ring} ring is unusable: {fault}")]
    Ring {
        /// Which ring.
        ring: &'static str,
        /// What is wrong with it.
        fault: RingFault,
    },
    /// The in-flight record of a resumed session does not fit its ring.
    #[error("the {ring} ring cannot be resumed: {error}")]
    Record {
        /// Which ring.
        ring: &'static str,
        /// What is wrong.
        error: RecordError,
    },
    /// A page that the guest has staged cannot be mapped again.
    #[error("page {} that the guest has staged cannot be mapped for the resumed session", .gref.0)]
    Staged {
        /// Its grant reference.
        gref: GrantRef,
    },
    /// The frontend's event channel cannot be bound.
    #[error("event channel: {0}")]
    Event(#[from] EventError),
}

impl AttachError {
    /// The record has no section for a ring.
    pub(crate) const fn no_section(ring: &'static str) -> Self {
        Self::Record { ring, error: RecordError::Size { found: 0, needed: 0 } }
    }

    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Map { status, .. } => status.code(),
            Self::Ring { fault, .. } => fault.reason(),
            Self::Record { error, .. } => error.code(),
            Self::Staged { .. } => "staged-page",
            Self::Event(error) => error.code(),
        }
    }
}

/// Declares the reasons with their codes and meanings in one table.
macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal,)+) => {
        /// Why one packet was dropped. Each is counted by itself ([`crate::Stats::dropped`]).
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(usize)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl DropReason {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// A short stable code for logs and counters.
            #[must_use]
            pub const fn code(self) -> &'static str {
                match self {
                    $(Self::$name => $code,)+
                }
            }
        }
    };
}

drop_reasons! {
    /// From the guest: more than [`SLOTS_MAX`] data slots.
    TxSlots = "tx-slots",
    /// From the guest: a slot larger than what is left of the packet (a frame of 64 KiB or more,
    /// whose total wrapped).
    TxSlotBeyondPacket = "tx-slot-beyond-packet",
    /// From the guest: shorter than an Ethernet header.
    TxShort = "tx-short",
    /// From the guest: a page could not be copied.
    TxCopy = "tx-copy",
    /// From the guest: a checksum was left blank where there is none to complete.
    TxChecksum = "tx-checksum",
    /// From the guest: segmentation it did not negotiate, or of something that is not TCP.
    TxGso = "tx-gso",
    /// From the guest: a segment size below [`SEGMENT_MIN`](crate::queue::SEGMENT_MIN).
    TxGsoSmall = "tx-gso-small",
    /// From the guest: multicast control it was not offered.
    TxMulticast = "tx-multicast",
    /// From the guest: one multicast group more than a vif has place for.
    TxGroups = "tx-groups",
    /// From the guest: the port refused or lost it.
    TxPort = "tx-port",
    /// From the guest: another MAC address than the vif's.
    TxSpoofMac = "tx-spoof-mac",
    /// From the guest: ARP that is malformed, or speaks for another station.
    TxSpoofArp = "tx-spoof-arp",
    /// From the guest: an IP address that is not the vif's.
    TxSpoofIp = "tx-spoof-ip",
    /// From the guest: neighbour discovery that is malformed, or speaks for another station.
    TxSpoofNeighbour = "tx-spoof-neighbour",
    /// From the guest: neither ARP nor IP, where only the vif's IP addresses are let through.
    TxSpoofProtocol = "tx-spoof-protocol",
    /// From the guest: lost on purpose.
    TxFault = "tx-fault",
    /// From the guest: two processes ended with it in flight.
    TxDeaths = "tx-deaths",
    /// To the guest: a buffer that was in use when two processes ended.
    RxDeaths = "rx-deaths",
    /// To the guest, from a switch: what it holds for the guest is all it may.
    RxSwitch = "rx-switch",
    /// To the guest: lost on purpose.
    RxFault = "rx-fault",
    /// To the guest: the port could not read it. One such reading is not the loss of the port.
    RxPort = "rx-port",
    /// To the guest: shorter than an Ethernet header.
    RxShort = "rx-short",
    /// To the guest: to a multicast group, and the guest chose others.
    RxGroup = "rx-group",
    /// To the guest: more than a page, and the guest does not take scattered packets.
    RxTooBig = "rx-too-big",
    /// To the guest: to be segmented, and the guest does not take such packets.
    RxGso = "rx-gso",
    /// To the guest: the guest posts no buffers, and what may wait for them does.
    RxNoBuffers = "rx-no-buffers",
    /// To the guest: steered to a queue whose share of waiting packets is used up, for the guest posts
    /// no buffers there.
    RxSteered = "rx-steered",
    /// To the guest: a page could not be copied.
    RxCopy = "rx-copy",
    /// To the guest: a checksum to be completed lies outside the packet.
    RxChecksum = "rx-checksum",
}
