//! What a guest may find on its disk.
//!
//! Every write has a number of its own; a sector's content is made of it. For each sector the
//! model keeps which numbers a read may give now, and which may be on the medium if the cache is
//! lost: both are sets, since a request that failed or was never answered may have been done or not.

use crate::medium::SECTOR;
use std::ops::Range;

/// The content of a sector that a write filled; 0 is a sector of zeroes.
pub fn content(number: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if number != 0 {
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let word_of = if i == 0 { number } else { mix(number, sector, i as u64) };
            word.copy_from_slice(&word_of.to_le_bytes());
        }
    }
    bytes
}

fn mix(number: u64, sector: u64, i: u64) -> u64 {
    (number ^ sector.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(i)
}

/// Which write filled a sector; `None` if it is not the content of one write to that sector.
fn number_in(bytes: &[u8], sector: u64) -> Option<u64> {
    let number = u64::from_le_bytes(*bytes.first_chunk()?);
    (content(number, sector)[..] == *bytes).then_some(number)
}

#[derive(Clone, Default)]
struct Sector {
    now: Vec<u64>,
    stable: Vec<u64>,
    /// When it was last written to, as far as the guest knows.
    touched: u64,
    readers: u32,
    writer: bool,
}

/// A request under way, as the model needs it.
#[derive(Clone, Debug)]
pub struct Pending {
    sectors: Range<u64>,
    kind: Kind,
    begun: u64,
    cuts: u64,
}

#[derive(Clone, Debug)]
enum Kind {
    /// What might be found, at the beginning.
    Read(Vec<Vec<u64>>),
    Write(u64),
    Flush,
}

/// What may be on a disk.
pub struct Model {
    sectors: Vec<Sector>,
    last: u64,
    clock: u64,
    /// How often the cache was lost, and up to which session answers may be from before.
    cuts: u64,
    cut_session: u32,
}

impl Model {
    pub fn new(sectors: u64) -> Self {
        let zero = Sector { now: vec![0], stable: vec![0], ..Sector::default() };
        let sectors = vec![zero; sectors as usize];
        Self { sectors, last: 0, clock: 0, cuts: 0, cut_session: 0 }
    }

    fn range(&mut self, range: &Range<u64>) -> &mut [Sector] {
        &mut self.sectors[range.start as usize..range.end as usize]
    }

    pub fn may_read(&mut self, range: &Range<u64>) -> bool {
        self.range(range).iter().all(|s| !s.writer)
    }

    pub fn may_write(&mut self, range: &Range<u64>) -> bool {
        self.range(range).iter().all(|s| !s.writer && s.readers == 0)
    }

    fn pending(&mut self, sectors: Range<u64>, kind: Kind) -> Pending {
        self.clock += 1;
        Pending { sectors, kind, begun: self.clock, cuts: self.cuts }
    }

    pub fn begin_read(&mut self, range: Range<u64>) -> Pending {
        let sectors = self.range(&range);
        sectors.iter_mut().for_each(|s| s.readers += 1);
        let found = sectors.iter().map(|s| s.now.clone()).collect();
        self.pending(range, Kind::Read(found))
    }

    /// A write of fresh numbers, of which it gives the first: one for each sector.
    pub fn begin_write(&mut self, range: Range<u64>) -> (Pending, u64) {
        self.last += 1;
        let number = self.last;
        (self.begin(range, number), number)
    }

    pub fn begin_discard(&mut self, range: Range<u64>) -> Pending {
        self.begin(range, 0)
    }

    fn begin(&mut self, range: Range<u64>, number: u64) -> Pending {
        for s in self.range(&range) {
            s.writer = true;
            add(&mut s.now, number);
            add(&mut s.stable, number);
        }
        self.pending(range, Kind::Write(number))
    }

    pub fn begin_flush(&mut self) -> Pending {
        self.pending(0..0, Kind::Flush)
    }

    /// A request was answered, in that session of the frontend; `data` is what a read gave.
    pub fn end(&mut self, pending: Pending, ok: bool, session: u32, data: &[u8]) {
        self.clock += 1;
        let clock = self.clock;
        // The answer may be older than the cut, and what it tells gone with the cache.
        let cut = pending.cuts != self.cuts && session <= self.cut_session;
        let first = pending.sectors.start;
        match pending.kind {
            Kind::Read(before) => {
                for (i, (s, before)) in
                    self.range(&pending.sectors).iter_mut().zip(before).enumerate()
                {
                    s.readers -= 1;
                    if !ok {
                        continue;
                    }
                    let sector = first + i as u64;
                    let bytes = &data[i * SECTOR..(i + 1) * SECTOR];
                    let Some(found) = number_in(bytes, sector) else {
                        panic!("sector {sector} holds what nobody wrote there: {:?}", &bytes[..32]);
                    };
                    let allowed = s.now.contains(&found) || cut && before.contains(&found);
                    assert!(allowed, "sector {sector} gives write {found}, not one of {:?}", s.now);
                    if !cut {
                        s.now = vec![found];
                    }
                }
            }
            Kind::Write(number) => {
                for s in self.range(&pending.sectors) {
                    s.writer = false;
                    s.touched = clock;
                    if ok && !cut {
                        s.now = vec![number];
                    }
                }
            }
            Kind::Flush if ok => {
                let safe = |s: &&mut Sector| !s.writer && s.touched < pending.begun;
                self.sectors.iter_mut().filter(safe).for_each(|s| s.stable.clone_from(&s.now));
            }
            Kind::Flush => {}
        }
    }

    /// Nobody will ever tell what became of a request.
    pub fn abandon(&mut self, pending: Pending) {
        self.clock += 1;
        let clock = self.clock;
        for s in self.range(&pending.sectors) {
            match pending.kind {
                Kind::Read(_) => s.readers -= 1,
                _ => (s.writer, s.touched) = (false, clock),
            }
        }
    }

    /// The disk lost its cache; answers that the frontend has not taken in `session` may be older.
    pub fn cut(&mut self, session: u32) {
        self.cuts += 1;
        self.cut_session = session;
        self.sectors.iter_mut().for_each(|s| s.now.clone_from(&s.stable));
    }

    /// The frontend begins anew, and counts its sessions anew.
    pub fn new_frontend(&mut self) {
        self.cut_session = 0;
    }
}

fn add(set: &mut Vec<u64>, number: u64) {
    if !set.contains(&number) {
        set.push(number);
    }
}
