//! Everything a disk was asked to change, in order, to find out what a loss of power would have
//! left of it.
//!
//! # What a disk promises
//! A write is on the medium for certain when a flush is over that was begun after the write was
//! over. Any other write may be there or not, whole or in part, physical sector by physical sector
//! (what the medium writes at once, as the disk's geometry says), and in any order with others. [`Record::after_power_loss`] makes every one of these worlds, for any moment.

use super::uring::Watch;
use super::wait::WaitEngine;
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::{PoolMemory, Region, SharedMemory};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Until a geometry says how large a physical sector is.
const SECTOR: u64 = 512;

/// What becomes of writes that no flush covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// None of them is there.
    All,
    /// Every one of them is there.
    Nothing,
    /// Each physical sector of each is there or not, and the later of two that overlap may be the one that
    /// is not; by a seed.
    Some(u64),
}

#[derive(Clone, Debug)]
enum Event {
    /// Bytes from one on; none for a flush.
    Begun {
        id: u64,
        change: Option<(u64, Arc<[u8]>)>,
    },
    Over {
        id: u64,
        done: bool,
    },
}

/// What was asked of a disk, by all its queues, as it came.
#[derive(Debug, Default)]
pub struct Record {
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Log {
    events: Vec<Event>,
    next: u64,
    /// Bytes of a physical sector.
    unit: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self { events: Vec::new(), next: 0, unit: SECTOR }
    }
}

impl Record {
    /// Of a medium with physical sectors of so many bytes, for recorders at other places than around
    /// an engine, which says so itself.
    #[must_use]
    pub fn with_sectors(bytes: u64) -> Self {
        let log = Log { unit: bytes.max(SECTOR), ..Log::default() };
        Self { log: Mutex::new(log) }
    }

    /// How many events there are by now: a moment to [lose power](Self::after_power_loss) at.
    #[must_use]
    pub fn now(&self) -> usize {
        self.log().events.len()
    }

    /// After how many events each flush was over.
    #[must_use]
    pub fn flushes(&self) -> Vec<usize> {
        let log = self.log();
        let mut flushes = Vec::new();
        let mut found = Vec::new();
        for (i, event) in log.events.iter().enumerate() {
            match event {
                Event::Begun { id, change: None } => flushes.push(*id),
                Event::Over { id, done: true } if flushes.contains(id) => found.push(i + 1),
                _ => {}
            }
        }
        found
    }

    /// What is on the medium when power is lost after so many events. `image` is what was on it at
    /// the beginning, and is changed to that.
    pub fn after_power_loss(&self, image: &mut [u8], moment: usize, loss: Loss) {
        self.kept(moment, loss, &mut |at, data| put(image, at, data));
    }

    /// The same for a medium of any kind: tells `put` each part that is there, from which byte on,
    /// in the order in which they came there.
    pub fn kept(&self, moment: usize, loss: Loss, put: &mut dyn FnMut(u64, &[u8])) {
        let log = self.log();
        let events = log.events.get(..moment).unwrap_or(&log.events);
        let (durable, mut open) = tell_apart(events);
        for (at, data) in durable {
            put(at, &data);
        }
        match loss {
            Loss::All => {}
            Loss::Nothing => open.iter().for_each(|(at, data)| put(*at, data)),
            Loss::Some(seed) => {
                let mut random = Random(seed);
                // In any order: those that overlap take turns to be the last.
                for i in (1..open.len()).rev() {
                    open.swap(i, random.below(i + 1));
                }
                for (at, data) in open {
                    // Whole, lost, or torn.
                    let kept = random.below(3);
                    let mut rest = &data[..];
                    let mut at = at;
                    loop {
                        let left = usize::try_from(log.unit - at % log.unit).unwrap_or(usize::MAX);
                        let (part, more) = rest.split_at(left.min(rest.len()));
                        if kept == 0 || (kept == 1 && random.below(2) == 0) {
                            put(at, part);
                        }
                        at += part.len() as u64;
                        rest = more;
                        if rest.is_empty() {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Something is begun: bytes are written from one on, or, if there are none, all that is
    /// over is brought to the medium. No bytes make a file longer, up to there. For recorders at other places than around an engine; gives
    /// the number to [end](Self::end) it by.
    pub fn begin(&self, change: Option<(u64, Arc<[u8]>)>) -> u64 {
        let mut log = self.log();
        let id = log.next;
        log.next += 1;
        log.events.push(Event::Begun { id, change });
        id
    }

    /// It is over, and done or not.
    pub fn end(&self, id: u64, done: bool) {
        self.log().events.push(Event::Over { id, done });
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Change = (u64, Arc<[u8]>);

/// The changes that are on the medium for certain, in order, and those that may be.
fn tell_apart(events: &[Event]) -> (Vec<Change>, Vec<Change>) {
    let mut durable = Vec::new();
    // By number: the change, and whether it is over.
    let mut open: BTreeMap<u64, (Change, bool)> = BTreeMap::new();
    // By number: what each flush covers.
    let mut flushes: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for event in events {
        match event {
            Event::Begun { id, change: Some(change) } => {
                open.insert(*id, (change.clone(), false));
            }
            Event::Begun { id, change: None } => {
                let over = open.iter().filter(|(_, (_, over))| *over).map(|(id, _)| *id);
                flushes.insert(*id, over.collect());
            }
            Event::Over { id, done } => {
                if let Some((_, over)) = open.get_mut(id) {
                    // One that failed may have been done in part; nothing makes it certain.
                    *over = *done;
                }
                for covered in flushes.remove(id).filter(|_| *done).into_iter().flatten() {
                    durable.extend(open.remove(&covered).map(|(change, _)| change));
                }
            }
        }
    }
    (durable, open.into_values().map(|(change, _)| change).collect())
}

fn put(image: &mut [u8], at: u64, data: &[u8]) {
    let place = usize::try_from(at).ok().and_then(|at| image.get_mut(at..at + data.len()));
    debug_assert!(place.is_some(), "a write outside the disk");
    if let Some(place) = place {
        place.copy_from_slice(data);
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// An engine that records what it is asked to change, before it begins and when it is over.
pub struct Recorded<E> {
    engine: E,
    record: Arc<Record>,
    /// By tag: the number of what is under way.
    ids: Vec<Option<u64>>,
}

impl<E> Recorded<E> {
    /// The engine, with a record. It keeps all data that is written in memory.
    pub fn new<B>(engine: E, record: Arc<Record>) -> Self
    where
        E: BlockEngine<B>,
    {
        record.log().unit = u64::from(engine.geometry().physical_sector_size).max(SECTOR);
        Self { engine, record, ids: Vec::new() }
    }
}

impl<B: SharedMemory, E: BlockEngine<B>> BlockEngine<B> for Recorded<E> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let change = match io {
            Io::Read { .. } => return self.engine.submit(tag, io, segments),
            Io::Write { sector } => {
                let mut data = Vec::new();
                for seg in segments.iter() {
                    let from = data.len();
                    data.resize(from + seg.len, 0);
                    // What is not there is written by no engine.
                    let _ = data.get_mut(from..).and_then(|d| seg.buf.read_bytes(seg.offset, d));
                }
                Some((sector.saturating_mul(512), data.into()))
            }
            Io::Flush => None,
            Io::Discard { sector, sectors, .. } | Io::WriteZeroes { sector, sectors } => {
                let len = usize::try_from(sectors.saturating_mul(512)).map_err(|_| Full)?;
                Some((sector.saturating_mul(512), alloc::vec![0; len].into()))
            }
        };
        // Before it is begun: by the time that is known, it may be on the medium.
        let id = self.record.begin(change);
        if let Err(full) = self.engine.submit(tag, io, segments) {
            self.record.end(id, false);
            return Err(full);
        }
        let tag = tag as usize;
        if self.ids.len() <= tag {
            self.ids.resize(tag + 1, None);
        }
        if let Some(slot) = self.ids.get_mut(tag) {
            *slot = Some(id);
        }
        Ok(())
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.engine.register(memory)
    }

    fn kick(&mut self) {
        self.engine.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        self.engine.deadline()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        let Self { engine, record, ids } = self;
        engine.reap(&mut |tag, result, segments| {
            if let Some(id) = ids.get_mut(tag as usize).and_then(Option::take) {
                record.end(id, result.is_ok());
            }
            done(tag, result, segments);
        });
    }
}

impl<B: SharedMemory, E: WaitEngine<B>> WaitEngine<B> for Recorded<E> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        self.engine.watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.engine.wait(timeout)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.engine.fired(watch)
    }
}
