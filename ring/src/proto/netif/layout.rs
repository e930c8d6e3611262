//! Structures of the rings (`io/netif.h`), little-endian as on all of Xen's architectures.
//!
//! A structure is parsed from a private copy of a slot, never in shared memory.

use zerocopy::little_endian::{I16, U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `netif_tx_request_t`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawTxRequest {
    pub gref: U32,
    pub offset: U16,
    pub flags: U16,
    pub id: U16,
    pub size: U16,
}

/// `netif_tx_response_t`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawTxResponse {
    pub id: U16,
    pub status: I16,
}

/// `netif_rx_request_t`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawRxRequest {
    pub id: U16,
    pub pad: U16,
    pub gref: U32,
}

/// `netif_rx_response_t`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawRxResponse {
    pub id: U16,
    pub offset: U16,
    pub flags: U16,
    pub status: I16,
}

/// `netif_extra_info_t`, with its union `u` as bytes.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawExtra {
    /// One of [`extra_type`].
    pub kind: u8,
    pub flags: u8,
    pub u: [u8; 6],
}

/// `XEN_NETIF_EXTRA_TYPE_*`.
pub mod extra_type {
    pub const GSO: u8 = 1;
    pub const MCAST_ADD: u8 = 2;
    pub const MCAST_DEL: u8 = 3;
    pub const HASH: u8 = 4;
    /// Linux only.
    pub const XDP: u8 = 5;
}

/// `u.gso`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawGso {
    pub size: U16,
    pub kind: u8,
    pub pad: u8,
    pub features: U16,
}

/// `u.hash`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawHash {
    pub kind: u8,
    pub algorithm: u8,
    pub value: U32,
}

/// `u.xdp` of Linux (`include/xen/interface/io/netif.h`).
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawXdp {
    pub headroom: U16,
    pub pad: [U16; 2],
}

/// `struct xen_netif_ctrl_request`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawCtrlRequest {
    pub id: U16,
    pub kind: U16,
    pub data: [U32; 3],
}

/// `struct xen_netif_ctrl_response`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawCtrlResponse {
    pub id: U16,
    pub kind: U16,
    pub status: U32,
    pub data: U32,
}

/// `struct xen_netif_gref`.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawGref {
    pub gref: U32,
    pub flags: U16,
    pub status: U16,
}
