//! The control ring (`io/netif.h`, "Control requests"): what is too much for xenstore. One page, 128
//! slots, one answer a request, in any order.

use crate::gref::GrantRef;
use crate::shm::slot::{ShortSlot, Slot};
use bitflags::bitflags;

/// Bytes of a control slot (`xen_netif_ctrl_request`; the response is shorter).
pub const CTRL_SLOT_SIZE: usize = 16;
/// Bytes of a control response.
pub const CTRL_RESPONSE_SIZE: usize = 12;
/// Bytes of an entry of a list of staging grants (`xen_netif_gref`).
pub const GREF_ENTRY_SIZE: usize = 8;
/// Entries of such a list in one message: what fits a page.
pub const GREF_ENTRIES_MAX: usize = 512;

/// What is asked for (`XEN_NETIF_CTRL_TYPE_*`).
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

/// No hash: the backend steers as it likes (`XEN_NETIF_CTRL_HASH_ALGORITHM_NONE`).
pub const HASH_NONE: u32 = 0;
/// The Toeplitz hash (`XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ`).
pub const HASH_TOEPLITZ: u32 = 1;

bitflags! {
    /// Which packets are hashed (`XEN_NETIF_CTRL_HASH_TYPE_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct HashTypes: u32 {
        /// IPv4, by its addresses.
        const IPV4 = 1;
        /// TCP over IPv4, by addresses and ports.
        const IPV4_TCP = 2;
        /// IPv6, by its addresses.
        const IPV6 = 4;
        /// TCP over IPv6, by addresses and ports.
        const IPV6_TCP = 8;
    }
}

/// How a request went (`XEN_NETIF_CTRL_STATUS_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum CtrlStatus {
    /// It was done.
    Success = 0,
    /// Such requests are not served here, or not now.
    NotSupported = 1,
    /// It makes no sense, or could not be carried out.
    InvalidParameter = 2,
    /// It is larger than the backend has place for.
    BufferOverflow = 3,
}

impl CtrlStatus {
    /// The status of this number.
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

    /// A short stable code for logs and counters.
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
    /// Echoed in the response.
    pub id: u16,
    /// One of [`ctrl_type`].
    pub kind: u16,
    /// What it is about; [`CtrlRequest::ask`] says what it means.
    pub data: [u32; 3],
}

/// What a control request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CtrlAsk {
    /// Which [`HashTypes`] there are.
    GetHashFlags,
    /// Hash these.
    SetHashFlags(u32),
    /// Hash with this key.
    SetHashKey {
        /// The page that begins with it.
        page: GrantRef,
        /// Its bytes.
        len: u32,
    },
    /// How many entries the mapping may have.
    GetHashMappingSize,
    /// Have a mapping of so many entries, all 0; with none, a hash counts modulo the queues.
    SetHashMappingSize(u32),
    /// Set a part of the mapping.
    SetHashMapping {
        /// The page that begins with the part: the number of a queue for each entry, 4 bytes each.
        page: GrantRef,
        /// Its entries.
        len: u32,
        /// Which entry of the mapping is the part's first.
        offset: u32,
    },
    /// Hash so ([`HASH_NONE`], [`HASH_TOEPLITZ`]).
    SetHashAlgorithm(u32),
    /// How many pages may stay mapped.
    GetGrefMappingSize {
        /// For which queue.
        queue: u32,
    },
    /// Map these pages, and keep them mapped.
    AddGrefMapping(GrefList),
    /// Unmap these pages.
    DelGrefMapping(GrefList),
}

/// A list of staging grants, which stands in a page of the frontend's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GrefList {
    /// For which queue.
    pub queue: u32,
    /// The page that begins with the list, of [`GrefEntry`].
    pub page: GrantRef,
    /// Its entries.
    pub len: u32,
}

impl CtrlRequest {
    /// The request for this.
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

    /// What is asked for; `None` when nobody defined such a request.
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

    /// Reads the request out of its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`CTRL_SLOT_SIZE`].
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let [i0, i1, t0, t1, a @ .., b0, b1, b2, b3, c0, c1, c2, c3] =
            slot.read_array::<CTRL_SLOT_SIZE>()?;
        let word = u32::from_le_bytes;
        Ok(Self {
            id: u16::from_le_bytes([i0, i1]),
            kind: u16::from_le_bytes([t0, t1]),
            data: [word(a), word([b0, b1, b2, b3]), word([c0, c1, c2, c3])],
        })
    }

    /// The request as it stands on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CTRL_SLOT_SIZE] {
        let ([i0, i1], [t0, t1]) = (self.id.to_le_bytes(), self.kind.to_le_bytes());
        let [[a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3]] =
            self.data.map(u32::to_le_bytes);
        [i0, i1, t0, t1, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3]
    }
}

/// A control response (`struct xen_netif_ctrl_response`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CtrlResponse {
    /// The request's id.
    pub id: u16,
    /// The request's kind.
    pub kind: u16,
    /// A [`CtrlStatus`], as far as the other end is honest.
    pub status: u32,
    /// What was asked for.
    pub data: u32,
}

impl CtrlResponse {
    /// Reads the response out of its slot, once.
    ///
    /// # Errors
    /// None with a slot of [`CTRL_SLOT_SIZE`].
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let [i0, i1, t0, t1, s @ .., d0, d1, d2, d3] = slot.read_array::<CTRL_RESPONSE_SIZE>()?;
        Ok(Self {
            id: u16::from_le_bytes([i0, i1]),
            kind: u16::from_le_bytes([t0, t1]),
            status: u32::from_le_bytes(s),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }

    /// The response as it stands on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CTRL_RESPONSE_SIZE] {
        let ([i0, i1], [t0, t1]) = (self.id.to_le_bytes(), self.kind.to_le_bytes());
        let [[s0, s1, s2, s3], [d0, d1, d2, d3]] = [self.status, self.data].map(u32::to_le_bytes);
        [i0, i1, t0, t1, s0, s1, s2, s3, d0, d1, d2, d3]
    }
}

/// An entry of a list of staging grants (`struct xen_netif_gref`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GrefEntry {
    /// The page.
    pub gref: GrantRef,
    /// It is granted for reading only (`XEN_NETIF_CTRLF_GREF_readonly`): packets are sent from it.
    pub read_only: bool,
    /// Written by the backend when it unmaps: a [`CtrlStatus`].
    pub status: u16,
}

impl GrefEntry {
    /// The entry that stands on the wire so; flags nobody defined are dropped.
    #[must_use]
    pub const fn from_bytes([g0, g1, g2, g3, f0, f1, s0, s1]: [u8; GREF_ENTRY_SIZE]) -> Self {
        Self {
            gref: GrantRef(u32::from_le_bytes([g0, g1, g2, g3])),
            read_only: u16::from_le_bytes([f0, f1]) & 1 != 0,
            status: u16::from_le_bytes([s0, s1]),
        }
    }

    /// The entry as it stands on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; GREF_ENTRY_SIZE] {
        let [g0, g1, g2, g3] = self.gref.0.to_le_bytes();
        let [s0, s1] = self.status.to_le_bytes();
        [g0, g1, g2, g3, u8::from(self.read_only), 0, s0, s1]
    }
}
