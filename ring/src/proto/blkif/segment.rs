//! Ranges of granted pages.

use super::layout::RawSegment;
use super::{
    MAX_INDIRECT_PAGES, MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS, SECTOR_SIZE, SECTORS_PER_PAGE,
    SEGMENTS_PER_PAGE,
};
use crate::gref::GrantRef;
use core::fmt;
use zerocopy::little_endian::{U16, U32};
use zerocopy::transmute;

/// A range of one granted page: whole sectors `first..=last` of it.
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
    /// Reads a segment of an indirect page (`struct blkif_request_segment`); `None` if its sectors
    /// are not in order or not within the page.
    #[inline]
    #[must_use]
    pub fn read(raw: [u8; 8]) -> Option<Self> {
        let segment = Self::from_wire(u64::from_le_bytes(raw));
        segment.is_inside().then_some(segment)
    }

    /// Returns its bytes in an indirect page.
    #[inline]
    #[must_use]
    pub const fn write(self) -> [u8; 8] {
        self.to_wire().to_le_bytes()
    }

    /// Decodes a segment from its word on the wire, without validation.
    #[inline]
    pub(super) const fn from_wire(raw: u64) -> Self {
        let raw: RawSegment = transmute!(raw.to_le_bytes());
        Self { gref: GrantRef(raw.gref.get()), first: raw.first_sect, last: raw.last_sect }
    }

    /// Returns its word on the wire.
    #[inline]
    pub(super) const fn to_wire(self) -> u64 {
        u64::from_le_bytes(transmute!(RawSegment {
            gref: U32::new(self.gref.0),
            first_sect: self.first,
            last_sect: self.last,
            pad: U16::ZERO,
        }))
    }

    /// Returns whether its sectors are in order and within the page.
    #[inline]
    pub(super) fn is_inside(self) -> bool {
        self.first <= self.last && (self.last < SECTORS_PER_PAGE || crate::planted!(SegmentBound))
    }

    /// Returns the offset of the data in the page, in bytes.
    #[must_use]
    pub const fn offset(self) -> usize {
        (self.first as usize).wrapping_mul(SECTOR_SIZE as usize)
    }

    /// Returns the number of sectors; 0 if the range is inverted, which
    /// [`Request::read`](super::Request::read) rejects.
    #[must_use]
    pub const fn sectors(self) -> u32 {
        (self.last as u32).wrapping_add(1).saturating_sub(self.first as u32)
    }

    /// Returns the length of the data, in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        (self.sectors() as usize).wrapping_mul(SECTOR_SIZE as usize)
    }

    /// Returns whether it covers no sector.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.sectors() == 0
    }
}

/// The segments of one request, in private memory.
#[derive(Clone, Copy, Default)]
pub struct Segments {
    /// One word per segment, as on the wire; words from `count` on are unspecified.
    pub(super) words: [u64; MAX_SEGMENTS],
    pub(super) count: u8,
}

impl Segments {
    /// Copies segments; `None` for more than [`MAX_SEGMENTS`].
    #[inline]
    #[must_use]
    pub fn from_slice(from: &[Segment]) -> Option<Self> {
        let mut words = [0; MAX_SEGMENTS];
        for (word, segment) in words.get_mut(..from.len())?.iter_mut().zip(from) {
            *word = segment.to_wire();
        }
        Some(Self { words, count: u8::try_from(from.len()).ok()? })
    }

    /// Returns the segments, in order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Segment> + Clone + '_ {
        self.words().iter().map(|word| Segment::from_wire(*word))
    }

    /// Returns the number of segments, at most [`MAX_SEGMENTS`].
    #[inline]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Returns whether there is no segment.
    #[inline]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the total number of sectors.
    #[inline]
    #[must_use]
    pub fn sectors(&self) -> u32 {
        self.iter().map(Segment::sectors).fold(0, u32::wrapping_add)
    }

    #[inline]
    pub(super) fn words(&self) -> &[u64] {
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

/// Location of the segments of an indirect request: the indirect pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Indirect {
    pages: [GrantRef; MAX_INDIRECT_PAGES],
    /// 1 to 4096.
    segments: u16,
}

impl Indirect {
    /// Describes `segments` segments in `pages`; `None` for no segments, too many, or a number of
    /// pages other than the one needed.
    #[must_use]
    pub fn new(segments: usize, pages: &[GrantRef]) -> Option<Self> {
        let mut all = [GrantRef::default(); MAX_INDIRECT_PAGES];
        all.get_mut(..pages.len())?.copy_from_slice(pages);
        let indirect = Self::from_wire(u16::try_from(segments).ok()?, all)?;
        (indirect.pages().len() == pages.len()).then_some(indirect)
    }

    /// Decodes the fields of the wire; `None` for no segments, or more than eight pages hold.
    #[inline]
    pub(super) fn from_wire(segments: u16, pages: [GrantRef; MAX_INDIRECT_PAGES]) -> Option<Self> {
        let possible = 1..=MAX_INDIRECT_SEGMENTS;
        possible.contains(&usize::from(segments)).then_some(Self { pages, segments })
    }

    /// Returns the number of segments, 1 to [`MAX_INDIRECT_SEGMENTS`].
    #[inline]
    #[must_use]
    pub const fn segments(&self) -> usize {
        self.segments as usize
    }

    /// Returns the pages, with the number of segments in each: 512 in all but the last.
    #[inline]
    pub fn pages(&self) -> impl ExactSizeIterator<Item = (GrantRef, usize)> + Clone + '_ {
        let pages = self.segments().div_ceil(SEGMENTS_PER_PAGE);
        self.pages.iter().take(pages).enumerate().map(|(n, gref)| {
            let before = n.wrapping_mul(SEGMENTS_PER_PAGE);
            (*gref, self.segments().saturating_sub(before).min(SEGMENTS_PER_PAGE))
        })
    }

    /// Returns the number of segments and all eight references, including unused ones.
    pub(super) const fn wire(&self) -> (u16, &[GrantRef; MAX_INDIRECT_PAGES]) {
        (self.segments, &self.pages)
    }
}
