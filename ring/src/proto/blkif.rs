//! Virtual block devices (`io/blkif.h`): requests, responses, and their three ABIs.
//!
//! Units: every "sector" on this wire is 512 bytes, whatever `sector-size` says.

use crate::gref::GrantRef;
use crate::shm::SharedMemory;
use crate::slot::{ShortSlot, Slot};

/// Bytes in a sector of this protocol.
pub const SECTOR_SIZE: u32 = 512;
/// Sectors in a page; a segment's `first`/`last` run from 0 to one less.
pub const SECTORS_PER_PAGE: u8 = 8;
/// Segments a request carries in its own slot (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const MAX_SEGMENTS: usize = 11;

/// How a guest's compiler laid the structs out (`protocol` in xenstore, `io/protocols.h`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Abi {
    /// 64-bit alignment of 64-bit fields: x86-64 and ARM (`x86_64-abi`, `arm-abi`).
    #[default]
    X86_64,
    /// 32-bit x86: 64-bit fields aligned to 4 bytes (`x86_32-abi`).
    X86_32,
}

impl Abi {
    /// Bytes of a ring slot: the larger of request and response.
    #[must_use]
    pub const fn slot_size(self) -> usize {
        match self {
            Self::X86_64 => 112,
            Self::X86_32 => 108,
        }
    }

    /// Bytes of a response.
    #[must_use]
    pub const fn response_size(self) -> usize {
        match self {
            Self::X86_64 => 16,
            Self::X86_32 => 12,
        }
    }

    /// Where a request's `id` is; `sector_number` follows it.
    const fn id_at(self) -> usize {
        match self {
            Self::X86_64 => 8,
            Self::X86_32 => 4,
        }
    }

    /// Where the segments of a request begin.
    const fn segments_at(self) -> usize {
        match self {
            Self::X86_64 => 24,
            Self::X86_32 => 20,
        }
    }
}

/// `BLKIF_OP_*`.
pub mod op {
    #![expect(missing_docs, reason = "each is the header's constant of the same name")]
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const WRITE_BARRIER: u8 = 2;
    pub const FLUSH_DISKCACHE: u8 = 3;
    pub const DISCARD: u8 = 5;
    pub const INDIRECT: u8 = 6;
}

/// Flag of a discard: the old content must not be readable afterwards
/// (`BLKIF_DISCARD_SECURE`).
pub const DISCARD_SECURE: u8 = 1;

/// `info` bits of a disk (`VDISK_*`).
pub mod info {
    #![expect(missing_docs, reason = "each is the header's constant of the same name")]
    pub const CDROM: u32 = 1;
    pub const REMOVABLE: u32 = 2;
    pub const READONLY: u32 = 4;
}

/// What became of a request (`BLKIF_RSP_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i16)]
pub enum Status {
    /// It was done.
    Okay = 0,
    /// It failed.
    Error = -1,
    /// The backend does not know this operation.
    NotSupported = -2,
}

impl Status {
    /// From the wire; anything undefined is an error.
    #[must_use]
    pub const fn from_wire(status: i16) -> Self {
        match status {
            0 => Self::Okay,
            -2 => Self::NotSupported,
            _ => Self::Error,
        }
    }
}

/// Part of one granted page: whole sectors `first..=last` of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// The page.
    pub gref: GrantRef,
    /// First sector within the page, 0 to 7.
    pub first: u8,
    /// Last sector within the page, inclusive, 0 to 7.
    pub last: u8,
}

impl Segment {
    /// Byte offset of the data in its page.
    #[must_use]
    pub const fn offset(self) -> usize {
        (self.first as usize).wrapping_mul(SECTOR_SIZE as usize)
    }

    /// Sectors of data; 0 when inverted, which [`Request::read`] refuses.
    #[must_use]
    pub const fn sectors(self) -> u32 {
        (self.last as u32).wrapping_add(1).saturating_sub(self.first as u32)
    }

    /// Bytes of data.
    #[must_use]
    pub const fn len(self) -> usize {
        (self.sectors() as usize).wrapping_mul(SECTOR_SIZE as usize)
    }

    /// Whether it covers no sector.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.sectors() == 0
    }
}

/// The segments of one request, in private memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segments {
    all: [Segment; MAX_SEGMENTS],
    count: u8,
}

impl Segments {
    /// Copies segments in; `None` for more than [`MAX_SEGMENTS`].
    #[must_use]
    pub fn from_slice(from: &[Segment]) -> Option<Self> {
        let mut all = [Segment::default(); MAX_SEGMENTS];
        all.get_mut(..from.len())?.copy_from_slice(from);
        Some(Self { all, count: u8::try_from(from.len()).ok()? })
    }

    /// The segments.
    #[must_use]
    pub fn as_slice(&self) -> &[Segment] {
        self.all.get(..usize::from(self.count)).unwrap_or_default()
    }

    /// Sectors of all segments together.
    #[must_use]
    pub fn sectors(&self) -> u32 {
        self.as_slice().iter().map(|s| s.sectors()).fold(0, u32::wrapping_add)
    }
}

/// What a data request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataOp {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
    /// Everything before it reaches the medium before it, and it does before anything after it.
    /// May carry no data.
    WriteBarrier,
    /// The write cache reaches the medium. Carries data in old frontends only.
    Flush,
}

impl DataOp {
    /// The wire code.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Read => op::READ,
            Self::Write => op::WRITE,
            Self::WriteBarrier => op::WRITE_BARRIER,
            Self::Flush => op::FLUSH_DISKCACHE,
        }
    }
}

/// A request in good form. Whether its sectors exist on the disk is the backend's to check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Moves data, or orders it.
    Data {
        /// What to do.
        op: DataOp,
        /// The frontend's own number for it, echoed and otherwise opaque; may repeat.
        id: u64,
        /// First sector on the disk.
        sector: u64,
        /// Where the data is; none only for a barrier or a flush.
        segments: Segments,
    },
    /// The guest no longer needs these sectors.
    Discard {
        /// As for data.
        id: u64,
        /// First sector on the disk.
        sector: u64,
        /// How many.
        sectors: u64,
        /// Whether old content must become unreadable.
        secure: bool,
    },
}

/// Why a request was refused, and what to answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The request's id, to be echoed.
    pub id: u64,
    /// The request's operation code, to be echoed.
    pub op: u8,
    /// What to answer.
    pub status: Status,
    /// Why.
    pub reason: RefusalReason,
}

/// Why a request was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RefusalReason {
    /// An operation code nobody defined, or one this disk did not offer.
    #[error("unknown operation")]
    UnknownOperation,
    /// More than 11 segments, or none where data must be.
    #[error("impossible number of segments")]
    SegmentCount,
    /// `last` before `first`, or past the page.
    #[error("segment outside its page")]
    SegmentBounds,
    /// Sectors past the end of the disk.
    #[error("sectors outside the disk")]
    OutOfRange,
    /// Not whole logical sectors.
    #[error("not aligned to the logical sector size")]
    Misaligned,
    /// A write to a read-only disk.
    #[error("write to a read-only disk")]
    ReadOnly,
    /// A data page was not granted as needed.
    #[error("data page not granted")]
    Grant,
    /// The disk failed.
    #[error("input/output error of the image")]
    Engine,
}

impl RefusalReason {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::UnknownOperation => "unknown-operation",
            Self::SegmentCount => "segment-count",
            Self::SegmentBounds => "segment-bounds",
            Self::OutOfRange => "out-of-range",
            Self::Misaligned => "misaligned",
            Self::ReadOnly => "read-only",
            Self::Grant => "bad-grant",
            Self::Engine => "engine-error",
        }
    }
}

impl Request {
    /// Reads one request out of its slot, each byte once, no more than it needs.
    ///
    /// # Errors
    /// A [`Refusal`] that says what to answer. (The outer error cannot happen with a slot of the
    /// ABI's own size.)
    #[inline]
    pub fn read<M: SharedMemory>(
        slot: &mut Slot<'_, M>,
        abi: Abi,
    ) -> Result<Result<Self, Refusal>, ShortSlot> {
        let mut head = [0; 24];
        let head = head.get_mut(..abi.segments_at()).ok_or(ShortSlot)?;
        slot.read(head)?;
        let [op, count, ..] = *head else { return Err(ShortSlot) };
        let id = u64_at(head, abi.id_at()).ok_or(ShortSlot)?;
        let sector = u64_at(head, abi.id_at().wrapping_add(8)).ok_or(ShortSlot)?;
        let refuse = |status, reason| Ok(Err(Refusal { id, op, status, reason }));

        let op = match op {
            op::READ => DataOp::Read,
            op::WRITE => DataOp::Write,
            op::WRITE_BARRIER => DataOp::WriteBarrier,
            op::FLUSH_DISKCACHE => DataOp::Flush,
            op::DISCARD => {
                let mut sectors = [0; 8];
                slot.read(&mut sectors)?;
                let sectors = u64::from_le_bytes(sectors);
                let secure = count & DISCARD_SECURE != 0;
                return Ok(Ok(Self::Discard { id, sector, sectors, secure }));
            }
            _ => return refuse(Status::NotSupported, RefusalReason::UnknownOperation),
        };
        let may_be_empty = matches!(op, DataOp::Flush | DataOp::WriteBarrier);
        if usize::from(count) > MAX_SEGMENTS || (count == 0 && !may_be_empty) {
            return refuse(Status::Error, RefusalReason::SegmentCount);
        }
        let mut segments = Segments { count, ..Segments::default() };
        for segment in segments.all.iter_mut().take(usize::from(count)) {
            let mut raw = [0; 8];
            slot.read(&mut raw)?;
            let [a, b, c, d, first, last, _, _] = raw;
            if last < first || last >= SECTORS_PER_PAGE {
                return refuse(Status::Error, RefusalReason::SegmentBounds);
            }
            *segment = Segment { gref: GrantRef(u32::from_le_bytes([a, b, c, d])), first, last };
        }
        Ok(Ok(Self::Data { op, id, sector, segments }))
    }

    /// Writes the request as its ABI lays it out and returns the bytes used. `handle` is the
    /// device's `virtual-device` number, truncated as every frontend does.
    #[inline]
    pub fn write<'a>(&self, abi: Abi, handle: u16, out: &'a mut [u8; 112]) -> &'a [u8] {
        let (code, count, id, sector) = match self {
            Self::Data { op, id, sector, segments } => (op.code(), segments.count, id, sector),
            Self::Discard { id, sector, secure, .. } => {
                (op::DISCARD, if *secure { DISCARD_SECURE } else { 0 }, id, sector)
            }
        };
        let [h0, h1] = handle.to_le_bytes();
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            let end = bytes.len().wrapping_add(at);
            if let Some(to) = out.get_mut(at..end) {
                to.copy_from_slice(bytes);
            }
            at = end;
        };
        put(&[code, count, h0, h1]);
        if abi == Abi::X86_64 {
            put(&[0; 4]);
        }
        put(&id.to_le_bytes());
        put(&sector.to_le_bytes());
        match self {
            Self::Data { segments, .. } => {
                for segment in segments.as_slice() {
                    let [a, b, c, d] = segment.gref.0.to_le_bytes();
                    put(&[a, b, c, d, segment.first, segment.last, 0, 0]);
                }
            }
            Self::Discard { sectors, .. } => put(&sectors.to_le_bytes()),
        }
        out.get(..at).unwrap_or_default()
    }
}

/// A response (`blkif_response_t`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// The request's operation code; some frontends look at it, most do not.
    pub op: u8,
    /// What became of it.
    pub status: Status,
}

impl Response {
    /// Writes the response; every byte of it is defined (XSA-216).
    #[inline]
    pub fn write(self, abi: Abi, out: &mut [u8; 16]) -> &[u8] {
        let [a, b, c, d, e, f, g, h] = self.id.to_le_bytes();
        let [s0, s1] = (self.status as i16).to_le_bytes();
        *out = [a, b, c, d, e, f, g, h, self.op, 0, s0, s1, 0, 0, 0, 0];
        out.get(..abi.response_size()).unwrap_or_default()
    }

    /// Reads a response out of its slot, once.
    ///
    /// # Errors
    /// None with a slot of the ABI's own size.
    #[inline]
    pub fn read<M: SharedMemory>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let mut raw = [0; 12];
        slot.read(&mut raw)?;
        let [a, b, c, d, e, f, g, h, op, _, s0, s1] = raw;
        let status = Status::from_wire(i16::from_le_bytes([s0, s1]));
        Ok(Self { id: u64::from_le_bytes([a, b, c, d, e, f, g, h]), op, status })
    }
}

#[inline]
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}
