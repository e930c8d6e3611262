//! Model of the data that a guest may find on its disk.
//!
//! Every write has a unique number, from which a sector's contents are computed. For each sector,
//! the model stores which numbers a read may return now, and which may be on stable storage if the
//! cache is lost. Both are sets, since a request that failed or has no response may have been
//! executed or not.

use crate::disk::medium::SECTOR;
use std::ops::Range;

/// Returns the contents of a sector that a write filled; number 0 is a sector of zeroes.
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

/// Returns the number of the write that filled a sector; `None` if it is not the contents of one
/// write to that sector.
fn number_in(bytes: &[u8], sector: u64) -> Option<u64> {
    let number = u64::from_le_bytes(*bytes.first_chunk()?);
    (content(number, sector)[..] == *bytes).then_some(number)
}

#[derive(Clone, Default)]
struct Sector {
    now: Vec<u64>,
    stable: Vec<u64>,
    /// Time of the last write to it, as far as the guest knows.
    touched: u64,
    /// Time at which the last write was submitted that has certainly been executed. Data that is read
    /// after others may be older.
    begun: u64,
    readers: u32,
    writer: bool,
}

/// Outstanding request, as the model needs it.
#[derive(Clone, Debug)]
pub struct Pending {
    sectors: Range<u64>,
    kind: Kind,
    begun: u64,
    cuts: u64,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Possible contents at the time of submission.
    Read(Vec<Vec<u64>>),
    Write(u64),
    Flush,
}

/// Possible contents of a disk.
pub struct Model {
    sectors: Vec<Sector>,
    last: u64,
    clock: u64,
    /// Number of losses of the cache. The next field is the last session whose responses may be
    /// older than the last loss.
    cuts: u64,
    cut_session: u32,
    /// Time of the last flush that failed, or may have failed. Data of earlier writes is durable only
    /// once it is written again.
    failed: u64,
}

impl Model {
    pub fn new(sectors: u64) -> Self {
        let zero = Sector { now: vec![0], stable: vec![0], ..Sector::default() };
        let sectors = vec![zero; sectors as usize];
        Self { sectors, last: 0, clock: 0, cuts: 0, cut_session: 0, failed: 0 }
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

    /// Starts a write with a new number, which is returned.
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

    /// Ends a request that got a response in the given session of the frontend; `data` is the data
    /// that a read returned.
    pub fn end(&mut self, pending: Pending, ok: bool, session: u32, data: &[u8]) {
        self.clock += 1;
        let clock = self.clock;
        // The response may be older than the loss of the cache, and its data may be lost with it.
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
                        panic!(
                            "sector {sector} holds data that was not written there: {:?}",
                            &bytes[..32]
                        );
                    };
                    let allowed = s.now.contains(&found) || cut && before.contains(&found);
                    assert!(
                        allowed,
                        "sector {sector} reads write {found}, expected one of {:?}",
                        s.now
                    );
                    if !cut {
                        s.now = vec![found];
                    }
                }
            }
            Kind::Write(number) => {
                for s in self.range(&pending.sectors) {
                    (s.writer, s.touched) = (false, clock);
                    if ok && !cut {
                        (s.now, s.begun) = (vec![number], pending.begun);
                    }
                }
            }
            Kind::Flush if ok => {
                let since = self.failed;
                let safe =
                    |s: &&mut Sector| !s.writer && s.touched < pending.begun && s.begun >= since;
                self.sectors.iter_mut().filter(safe).for_each(|s| s.stable.clone_from(&s.now));
            }
            Kind::Flush => self.failed = clock,
        }
    }

    /// Ends a request whose outcome will never be known.
    pub fn abandon(&mut self, pending: Pending) {
        self.clock += 1;
        let clock = self.clock;
        if matches!(pending.kind, Kind::Flush) {
            // It may have failed, and the kernel may have forgotten the data that it did not write. A
            // flush after the disk was opened again does not report that.
            self.failed = clock;
        }
        for s in self.range(&pending.sectors) {
            match pending.kind {
                Kind::Read(_) => s.readers -= 1,
                _ => (s.writer, s.touched) = (false, clock),
            }
        }
    }

    /// Records that the disk lost its cache. Responses in `session` that the frontend has not taken
    /// yet may be older.
    pub fn cut(&mut self, session: u32) {
        self.cuts += 1;
        self.cut_session = session;
        self.sectors.iter_mut().for_each(|s| s.now.clone_from(&s.stable));
    }

    /// Records that a new frontend starts, which counts its sessions from the beginning.
    pub fn new_frontend(&mut self) {
        self.cut_session = 0;
    }
}

fn add(set: &mut Vec<u64>, number: u64) {
    if !set.contains(&number) {
        set.push(number);
    }
}
