//! Virtual NICs (`io/netif.h`): transmit and receive rings, their extra segments, the control ring,
//! and the hash that is configured over it.
//!
//! "Transmit" (tx) is guest to backend, "receive" (rx) is backend to guest, as in the header.

mod ctrl;
mod layout;
mod toeplitz;

pub use ctrl::{
    CTRL_RESPONSE_SIZE, CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus,
    GREF_ENTRIES_MAX, GREF_ENTRY_SIZE, GrefEntry, GrefList, HASH_NONE, HASH_TOEPLITZ, HashTypes,
    ctrl_type,
};
pub use toeplitz::{HASH_KEY_MAX, HashKind, hash_frame, toeplitz};

use crate::gref::GrantRef;
use crate::shm::slot::{ShortSlot, Slot};
use bitflags::bitflags;
use layout::{
    RawExtra, RawGso, RawHash, RawRxRequest, RawRxResponse, RawTxRequest, RawTxResponse, RawXdp,
    extra_type,
};
use zerocopy::little_endian::{U16, U32};
use zerocopy::transmute;

/// Size of a transmit slot, in bytes (`netif_tx_request`; extra segments fit in it).
pub const TX_SLOT_SIZE: usize = size_of::<RawTxRequest>();
/// Size of a transmit response, in bytes.
pub const TX_RESPONSE_SIZE: usize = size_of::<RawTxResponse>();
/// Size of a receive slot, in bytes (`netif_rx_request` / `netif_rx_response`).
pub const RX_SLOT_SIZE: usize = size_of::<RawRxRequest>();
/// Number of slots of one packet that every backend must accept (`XEN_NETIF_NR_SLOTS_MIN`).
pub const SLOTS_MIN: usize = 18;
/// Size of the largest packet, in bytes.
pub const MAX_PACKET: usize = 65535;

bitflags! {
    /// Flags of a transmit request (`NETTXF_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct TxFlags: u16 {
        /// The transport checksum field holds only the sum of the pseudo-header; the receiver must
        /// complete it.
        const CSUM_BLANK = 1;
        /// The data was verified when it was received.
        const DATA_VALIDATED = 2;
        /// The packet continues in the next slot.
        const MORE_DATA = 4;
        /// The next slot is an extra segment.
        const EXTRA_INFO = 8;
    }

    /// Flags of a receive response (`NETRXF_*`). Bits 0 and 1 are swapped compared with
    /// [`TxFlags`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct RxFlags: u16 {
        /// The data was verified, or never left this machine.
        const DATA_VALIDATED = 1;
        /// The transport checksum field holds only the sum of the pseudo-header.
        const CSUM_BLANK = 2;
        /// The packet continues in the next slot.
        const MORE_DATA = 4;
        /// The next slot is an extra segment.
        const EXTRA_INFO = 8;
        /// The next slot is a GSO prefix (old form).
        const GSO_PREFIX = 16;
    }
}

/// Status of a response (`NETIF_RSP_*`), if it is not a byte count.
pub mod rsp {
    #![expect(missing_docs, reason = "each is the header's constant of the same name")]
    pub const DROPPED: i16 = -2;
    pub const ERROR: i16 = -1;
    pub const OKAY: i16 = 0;
    /// The response to an extra segment; it has no meaning.
    pub const NULL: i16 = 1;
}

/// A transmit request (`netif_tx_request_t`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TxRequest {
    /// The page with the data.
    pub gref: GrantRef,
    /// Offset of the data in the page, in bytes.
    pub offset: u16,
    /// Flags; undefined bits are dropped.
    pub flags: TxFlags,
    /// Returned in the response.
    pub id: u16,
    /// Size in bytes: **of the whole packet in its first slot**, of the slot itself in every later
    /// one.
    pub size: u16,
}

impl TxRequest {
    /// Reads the request from its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`TX_SLOT_SIZE`].
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let raw: RawTxRequest = transmute!(slot.read_array::<TX_SLOT_SIZE>()?);
        Ok(Self {
            gref: GrantRef(raw.gref.get()),
            offset: raw.offset.get(),
            flags: TxFlags::from_bits_truncate(raw.flags.get()),
            id: raw.id.get(),
            size: raw.size.get(),
        })
    }

    /// Returns the request as encoded on the wire.
    #[inline]
    #[must_use]
    pub fn to_bytes(self) -> [u8; TX_SLOT_SIZE] {
        transmute!(RawTxRequest {
            gref: self.gref.0.into(),
            offset: self.offset.into(),
            flags: self.flags.bits().into(),
            id: self.id.into(),
            size: self.size.into(),
        })
    }
}

/// A transmit response (`netif_tx_response_t`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TxResponse {
    /// The request's id.
    pub id: u16,
    /// One of [`rsp`].
    pub status: i16,
}

impl TxResponse {
    /// Reads the response from its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`TX_SLOT_SIZE`].
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let raw: RawTxResponse = transmute!(slot.read_array::<TX_RESPONSE_SIZE>()?);
        Ok(Self { id: raw.id.get(), status: raw.status.get() })
    }

    /// Returns the response as encoded on the wire.
    #[inline]
    #[must_use]
    pub fn to_bytes(self) -> [u8; TX_RESPONSE_SIZE] {
        transmute!(RawTxResponse { id: self.id.into(), status: self.status.into() })
    }
}

/// A receive request (`netif_rx_request_t`): a page for the backend to fill.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RxRequest {
    /// Returned in the response.
    pub id: u16,
    /// The page.
    pub gref: GrantRef,
}

impl RxRequest {
    /// Reads the request from its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`RX_SLOT_SIZE`].
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let raw: RawRxRequest = transmute!(slot.read_array::<RX_SLOT_SIZE>()?);
        Ok(Self { id: raw.id.get(), gref: GrantRef(raw.gref.get()) })
    }

    /// Returns the request as encoded on the wire.
    #[inline]
    #[must_use]
    pub fn to_bytes(self) -> [u8; RX_SLOT_SIZE] {
        let (id, gref) = (self.id.into(), self.gref.0.into());
        transmute!(RawRxRequest { id, pad: U16::ZERO, gref })
    }
}

/// A receive response (`netif_rx_response_t`). It is in the slot of the request that it completes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RxResponse {
    /// The request's id.
    pub id: u16,
    /// Offset of the data in the page, in bytes.
    pub offset: u16,
    /// Flags; undefined bits are dropped.
    pub flags: RxFlags,
    /// Bytes in this slot, or (negative) one of [`rsp`].
    pub status: i16,
}

impl RxResponse {
    /// Reads the response from its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`RX_SLOT_SIZE`].
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let raw: RawRxResponse = transmute!(slot.read_array::<RX_SLOT_SIZE>()?);
        Ok(Self {
            id: raw.id.get(),
            offset: raw.offset.get(),
            flags: RxFlags::from_bits_truncate(raw.flags.get()),
            status: raw.status.get(),
        })
    }

    /// Returns the response as encoded on the wire.
    #[inline]
    #[must_use]
    pub fn to_bytes(self) -> [u8; RX_SLOT_SIZE] {
        transmute!(RawRxResponse {
            id: self.id.into(),
            offset: self.offset.into(),
            flags: self.flags.bits().into(),
            status: self.status.into(),
        })
    }
}

/// An extra segment (`netif_extra_info_t`): 8 bytes after a packet's first slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extra {
    /// The contents.
    pub kind: ExtraKind,
    /// Whether another extra segment follows (`XEN_NETIF_EXTRA_FLAG_MORE`).
    pub more: bool,
}

/// Contents of an extra segment (`XEN_NETIF_EXTRA_TYPE_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtraKind {
    /// Segmentation offload: the packet is to be divided into segments of `size` bytes of payload.
    Gso {
        /// Bytes of payload per segment (MSS).
        size: u16,
        /// Protocols of the packet.
        kind: GsoKind,
    },
    /// Adds a multicast address to the filter.
    McastAdd([u8; 6]),
    /// Removes a multicast address from the filter.
    McastDel([u8; 6]),
    /// The packet's hash.
    Hash {
        /// Which fields were hashed: a [`HashKind`], or an undefined value from a faulty peer.
        kind: u8,
        /// The algorithm (`XEN_NETIF_CTRL_HASH_ALGORITHM_*`).
        algorithm: u8,
        /// The hash.
        value: u32,
    },
    /// Headroom before the data (`XEN_NETIF_EXTRA_TYPE_XDP`, which Linux added; Xen's header does
    /// not define it).
    Xdp {
        /// The headroom, in bytes.
        headroom: u16,
    },
}

/// Protocols of a GSO packet (`XEN_NETIF_GSO_TYPE_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum GsoKind {
    /// TCP over IPv4.
    TcpV4 = 1,
    /// TCP over IPv6.
    TcpV6 = 2,
}

/// Why an extra segment is rejected. Linux's netback closes the vif for each of these.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExtraFault {
    /// The type is 0 or undefined.
    #[error("extra segment of unknown type {0}")]
    Type(u8),
    /// The segment size is 0.
    #[error("GSO size of 0")]
    GsoSize,
    /// The GSO type is neither TCP over IPv4 nor TCP over IPv6.
    #[error("unknown GSO type {0}")]
    GsoType(u8),
}

const EXTRA_MORE: u8 = 1;

impl Extra {
    /// Reads an extra segment from its slot, once.
    ///
    /// # Errors
    /// An [`ExtraFault`] if it is malformed. (The outer error cannot happen with a slot of the
    /// ring's size.)
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Result<Self, ExtraFault>, ShortSlot> {
        let raw: RawExtra = transmute!(slot.read_array::<{ size_of::<RawExtra>() }>()?);
        let kind = match raw.kind {
            extra_type::GSO => {
                let gso: RawGso = transmute!(raw.u);
                match (gso.size.get(), gso.kind) {
                    (0, _) => return Ok(Err(ExtraFault::GsoSize)),
                    (size, 1) => ExtraKind::Gso { size, kind: GsoKind::TcpV4 },
                    (size, 2) => ExtraKind::Gso { size, kind: GsoKind::TcpV6 },
                    (_, other) => return Ok(Err(ExtraFault::GsoType(other))),
                }
            }
            extra_type::MCAST_ADD => ExtraKind::McastAdd(raw.u),
            extra_type::MCAST_DEL => ExtraKind::McastDel(raw.u),
            extra_type::HASH => {
                let hash: RawHash = transmute!(raw.u);
                let (kind, algorithm) = (hash.kind, hash.algorithm);
                ExtraKind::Hash { kind, algorithm, value: hash.value.get() }
            }
            extra_type::XDP => {
                let xdp: RawXdp = transmute!(raw.u);
                ExtraKind::Xdp { headroom: xdp.headroom.get() }
            }
            other => return Ok(Err(ExtraFault::Type(other))),
        };
        Ok(Ok(Self { kind, more: raw.flags & EXTRA_MORE != 0 }))
    }

    /// Returns the segment as encoded on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 8] {
        let (kind, u) = match self.kind {
            ExtraKind::Gso { size, kind } => {
                let (size, kind) = (size.into(), kind as u8);
                let gso = RawGso { size, kind, pad: 0, features: U16::ZERO };
                (extra_type::GSO, transmute!(gso))
            }
            ExtraKind::McastAdd(mac) => (extra_type::MCAST_ADD, mac),
            ExtraKind::McastDel(mac) => (extra_type::MCAST_DEL, mac),
            ExtraKind::Hash { kind, algorithm, value } => {
                let hash = RawHash { kind, algorithm, value: U32::new(value) };
                (extra_type::HASH, transmute!(hash))
            }
            ExtraKind::Xdp { headroom } => {
                let xdp = RawXdp { headroom: headroom.into(), pad: [U16::ZERO; 2] };
                (extra_type::XDP, transmute!(xdp))
            }
        };
        transmute!(RawExtra { kind, flags: if self.more { EXTRA_MORE } else { 0 }, u })
    }
}
