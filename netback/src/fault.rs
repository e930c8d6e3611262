//! Reasons why a vif ends and why a packet is dropped. They follow the rules of Linux's netback.

use alloc::borrow::Cow;
use pvio_event_channel::EventError;
use pvio_grant_table::{GrantRef, GrantStatus};
use pvio_ring::RingFault;
use pvio_ring::error::Remedy;
use pvio_ring::inflight::RecordError;
use pvio_ring::proto::netif::ExtraFault;

/// Largest number of data slots of a packet that is forwarded: the first and 18 more
/// (`XEN_NETIF_NR_SLOTS_MIN` counts the slots after the first, as every Linux netback has interpreted
/// it).
pub const SLOTS_MAX: usize = 19;
/// Largest number of data slots of a packet that is dropped with an error. One more ends the vif
/// (Linux's `fatal_skb_slots`, 20 after the first).
pub const SLOTS_FATAL: usize = 21;

/// Protocol violation by the frontend that ends the vif. After it, the contents of the rings cannot be
/// trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// The transmit ring's producer index is out of range.
    #[error("the transmit ring is invalid")]
    TxRing(#[source] RingFault),
    /// The receive ring's producer index is out of range.
    #[error("the receive ring is invalid")]
    RxRing(#[source] RingFault),
    /// The control ring's producer index is out of range.
    #[error("the control ring is invalid")]
    CtrlRing(#[source] RingFault),
    /// A slot has `MORE_DATA` set, but the next slot was not produced.
    #[error("a packet continues beyond the {have} slots that were produced")]
    MissingSlots {
        /// Number of data slots of the packet that were produced.
        have: usize,
    },
    /// The packet has more than [`SLOTS_FATAL`] slots.
    #[error("a packet has more than {SLOTS_FATAL} slots")]
    TooManySlots,
    /// A slot's data crosses the end of its page.
    #[error("a slot of {size} bytes at offset {offset} crosses its page")]
    CrossesPage {
        /// Offset of the data in the page, in bytes.
        offset: u16,
        /// Its size in bytes.
        size: u16,
    },
    /// An extra segment was announced and not produced.
    #[error("an extra segment that was announced is missing")]
    MissingExtra,
    /// An extra segment is malformed.
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

    /// Returns the index of the code in [`CODES`](Self::CODES).
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

/// Reason why a queue cannot continue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QueueError {
    /// Protocol violation by the frontend.
    #[error("the frontend violated the protocol")]
    Fault(#[from] Fault),
    /// The event channel to the frontend failed.
    #[error("the frontend's event channel failed")]
    Event(#[from] EventError),
}

impl Remedy for QueueError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Event(error) => error.remedy().map(Cow::Borrowed),
            Self::Fault(_) => None,
        }
    }
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

/// Reason why a queue could not be attached to the rings and channels that the frontend advertised.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttachError {
    /// A ring's page cannot be mapped.
    #[error("the {ring} ring cannot be mapped")]
    Map {
        /// Name of the ring.
        ring: &'static str,
        /// Status from the hypervisor.
        #[source]
        status: GrantStatus,
    },
    /// The ring's page does not hold a valid ring state.
    #[error("the {ring} ring cannot be used")]
    Ring {
        /// Name of the ring.
        ring: &'static str,
        /// Defect of the ring.
        #[source]
        fault: RingFault,
    },
    /// The in-flight record of a resumed session does not fit its ring.
    #[error("the {ring} ring cannot be resumed")]
    Record {
        /// Name of the ring.
        ring: &'static str,
        /// Defect of the record.
        #[source]
        error: RecordError,
    },
    /// A page that the guest staged cannot be mapped again for the resumed session.
    #[error("the staged page {} cannot be mapped for the resumed session", .gref.0)]
    Staged {
        /// Grant reference of the page.
        gref: GrantRef,
    },
    /// The frontend's event channel cannot be bound.
    #[error("the frontend's event channel cannot be bound")]
    Event(#[from] EventError),
}

impl Remedy for AttachError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Event(error) => error.remedy().map(Cow::Borrowed),
            Self::Map { .. } | Self::Ring { .. } | Self::Record { .. } | Self::Staged { .. } => {
                None
            }
        }
    }
}

impl AttachError {
    /// Returns the error for a record that has no section for `ring`.
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
        /// Reason why a packet was dropped. Each reason has its own counter
        /// ([`crate::Stats::dropped`]).
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
    /// From the guest: a slot larger than the remaining bytes of the packet (a frame of 64 KiB or more
    /// whose total size wrapped).
    TxSlotBeyondPacket = "tx-slot-beyond-packet",
    /// From the guest: shorter than an Ethernet header.
    TxShort = "tx-short",
    /// From the guest: a page could not be copied.
    TxCopy = "tx-copy",
    /// From the guest: a blank checksum in a packet that has no checksum field to complete.
    TxChecksum = "tx-checksum",
    /// From the guest: segmentation that was not negotiated, or of a protocol other than TCP.
    TxGso = "tx-gso",
    /// From the guest: a segment size below [`SEGMENT_MIN`](crate::queue::SEGMENT_MIN).
    TxGsoSmall = "tx-gso-small",
    /// From the guest: a multicast control request, which was not offered.
    TxMulticast = "tx-multicast",
    /// From the guest: a multicast group that exceeds the limit of a vif.
    TxGroups = "tx-groups",
    /// From the guest: the port rejected or lost the packet.
    TxPort = "tx-port",
    /// From the guest: the source MAC address is not the vif's.
    TxSpoofMac = "tx-spoof-mac",
    /// From the guest: ARP that is malformed, or whose sender is another station.
    TxSpoofArp = "tx-spoof-arp",
    /// From the guest: the source IP address is not the vif's.
    TxSpoofIp = "tx-spoof-ip",
    /// From the guest: neighbour discovery that is malformed, or whose sender is another station.
    TxSpoofNeighbour = "tx-spoof-neighbour",
    /// From the guest: neither ARP nor IP, while a filter allows only the vif's IP addresses.
    TxSpoofProtocol = "tx-spoof-protocol",
    /// From the guest: dropped by fault injection.
    TxFault = "tx-fault",
    /// From the guest: in flight when two backend processes ended.
    TxDeaths = "tx-deaths",
    /// To the guest: a buffer that was in use when two backend processes ended.
    RxDeaths = "rx-deaths",
    /// To the guest, from a switch: the switch's limit of packets for this guest is reached.
    RxSwitch = "rx-switch",
    /// To the guest: dropped by fault injection.
    RxFault = "rx-fault",
    /// To the guest: the port could not read the packet. One failed read does not make the port
    /// unusable.
    RxPort = "rx-port",
    /// To the guest: shorter than an Ethernet header.
    RxShort = "rx-short",
    /// To the guest: sent to a multicast group that the guest did not request.
    RxGroup = "rx-group",
    /// To the guest: larger than a page, and the guest did not negotiate `feature-sg`.
    RxTooBig = "rx-too-big",
    /// To the guest: needs segmentation, and the guest did not negotiate GSO.
    RxGso = "rx-gso",
    /// To the guest: the guest posts no buffers, and the limit of waiting packets is reached.
    RxNoBuffers = "rx-no-buffers",
    /// To the guest: steered to a queue where the guest posts no buffers and whose limit of waiting
    /// packets is reached.
    RxSteered = "rx-steered",
    /// To the guest: a page could not be copied.
    RxCopy = "rx-copy",
    /// To the guest: a checksum to be completed is outside the packet.
    RxChecksum = "rx-checksum",
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let ring = "tx";
        let fault = RingFault::Geometry { bytes: 1, slot_size: 2 };
        let none = without_remedy(&[
            &QueueError::Fault(Fault::TooManySlots),
            &QueueError::Event(EventError::NoPorts),
            &AttachError::Map { ring, status: GrantStatus::BadPage },
            &AttachError::Ring { ring, fault },
            &AttachError::Record { ring, error: RecordError::Gap },
            &AttachError::Staged { gref: GrantRef(1) },
            &AttachError::Event(EventError::NoPorts),
        ]);
        assert_eq!(none, ["Fault", "Map", "Ring", "Record", "Staged"]);
    }
}
