//! The control ring (`io/netif.h`, "Control requests"), for requests too large or too frequent for
//! xenstore. One page, 128 slots, one response per request, in any order.

use super::layout::{RawCtrlRequest, RawCtrlResponse, RawGref};
use crate::gref::GrantRef;
use crate::shm::slot::{ShortSlot, Slot};
use bitflags::bitflags;
use zerocopy::little_endian::U32;
use zerocopy::transmute;

/// Size of a control slot, in bytes (`xen_netif_ctrl_request`; the response is shorter).
pub const CTRL_SLOT_SIZE: usize = size_of::<RawCtrlRequest>();
/// Size of a control response, in bytes.
pub const CTRL_RESPONSE_SIZE: usize = size_of::<RawCtrlResponse>();
/// Size of an entry of a list of staging grants, in bytes (`xen_netif_gref`).
pub const GREF_ENTRY_SIZE: usize = size_of::<RawGref>();
/// Maximum number of entries of such a list in one request: those that fit into a page.
pub const GREF_ENTRIES_MAX: usize = 512;

/// Request types (`XEN_NETIF_CTRL_TYPE_*`).
pub mod ctrl_type {
    #![expect(missing_docs, reason = "each is the header's constant of the same name")]
    pub const GET_HASH_FLAGS: u16 = 1;
    pub const SET_HASH_FLAGS: u16 = 2;
    pub const SET_HASH_KEY: u16 = 3;
    pub const GET_HASH_MAPPING_SIZE: u16 = 4;
    pub const SET_HASH_MAPPING_SIZE: u16 = 5;
    pub const SET_HASH_MAPPING: u16 = 6;
    pub const SET_HASH_ALGORITHM: u16 = 7;
    pub const GET_GREF_MAPPING_SIZE: u16 = 8;
    pub const ADD_GREF_MAPPING: u16 = 9;
    pub const DEL_GREF_MAPPING: u16 = 10;
}

/// No hash: the backend chooses the queues (`XEN_NETIF_CTRL_HASH_ALGORITHM_NONE`).
pub const HASH_NONE: u32 = 0;
/// The Toeplitz hash (`XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ`).
pub const HASH_TOEPLITZ: u32 = 1;

bitflags! {
    /// Kinds of packets to hash (`XEN_NETIF_CTRL_HASH_TYPE_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct HashTypes: u32 {
        /// IPv4, over its addresses.
        const IPV4 = 1;
        /// TCP over IPv4, over addresses and ports.
        const IPV4_TCP = 2;
        /// IPv6, over its addresses.
        const IPV6 = 4;
        /// TCP over IPv6, over addresses and ports.
        const IPV6_TCP = 8;
    }
}

/// Status of a control response (`XEN_NETIF_CTRL_STATUS_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum CtrlStatus {
    /// It was done.
    Success = 0,
    /// The request is not supported, or not in this state.
    NotSupported = 1,
    /// The request is invalid, or failed.
    InvalidParameter = 2,
    /// The request is larger than the backend's limit.
    BufferOverflow = 3,
}

impl CtrlStatus {
    /// Converts a number; `None` if it is undefined.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Success,
            1 => Self::NotSupported,
            2 => Self::InvalidParameter,
            3 => Self::BufferOverflow,
            _ => return None,
        })
    }

    /// Returns a short stable code for logs and counters.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::NotSupported => "not-supported",
            Self::InvalidParameter => "invalid-parameter",
            Self::BufferOverflow => "buffer-overflow",
        }
    }
}

/// A control request (`struct xen_netif_ctrl_request`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CtrlRequest {
    /// Returned in the response.
    pub id: u16,
    /// One of [`ctrl_type`].
    pub kind: u16,
    /// Parameters; [`CtrlRequest::ask`] decodes them.
    pub data: [u32; 3],
}

/// A decoded control request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CtrlAsk {
    /// Gets the supported [`HashTypes`].
    GetHashFlags,
    /// Sets the kinds of packets to hash.
    SetHashFlags(u32),
    /// Sets the hash key.
    SetHashKey {
        /// The page that starts with the key.
        page: GrantRef,
        /// Length of the key, in bytes.
        len: u32,
    },
    /// Gets the maximum number of entries of the mapping.
    GetHashMappingSize,
    /// Sets the size of the mapping, with all entries 0; with size 0, queues are selected by hash
    /// modulo number of queues.
    SetHashMappingSize(u32),
    /// Sets a part of the mapping.
    SetHashMapping {
        /// The page that starts with the part: a queue number of 4 bytes for each entry.
        page: GrantRef,
        /// Number of entries in the part.
        len: u32,
        /// Index of the part's first entry in the mapping.
        offset: u32,
    },
    /// Sets the hash algorithm ([`HASH_NONE`], [`HASH_TOEPLITZ`]).
    SetHashAlgorithm(u32),
    /// Gets the maximum number of pages that can stay mapped.
    GetGrefMappingSize {
        /// The queue.
        queue: u32,
    },
    /// Maps these pages and keeps them mapped.
    AddGrefMapping(GrefList),
    /// Unmaps these pages.
    DelGrefMapping(GrefList),
}

/// A list of staging grants, in a page of the frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GrefList {
    /// The queue.
    pub queue: u32,
    /// The page that starts with the list of [`GrefEntry`].
    pub page: GrantRef,
    /// Number of entries.
    pub len: u32,
}

impl CtrlRequest {
    /// Encodes a request.
    #[must_use]
    pub const fn new(id: u16, ask: CtrlAsk) -> Self {
        use ctrl_type as t;
        let (kind, data) = match ask {
            CtrlAsk::GetHashFlags => (t::GET_HASH_FLAGS, [0; 3]),
            CtrlAsk::SetHashFlags(flags) => (t::SET_HASH_FLAGS, [flags, 0, 0]),
            CtrlAsk::SetHashKey { page, len } => (t::SET_HASH_KEY, [page.0, len, 0]),
            CtrlAsk::GetHashMappingSize => (t::GET_HASH_MAPPING_SIZE, [0; 3]),
            CtrlAsk::SetHashMappingSize(size) => (t::SET_HASH_MAPPING_SIZE, [size, 0, 0]),
            CtrlAsk::SetHashMapping { page, len, offset } => {
                (t::SET_HASH_MAPPING, [page.0, len, offset])
            }
            CtrlAsk::SetHashAlgorithm(algorithm) => (t::SET_HASH_ALGORITHM, [algorithm, 0, 0]),
            CtrlAsk::GetGrefMappingSize { queue } => (t::GET_GREF_MAPPING_SIZE, [queue, 0, 0]),
            CtrlAsk::AddGrefMapping(list) => {
                (t::ADD_GREF_MAPPING, [list.queue, list.page.0, list.len])
            }
            CtrlAsk::DelGrefMapping(list) => {
                (t::DEL_GREF_MAPPING, [list.queue, list.page.0, list.len])
            }
        };
        Self { id, kind, data }
    }

    /// Decodes the request; `None` if its type is undefined.
    #[must_use]
    pub const fn ask(&self) -> Option<CtrlAsk> {
        use ctrl_type as t;
        let [a, b, c] = self.data;
        let list = GrefList { queue: a, page: GrantRef(b), len: c };
        Some(match self.kind {
            t::GET_HASH_FLAGS => CtrlAsk::GetHashFlags,
            t::SET_HASH_FLAGS => CtrlAsk::SetHashFlags(a),
            t::SET_HASH_KEY => CtrlAsk::SetHashKey { page: GrantRef(a), len: b },
            t::GET_HASH_MAPPING_SIZE => CtrlAsk::GetHashMappingSize,
            t::SET_HASH_MAPPING_SIZE => CtrlAsk::SetHashMappingSize(a),
            t::SET_HASH_MAPPING => CtrlAsk::SetHashMapping { page: GrantRef(a), len: b, offset: c },
            t::SET_HASH_ALGORITHM => CtrlAsk::SetHashAlgorithm(a),
            t::GET_GREF_MAPPING_SIZE => CtrlAsk::GetGrefMappingSize { queue: a },
            t::ADD_GREF_MAPPING => CtrlAsk::AddGrefMapping(list),
            t::DEL_GREF_MAPPING => CtrlAsk::DelGrefMapping(list),
            _ => return None,
        })
    }

    /// Reads the request from its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`CTRL_SLOT_SIZE`].
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let raw: RawCtrlRequest = transmute!(slot.read_array::<CTRL_SLOT_SIZE>()?);
        Ok(Self { id: raw.id.get(), kind: raw.kind.get(), data: raw.data.map(U32::get) })
    }

    /// Returns the request as encoded on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CTRL_SLOT_SIZE] {
        transmute!(RawCtrlRequest {
            id: self.id.into(),
            kind: self.kind.into(),
            data: self.data.map(U32::new),
        })
    }
}

/// A control response (`struct xen_netif_ctrl_response`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CtrlResponse {
    /// The request's id.
    pub id: u16,
    /// The request's type.
    pub kind: u16,
    /// A [`CtrlStatus`], or an undefined value from a faulty peer.
    pub status: u32,
    /// The requested value.
    pub data: u32,
}

impl CtrlResponse {
    /// Reads the response from its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`CTRL_SLOT_SIZE`].
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let raw: RawCtrlResponse = transmute!(slot.read_array::<CTRL_RESPONSE_SIZE>()?);
        Ok(Self {
            id: raw.id.get(),
            kind: raw.kind.get(),
            status: raw.status.get(),
            data: raw.data.get(),
        })
    }

    /// Returns the response as encoded on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CTRL_RESPONSE_SIZE] {
        transmute!(RawCtrlResponse {
            id: self.id.into(),
            kind: self.kind.into(),
            status: self.status.into(),
            data: self.data.into(),
        })
    }
}

/// An entry of a list of staging grants (`struct xen_netif_gref`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GrefEntry {
    /// The page.
    pub gref: GrantRef,
    /// The page is granted read-only (`XEN_NETIF_CTRLF_GREF_readonly`): it is used for transmit.
    pub read_only: bool,
    /// A [`CtrlStatus`], written by the backend when it unmaps the page.
    pub status: u16,
}

/// `XEN_NETIF_CTRLF_GREF_readonly`.
const READ_ONLY: u16 = 1;

impl GrefEntry {
    /// Decodes an entry; undefined flags are dropped.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; GREF_ENTRY_SIZE]) -> Self {
        let raw: RawGref = transmute!(bytes);
        Self {
            gref: GrantRef(raw.gref.get()),
            read_only: raw.flags.get() & READ_ONLY != 0,
            status: raw.status.get(),
        }
    }

    /// Returns the entry as encoded on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; GREF_ENTRY_SIZE] {
        transmute!(RawGref {
            gref: self.gref.0.into(),
            flags: if self.read_only { READ_ONLY } else { 0 }.into(),
            status: self.status.into(),
        })
    }
}
