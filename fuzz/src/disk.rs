//! Storage of a virtual disk, and segments of requests.

use crate::{Shared, pick_gref};
use arbitrary::Arbitrary;
use pvio_blkback::engine::{Done, Full, Io, Segments};
use pvio_blkback::{BlockEngine, Buf, EngineError, Geometry};
use pvio_grant_table::GrantMapper;
use pvio_ring::shm::Region;
use pvio_sim::LocalDomain;

/// Size of the disk in sectors of 512 bytes.
pub const SECTORS: u64 = 256;
/// Advertised maximum of segments of an indirect request.
pub const INDIRECT: u32 = 300;

/// A segment of a request.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Segment {
    gref: u16,
    first: u8,
    last: u8,
}

impl Segment {
    /// Returns the segment as encoded on the wire; usually of one of these pages and inside it.
    pub fn bytes(self, shared: &Shared) -> [u8; 8] {
        let gref = pick_gref(&shared.grefs, self.gref).0.to_le_bytes();
        let small = |sector: u8| if sector < 240 { sector % 8 } else { sector };
        let (first, last) = (small(self.first), small(self.last));
        [gref[0], gref[1], gref[2], gref[3], first, last, 0, 0]
    }
}

/// Memory of an operation.
pub type PageBuf = Buf<<LocalDomain as GrantMapper>::Mapping>;

/// Storage that completes operations when, and as, the input says.
pub struct Engine {
    data: Vec<u8>,
    geometry: Geometry,
    slots: usize,
    /// Operations that are not completed.
    pub waiting: Vec<(u32, Io, Segments<PageBuf>)>,
    done: Vec<(u32, Result<(), EngineError>, Segments<PageBuf>)>,
}

impl Engine {
    /// Creates a disk for a ring with this number of slots.
    pub fn new(geometry: Geometry, slots: usize) -> Self {
        let data = vec![0x5a; SECTORS as usize * 512];
        Self { data, geometry, slots, waiting: Vec::new(), done: Vec::new() }
    }

    /// Completes an operation; a small `result` is an error.
    pub fn complete(&mut self, which: u8, result: u8) {
        if self.waiting.is_empty() {
            return;
        }
        let which = usize::from(which) % self.waiting.len();
        let (tag, io, segments) = self.waiting.swap_remove(which);
        let result = match result {
            0 => Err(EngineError::Os(5)),
            1 => Err(EngineError::Unsupported),
            2 => Err(EngineError::Short),
            3 => Err(EngineError::Os(28)),
            _ => {
                self.transfer(io, &segments);
                Ok(())
            }
        };
        self.done.push((tag, result, segments));
    }

    fn transfer(&mut self, io: Io, segments: &Segments<PageBuf>) {
        let (Io::Read { sector } | Io::Write { sector }) = io else { return };
        let mut at = sector as usize * 512;
        for segment in segments {
            let bytes = &mut self.data[at..at + segment.len];
            let moved = if matches!(io, Io::Read { .. }) {
                segment.buf.write_bytes(segment.offset, bytes)
            } else {
                segment.buf.read_bytes(segment.offset, bytes)
            };
            moved.expect("a segment lies inside its page, which is accessible");
            at += segment.len;
        }
    }
}

impl BlockEngine<PageBuf> for Engine {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<PageBuf>) -> Result<(), Full> {
        assert!(
            (tag as usize) < self.slots && self.waiting.len() < self.slots,
            "too many operations"
        );
        let used = |(other, ..): &(u32, Io, _)| *other == tag;
        assert!(!self.waiting.iter().any(used), "tag {tag} is in use");
        let bytes: u64 = segments.iter().map(|segment| segment.len as u64).sum();
        let (sector, sectors) = match io {
            Io::Read { sector } | Io::Write { sector } => (sector, bytes / 512),
            Io::Discard { sector, sectors, .. } | Io::WriteZeroes { sector, sectors } => {
                (sector, sectors)
            }
            Io::Flush => (0, 0),
        };
        assert!(bytes % u64::from(self.geometry.sector_size) == 0 && bytes <= 4096 * 300);
        let end = sector.checked_add(sectors).expect("no overflow");
        assert!(end <= SECTORS, "{io:?} of {bytes} bytes is out of range");
        assert!(!(io.changes() && self.geometry.read_only), "{io:?} on a read-only disk");
        self.waiting.push((tag, io, std::mem::take(segments)));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, PageBuf>) {
        for (tag, result, mut segments) in self.done.drain(..) {
            done(tag, result, &mut segments);
        }
    }
}
