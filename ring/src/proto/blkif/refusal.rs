//! Why a request is refused, and what to answer.

use super::Status;

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
    /// An operation code nobody defined, or one this disk did not offer; an indirect request of
    /// anything but a read or a write.
    #[error("unknown operation")]
    UnknownOperation,
    /// More segments than may be, or none where data must be.
    #[error("impossible number of segments")]
    SegmentCount,
    /// A discard of no sectors.
    #[error("nothing to be done")]
    Empty,
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
    pub(super) const fn error(id: u64, op: u8, reason: RefusalReason) -> Self {
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
