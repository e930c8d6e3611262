//! Requests, each read once from its slot.

use super::layout::{RawHandle, RawIndirectPages, RawStart};
use super::{
    Abi, DISCARD_SECURE, Indirect, MAX_SEGMENTS, Refusal, RefusalReason, Segment, Segments, Status,
    op,
};
use crate::gref::GrantRef;
use crate::shm::slot::{ShortSlot, Slot, SlotMut};
use zerocopy::little_endian::U16;
use zerocopy::{IntoBytes, transmute};

/// Operation of a data request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DataOp {
    /// Reads from the disk into guest pages.
    Read = op::READ,
    /// Writes from guest pages to the disk.
    Write = op::WRITE,
    /// Writes as a barrier: earlier writes are on stable storage before it, and it is before later
    /// ones. May carry no data.
    WriteBarrier = op::WRITE_BARRIER,
    /// Flushes the write cache to stable storage. Only old frontends send data with it.
    Flush = op::FLUSH_DISKCACHE,
}

impl DataOp {
    /// Converts an operation code; `None` for operations without data.
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

    /// Returns the operation code.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// A well-formed request. The backend must check that its sectors are within the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// A read, write, barrier or flush with direct segments.
    Data {
        /// The operation.
        op: DataOp,
        /// The frontend's id, returned in the response and otherwise opaque; not necessarily
        /// unique.
        id: u64,
        /// First sector on the disk.
        sector: u64,
        /// The data; none only for a barrier or a flush.
        segments: Segments,
    },
    /// A large read or write, whose segments are in indirect pages and not validated yet.
    Indirect {
        /// The operation: read or write.
        op: DataOp,
        /// The frontend's id.
        id: u64,
        /// First sector on the disk.
        sector: u64,
        /// Location of the segments.
        indirect: Indirect,
    },
    /// A discard: the guest no longer needs these sectors.
    Discard {
        /// The frontend's id.
        id: u64,
        /// First sector on the disk.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// Whether the discarded data must become unreadable.
        secure: bool,
    },
}

/// A request without its segments, for readers that reuse one [`Segments`] for all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Head {
    /// As [`Request::Data`].
    #[expect(missing_docs, reason = "as there")]
    Data { op: DataOp, id: u64, sector: u64 },
    /// As [`Request::Indirect`].
    #[expect(missing_docs, reason = "as there")]
    Indirect { op: DataOp, id: u64, sector: u64, indirect: Indirect },
    /// As [`Request::Discard`].
    #[expect(missing_docs, reason = "as there")]
    Discard { id: u64, sector: u64, sectors: u64, secure: bool },
}

impl Head {
    /// Reads one request from its slot, each byte once, and only the bytes needed: its segments
    /// (none of a discard) into `segments`, the rest into a value.
    ///
    /// # Errors
    /// A [`Refusal`] with the response; there are no segments in that case. (The outer error cannot
    /// happen with a slot of the ABI's size.)
    #[inline(always)]
    pub fn read<M>(
        slot: &mut Slot<'_, M>,
        abi: Abi,
        segments: &mut Segments,
    ) -> Result<Result<Self, Refusal>, ShortSlot> {
        segments.count = 0;
        let (start, id, sector) = match abi {
            Abi::X86_64 => {
                let [start_and_padding, id, sector] = slot.read_words()?;
                ((start_and_padding as u32).to_le_bytes(), id, sector)
            }
            Abi::X86_32 => {
                let start = slot.read_array::<4>()?;
                let [id, sector] = slot.read_words()?;
                (start, id, sector)
            }
        };
        let start: RawStart = transmute!(start);
        let (op, count) = (start.operation, start.second);
        let Some(data) = DataOp::from_code(op) else {
            return Self::read_other(slot, start, id, sector);
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

    /// Reads the other kinds of requests: indirect, discard, or an undefined operation.
    #[cold]
    fn read_other<M>(
        slot: &mut Slot<'_, M>,
        start: RawStart,
        id: u64,
        sector: u64,
    ) -> Result<Result<Self, Refusal>, ShortSlot> {
        let (op, second) = (start.operation, start.second);
        match op {
            op::DISCARD => {
                let [sectors] = slot.read_words()?;
                let secure = second & DISCARD_SECURE != 0;
                Ok(Ok(Self::Discard { id, sector, sectors, secure }))
            }
            op::INDIRECT => Self::read_indirect(slot, second, start.third.get(), id, sector),
            _ => {
                let (status, reason) = (Status::NotSupported, RefusalReason::UnknownOperation);
                Ok(Err(Refusal { id, op, status, reason }))
            }
        }
    }

    /// A rejected request has the inner operation's code in its response, as a completed one has.
    fn read_indirect<M>(
        slot: &mut Slot<'_, M>,
        code: u8,
        segments: u16,
        id: u64,
        sector: u64,
    ) -> Result<Result<Self, Refusal>, ShortSlot> {
        let op = match DataOp::from_code(code) {
            Some(op @ (DataOp::Read | DataOp::Write)) => op,
            _ => return Ok(Err(Refusal::error(id, code, RefusalReason::UnknownOperation))),
        };
        // The device's handle is not needed.
        let _ = slot.read_array::<{ size_of::<RawHandle>() }>()?;
        let grefs: RawIndirectPages =
            transmute!(slot.read_array::<{ size_of::<RawIndirectPages>() }>()?);
        let pages = grefs.map(|gref| GrantRef(gref.get()));
        Ok(match Indirect::from_wire(segments, pages) {
            Some(indirect) => Ok(Self::Indirect { op, id, sector, indirect }),
            None => Err(Refusal::error(id, code, RefusalReason::SegmentCount)),
        })
    }
}

impl Request {
    /// Returns the frontend's id.
    #[must_use]
    pub const fn id(&self) -> u64 {
        match self {
            Self::Data { id, .. } | Self::Indirect { id, .. } | Self::Discard { id, .. } => *id,
        }
    }

    /// Returns the operation code for its response.
    #[must_use]
    pub const fn op(&self) -> u8 {
        match self {
            Self::Data { op, .. } | Self::Indirect { op, .. } => op.code(),
            Self::Discard { .. } => super::op::DISCARD,
        }
    }

    /// Reads one request from its slot, each byte once, and only the bytes needed.
    ///
    /// # Errors
    /// A [`Refusal`] with the response. (The outer error cannot happen with a slot of the ABI's
    /// size.)
    #[inline]
    pub fn read<M>(slot: &mut Slot<'_, M>, abi: Abi) -> Result<Result<Self, Refusal>, ShortSlot> {
        let mut segments = Segments::default();
        Ok(Head::read(slot, abi, &mut segments)?.map(|head| match head {
            Head::Data { op, id, sector } => Self::Data { op, id, sector, segments },
            Head::Indirect { op, id, sector, indirect } => {
                Self::Indirect { op, id, sector, indirect }
            }
            Head::Discard { id, sector, sectors, secure } => {
                Self::Discard { id, sector, sectors, secure }
            }
        }))
    }

    /// Writes the request into its slot in the layout of the ABI. `handle` is the device's
    /// `virtual-device` number, truncated as every frontend does.
    ///
    /// # Errors
    /// None with a slot of the ABI's size.
    #[inline]
    pub fn write_to<M>(
        &self,
        abi: Abi,
        handle: u16,
        slot: &mut SlotMut<'_, M>,
    ) -> Result<(), ShortSlot> {
        self.words(abi, handle, |bytes| slot.write(bytes))
    }

    /// Returns the bytes that [`write_to`](Self::write_to) writes, in a buffer.
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

    /// Passes the request to `put` one or two fields at a time, front to back, as whole words.
    /// Bytes that are stored one by one and soon loaded as a word would stall the load (store
    /// forwarding).
    #[inline(always)]
    fn words(
        &self,
        abi: Abi,
        handle: u16,
        mut put: impl FnMut(&[u8]) -> Result<(), ShortSlot>,
    ) -> Result<(), ShortSlot> {
        let (code, second, third, id, sector) = match self {
            Self::Data { op, id, sector, segments } => {
                (op.code(), segments.count, handle, id, sector)
            }
            Self::Indirect { op, id, sector, indirect } => {
                (op::INDIRECT, op.code(), indirect.wire().0, id, sector)
            }
            Self::Discard { id, sector, secure, .. } => {
                (op::DISCARD, if *secure { DISCARD_SECURE } else { 0 }, handle, id, sector)
            }
        };
        let start = RawStart { operation: code, second, third: third.into() };
        let start = u32::from_le_bytes(transmute!(start));
        match abi {
            Abi::X86_64 => {
                let words = [u64::from(start), *id, *sector].map(u64::to_le_bytes);
                put(words.as_flattened())?;
            }
            Abi::X86_32 => {
                put(&start.to_le_bytes())?;
                put([*id, *sector].map(u64::to_le_bytes).as_flattened())?;
            }
        }
        match self {
            Self::Data { segments, .. } => {
                segments.words().iter().try_for_each(|word| put(&word.to_le_bytes()))
            }
            Self::Indirect { indirect, .. } => {
                put(RawHandle { handle: handle.into(), pad: U16::ZERO }.as_bytes())?;
                let grefs: RawIndirectPages = indirect.wire().1.map(|page| page.0.into());
                put(grefs.as_bytes())?;
                // Padding to the end of the struct.
                put(if abi == Abi::X86_64 { &[0; 4] } else { &[0; 8] })
            }
            Self::Discard { sectors, .. } => put(&sectors.to_le_bytes()),
        }
    }
}
