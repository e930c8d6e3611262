//! Virtual block devices (`io/blkif.h`): requests, responses, and their three ABIs.
//!
//! Units: every "sector" on this wire is 512 bytes, whatever `sector-size` says.

use crate::gref::GrantRef;
use crate::slot::{ShortSlot, Slot, SlotMut};
use core::fmt;

/// Bytes in a sector of this protocol.
pub const SECTOR_SIZE: u32 = 512;
/// Sectors in a page; a segment's `first`/`last` run from 0 to one less.
pub const SECTORS_PER_PAGE: u8 = 8;
/// Segments a request carries in its own slot (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const MAX_SEGMENTS: usize = 11;
/// Pages of segments an indirect request names (`BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`).
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments in one page of them.
pub const SEGMENTS_PER_PAGE: usize = 512;
/// Segments of an indirect request: 16 MiB.
pub const MAX_INDIRECT_SEGMENTS: usize = MAX_INDIRECT_PAGES * SEGMENTS_PER_PAGE;

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
    /// From its word on the wire, unchecked.
    #[inline]
    const fn from_wire(raw: u64) -> Self {
        Self { gref: GrantRef(raw as u32), first: (raw >> 32) as u8, last: (raw >> 40) as u8 }
    }

    /// Its word on the wire.
    #[inline]
    const fn to_wire(self) -> u64 {
        self.gref.0 as u64 | (self.first as u64) << 32 | (self.last as u64) << 40
    }

    /// Whether its sectors are in order and inside the page.
    #[inline]
    fn is_inside(self) -> bool {
        self.first <= self.last && self.last < SECTORS_PER_PAGE
    }

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
#[derive(Clone, Copy, Default)]
pub struct Segments {
    /// A word each, as on the wire and with whatever is there past `count`.
    words: [u64; MAX_SEGMENTS],
    count: u8,
}

impl Segments {
    /// Copies segments in; `None` for more than [`MAX_SEGMENTS`].
    #[inline]
    #[must_use]
    pub fn from_slice(from: &[Segment]) -> Option<Self> {
        let mut words = [0; MAX_SEGMENTS];
        for (word, segment) in words.get_mut(..from.len())?.iter_mut().zip(from) {
            *word = segment.to_wire();
        }
        Some(Self { words, count: u8::try_from(from.len()).ok()? })
    }

    /// The segments, in order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Segment> + Clone + '_ {
        self.words().iter().map(|word| Segment::from_wire(*word))
    }

    /// How many there are, at most [`MAX_SEGMENTS`].
    #[inline]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is none.
    #[inline]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Sectors of all segments together.
    #[inline]
    #[must_use]
    pub fn sectors(&self) -> u32 {
        self.iter().map(Segment::sectors).fold(0, u32::wrapping_add)
    }

    #[inline]
    fn words(&self) -> &[u64] {
        self.words.get(..self.len()).unwrap_or_default()
    }
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Segments {}

impl fmt::Debug for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// What a data request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DataOp {
    /// Disk to guest.
    Read = op::READ,
    /// Guest to disk.
    Write = op::WRITE,
    /// Everything before it reaches the medium before it, and it does before anything after it.
    /// May carry no data.
    WriteBarrier = op::WRITE_BARRIER,
    /// The write cache reaches the medium. Carries data in old frontends only.
    Flush = op::FLUSH_DISKCACHE,
}

impl DataOp {
    /// From the wire; `None` for what moves no data.
    #[inline]
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            op::READ => Some(Self::Read),
            op::WRITE => Some(Self::Write),
            op::WRITE_BARRIER => Some(Self::WriteBarrier),
            op::FLUSH_DISKCACHE => Some(Self::Flush),
            _ => None,
        }
    }

    /// The wire code.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
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

impl Refusal {
    #[cold]
    const fn error(id: u64, op: u8, reason: RefusalReason) -> Self {
        Self { id, op, status: Status::Error, reason }
    }
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

/// A request without its segments, for readers that keep one [`Segments`] for all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Head {
    /// As [`Request::Data`].
    #[expect(missing_docs, reason = "as there")]
    Data { op: DataOp, id: u64, sector: u64 },
    /// As [`Request::Discard`].
    #[expect(missing_docs, reason = "as there")]
    Discard { id: u64, sector: u64, sectors: u64, secure: bool },
}

impl Head {
    /// Reads one request out of its slot, each byte once, no more than it needs: its segments (none
    /// of a discard) into `segments`, the rest into a value.
    ///
    /// # Errors
    /// A [`Refusal`] that says what to answer; there are no segments then. (The outer error cannot
    /// happen with a slot of the ABI's own size.)
    #[inline(always)]
    pub fn read<M>(
        slot: &mut Slot<'_, M>,
        abi: Abi,
        segments: &mut Segments,
    ) -> Result<Result<Self, Refusal>, ShortSlot> {
        segments.count = 0;
        let (op, count, id, sector) = match abi {
            Abi::X86_64 => {
                let [head, id, sector] = slot.read_words()?;
                let [op, count, ..] = head.to_le_bytes();
                (op, count, id, sector)
            }
            Abi::X86_32 => {
                let [op, count, ..] = slot.read_array::<4>()?;
                let [id, sector] = slot.read_words()?;
                (op, count, id, sector)
            }
        };
        let Some(data) = DataOp::from_code(op) else {
            return Self::read_other(slot, op, count, id, sector);
        };
        let least = if matches!(data, DataOp::Read | DataOp::Write) { 1 } else { 0 };
        if count < least || usize::from(count) > MAX_SEGMENTS {
            return Ok(Err(Refusal::error(id, op, RefusalReason::SegmentCount)));
        }
        let words = segments.words.get_mut(..usize::from(count)).unwrap_or_default();
        for word in words {
            let [raw] = slot.read_words()?;
            if !Segment::from_wire(raw).is_inside() {
                return Ok(Err(Refusal::error(id, op, RefusalReason::SegmentBounds)));
            }
            *word = raw;
        }
        segments.count = count;
        Ok(Ok(Self::Data { op: data, id, sector }))
    }

    /// What is not data: a discard, or an operation nobody defined.
    #[cold]
    fn read_other<M>(
        slot: &mut Slot<'_, M>,
        op: u8,
        flag: u8,
        id: u64,
        sector: u64,
    ) -> Result<Result<Self, Refusal>, ShortSlot> {
        if op != op::DISCARD {
            let (status, reason) = (Status::NotSupported, RefusalReason::UnknownOperation);
            return Ok(Err(Refusal { id, op, status, reason }));
        }
        let [sectors] = slot.read_words()?;
        Ok(Ok(Self::Discard { id, sector, sectors, secure: flag & DISCARD_SECURE != 0 }))
    }
}

impl Request {
    /// Reads one request out of its slot, each byte once, no more than it needs.
    ///
    /// # Errors
    /// A [`Refusal`] that says what to answer. (The outer error cannot happen with a slot of the
    /// ABI's own size.)
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>, abi: Abi) -> Result<Result<Self, Refusal>, ShortSlot> {
        let mut segments = Segments::default();
        Ok(Head::read(slot, abi, &mut segments)?.map(|head| match head {
            Head::Data { op, id, sector } => Self::Data { op, id, sector, segments },
            Head::Discard { id, sector, sectors, secure } => {
                Self::Discard { id, sector, sectors, secure }
            }
        }))
    }

    /// Writes the request into its slot as its ABI lays it out. `handle` is the device's
    /// `virtual-device` number, truncated as every frontend does.
    ///
    /// # Errors
    /// None with a slot of the ABI's own size.
    #[inline]
    pub fn write_to<M>(
        &self,
        abi: Abi,
        handle: u16,
        slot: &mut SlotMut<'_, M>,
    ) -> Result<(), ShortSlot> {
        self.words(abi, handle, |bytes| slot.write(bytes))
    }

    /// The bytes that [`write_to`](Self::write_to) writes, in a buffer.
    #[inline]
    pub fn write<'a>(&self, abi: Abi, handle: u16, out: &'a mut [u8; 112]) -> &'a [u8] {
        let mut used = 0_usize;
        let fits = self.words(abi, handle, |bytes| {
            let end = used.checked_add(bytes.len()).ok_or(ShortSlot)?;
            out.get_mut(used..end).ok_or(ShortSlot)?.copy_from_slice(bytes);
            used = end;
            Ok(())
        });
        debug_assert!(fits.is_ok(), "no request is longer than the longest");
        out.get(..used).unwrap_or_default()
    }

    /// Hands the request to `put` a field or two at a time, front to back. Whole words: bytes that
    /// are stored one by one and loaded as a word soon after make the load wait.
    #[inline(always)]
    fn words(
        &self,
        abi: Abi,
        handle: u16,
        mut put: impl FnMut(&[u8]) -> Result<(), ShortSlot>,
    ) -> Result<(), ShortSlot> {
        let (code, count, id, sector) = match self {
            Self::Data { op, id, sector, segments } => (op.code(), segments.count, id, sector),
            Self::Discard { id, sector, secure, .. } => {
                (op::DISCARD, if *secure { DISCARD_SECURE } else { 0 }, id, sector)
            }
        };
        let [h0, h1] = handle.to_le_bytes();
        let head = u32::from_le_bytes([code, count, h0, h1]);
        match abi {
            Abi::X86_64 => {
                let words = [u64::from(head), *id, *sector].map(u64::to_le_bytes);
                put(words.as_flattened())?;
            }
            Abi::X86_32 => {
                put(&head.to_le_bytes())?;
                put([*id, *sector].map(u64::to_le_bytes).as_flattened())?;
            }
        }
        match self {
            Self::Data { segments, .. } => {
                segments.words().iter().try_for_each(|word| put(&word.to_le_bytes()))
            }
            Self::Discard { sectors, .. } => put(&sectors.to_le_bytes()),
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
    /// The request's operation code; some frontends look at it, most do not.
    pub op: u8,
    /// What became of it.
    pub status: Status,
}

impl Response {
    /// Writes the response; every byte of it is defined (XSA-216).
    #[inline]
    pub fn write(self, abi: Abi, out: &mut [u8; 16]) -> &[u8] {
        let [s0, s1] = (self.status as i16).to_le_bytes();
        let tail = u64::from(u32::from_le_bytes([self.op, 0, s0, s1]));
        put(out, [self.id, tail]);
        out.get(..abi.response_size()).unwrap_or_default()
    }

    /// Reads a response out of its slot, once.
    ///
    /// # Errors
    /// None with a slot of the ABI's own size.
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>) -> Result<Self, ShortSlot> {
        let [id] = slot.read_words()?;
        let [op, _, s0, s1] = slot.read_array()?;
        Ok(Self { id, op, status: Status::from_wire(i16::from_le_bytes([s0, s1])) })
    }
}
