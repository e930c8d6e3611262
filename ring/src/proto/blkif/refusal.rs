//! Why a request is rejected, and the response to it.

use super::Status;

/// A rejected request, and the response to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The request's id, returned in the response.
    pub id: u64,
    /// The request's operation code, returned in the response.
    pub op: u8,
    /// Status of the response.
    pub status: Status,
    /// Why.
    pub reason: RefusalReason,
}

/// Why a request is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RefusalReason {
    /// An operation code that is undefined or that this disk does not advertise; an indirect
    /// request with an operation other than read or write.
    #[error("unknown operation")]
    UnknownOperation,
    /// More segments than the maximum, or none where data are required.
    #[error("invalid number of segments")]
    SegmentCount,
    /// A discard of no sectors.
    #[error("discard of no sectors")]
    Empty,
    /// `last` is less than `first`, or outside the page.
    #[error("segment outside its page")]
    SegmentBounds,
    /// Sectors beyond the end of the disk.
    #[error("sectors outside the disk")]
    OutOfRange,
    /// Not whole logical sectors.
    #[error("not aligned to the logical sector size")]
    Misaligned,
    /// A write to a read-only disk.
    #[error("write to a read-only disk")]
    ReadOnly,
    /// A data page is not granted with the required access.
    #[error("data page not granted")]
    Grant,
    /// I/O error of the image.
    #[error("input/output error of the image")]
    Engine,
}

impl Refusal {
    #[cold]
    pub(super) const fn error(id: u64, op: u8, reason: RefusalReason) -> Self {
        Self { id, op, status: Status::Error, reason }
    }
}

impl RefusalReason {
    /// Returns a short stable code for logs and counters.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::UnknownOperation => "unknown-operation",
            Self::SegmentCount => "segment-count",
            Self::Empty => "empty",
            Self::SegmentBounds => "segment-bounds",
            Self::OutOfRange => "out-of-range",
            Self::Misaligned => "misaligned",
            Self::ReadOnly => "read-only",
            Self::Grant => "bad-grant",
            Self::Engine => "engine-error",
        }
    }
}
