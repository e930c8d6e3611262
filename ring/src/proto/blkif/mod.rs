//! Virtual block devices (`io/blkif.h`): requests, responses, and their three ABIs.
//!
//! Units: every "sector" in this protocol is 512 bytes, whatever `sector-size` is.
//!
//! | module | contents |
//! |---|---|
//! | `request` | requests (direct, indirect, without data), each read once from its slot |
//! | `layout` | the structures of the header, and where they are in a slot |
//! | `segment` | ranges of granted pages, in a slot or in indirect pages |
//! | `refusal` | why a request is rejected, and the response to it |
//! | this | ABIs, constants, responses |

mod layout;
mod refusal;
mod request;
mod segment;

pub use refusal::{Refusal, RefusalReason};
pub use request::{DataOp, Head, Request};
pub use segment::{Indirect, Segment, Segments};

use crate::shm::slot::{ShortSlot, Slot};
use layout::RawResponseEnd;
use zerocopy::transmute;

/// Size of a sector of this protocol, in bytes.
pub const SECTOR_SIZE: u32 = 512;
/// Number of sectors in a page; a segment's `first` and `last` are less than it.
pub const SECTORS_PER_PAGE: u8 = 8;
/// Maximum number of segments in a direct request (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const MAX_SEGMENTS: usize = 11;
/// Maximum number of indirect pages of a request (`BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`).
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Maximum number of segments in one indirect page.
pub const SEGMENTS_PER_PAGE: usize = 512;
/// Maximum number of segments of an indirect request: 16 MiB.
pub const MAX_INDIRECT_SEGMENTS: usize = MAX_INDIRECT_PAGES * SEGMENTS_PER_PAGE;

/// Struct layout of the guest's compiler (`protocol` in xenstore, `io/protocols.h`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Abi {
    /// 64-bit alignment of 64-bit fields: x86-64 and ARM (`x86_64-abi`, `arm-abi`).
    #[default]
    X86_64,
    /// 32-bit x86: 64-bit fields aligned to 4 bytes (`x86_32-abi`).
    X86_32,
}

impl Abi {
    /// Returns the size of a ring slot, in bytes: the larger of request and response.
    #[must_use]
    pub const fn slot_size(self) -> usize {
        match self {
            Self::X86_64 => 112,
            Self::X86_32 => 108,
        }
    }

    /// Returns the size of a response, in bytes.
    #[must_use]
    pub const fn response_size(self) -> usize {
        match self {
            Self::X86_64 => 16,
            Self::X86_32 => 12,
        }
    }
}

/// Operation codes (`BLKIF_OP_*`).
pub mod op {
    #![expect(missing_docs, reason = "each is the header's constant of the same name")]
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const WRITE_BARRIER: u8 = 2;
    pub const FLUSH_DISKCACHE: u8 = 3;
    pub const DISCARD: u8 = 5;
    pub const INDIRECT: u8 = 6;
}

/// Flag of a discard: the discarded data must not be readable afterwards (`BLKIF_DISCARD_SECURE`).
pub const DISCARD_SECURE: u8 = 1;

/// Bits of a disk's `info` key (`VDISK_*`).
pub mod info {
    #![expect(missing_docs, reason = "each is the header's constant of the same name")]
    pub const CDROM: u32 = 1;
    pub const REMOVABLE: u32 = 2;
    pub const READONLY: u32 = 4;
}

/// Status of a response (`BLKIF_RSP_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i16)]
pub enum Status {
    /// Success.
    Okay = 0,
    /// The request failed.
    Error = -1,
    /// The backend does not support this operation.
    NotSupported = -2,
}

impl Status {
    /// Converts a value from the wire; anything undefined is an error.
    #[must_use]
    pub const fn from_wire(status: i16) -> Self {
        match status {
            0 => Self::Okay,
            -2 => Self::NotSupported,
            _ => Self::Error,
        }
    }
}

/// Writes words to the beginning of `out`.
#[inline(always)]
fn put<const N: usize>(out: &mut [u8], words: [u64; N]) {
    for (to, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
}

/// A response (`blkif_response_t`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// The request's operation code; some frontends check it, most do not.
    pub op: u8,
    /// The status.
    pub status: Status,
}

impl Response {
    /// Writes the response; every byte of it is initialized (XSA-216).
    #[inline]
    pub fn write(self, abi: Abi, out: &mut [u8; 16]) -> &[u8] {
        let status = (self.status as i16).into();
        let end = RawResponseEnd { operation: self.op, pad: 0, status };
        put(out, [self.id, u64::from(u32::from_le_bytes(transmute!(end)))]);
        out.get(..abi.response_size()).unwrap_or_default()
    }

    /// Reads a response from its slot, once.
    ///
    /// # Errors
    /// None with a slot of the ABI's size.
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let [id] = slot.read_words()?;
        let end: RawResponseEnd = transmute!(slot.read_array::<4>()?);
        Ok(Self { id, op: end.operation, status: Status::from_wire(end.status.get()) })
    }
}
