//! A record of all changes to a disk, in order, to determine its possible contents after a power
//! loss.
//!
//! # Durability model
//! A write is guaranteed to be durable after a flush completes that was submitted after the write
//! completed. Any other write may be present or not, in whole or in part by physical sector (the
//! unit that the storage writes atomically, as given by the disk's geometry), and in any order with
//! others. [`Record::after_power_loss`] constructs each of these states, for any point in time.

use crate::engine::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::{PoolMemory, Region, SharedMemory};
use pvio_runtime::{WaitPoint, Wrapper};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Physical sector size until a geometry gives another one.
const SECTOR: u64 = 512;

/// The fate of writes that no flush covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// All of them are lost.
    All,
    /// None of them is lost.
    Nothing,
    /// Each physical sector of each write is present or lost, and of two overlapping writes the
    /// later one may be the lost one; chosen by a seed.
    Some(u64),
}

#[derive(Clone, Debug)]
enum Event {
    /// Submitted: data and its offset in bytes; `None` for a flush.
    Begun {
        id: u64,
        change: Option<(u64, Arc<[u8]>)>,
    },
    Over {
        id: u64,
        done: bool,
    },
}

/// The changes submitted to a disk by all its queues, in order.
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
    /// Creates a record for storage with physical sectors of `bytes` bytes, for recorders other
    /// than [`Recorded`], which takes the size from its engine.
    #[must_use]
    pub fn with_sectors(bytes: u64) -> Self {
        let log = Log { unit: bytes.max(SECTOR), ..Log::default() };
        Self { log: Mutex::new(log) }
    }

    /// Returns the number of events recorded so far, as a point in time for
    /// [`after_power_loss`](Self::after_power_loss).
    #[must_use]
    pub fn now(&self) -> usize {
        self.log().events.len()
    }

    /// Returns for each flush the number of events up to its completion.
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

    /// Applies a power loss after `moment` events to `image`, which holds the initial contents of
    /// the storage and is changed to those after the loss.
    pub fn after_power_loss(&self, image: &mut [u8], moment: usize, loss: Loss) {
        self.surviving_writes(moment, loss, &mut |at, data| put(image, at, data));
    }

    /// Passes the changes that survive a power loss after `moment` events to `put`, for storage of
    /// any kind: offset and data, in the order in which they were applied.
    pub fn surviving_writes(&self, moment: usize, loss: Loss, put: &mut dyn FnMut(u64, &[u8])) {
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
                // Shuffled, so that any of two overlapping writes can be applied last.
                for i in (1..open.len()).rev() {
                    open.swap(i, random.below(i + 1));
                }
                for (at, data) in open {
                    // Each write is whole, lost, or torn.
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

    /// Records that an operation begins: a write of bytes at an offset or, if `change` is `None`, a
    /// flush of all completed writes. Empty data extends a file up to the offset. For recorders
    /// other than [`Recorded`]. Returns the number to pass to [`complete`](Self::complete).
    pub fn submit(&self, change: Option<(u64, Arc<[u8]>)>) -> u64 {
        let mut log = self.log();
        let id = log.next;
        log.next += 1;
        log.events.push(Event::Begun { id, change });
        id
    }

    /// Records that an operation ended, and whether it succeeded.
    pub fn complete(&self, id: u64, done: bool) {
        self.log().events.push(Event::Over { id, done });
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Change = (u64, Arc<[u8]>);

/// Separates the changes that are durable, in order, from those that may be lost.
fn tell_apart(events: &[Event]) -> (Vec<Change>, Vec<Change>) {
    let mut durable = Vec::new();
    // By number: the change, and whether it has completed.
    let mut open: BTreeMap<u64, (Change, bool)> = BTreeMap::new();
    // By number: the changes that each flush covers.
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
                    // A failed write may have been executed in part; no flush makes it durable.
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

/// An engine that records changes before it submits them and when they complete.
pub struct Recorded<E> {
    engine: E,
    record: Arc<Record>,
    /// By tag: the numbers of operations in flight.
    ids: Vec<Option<u64>>,
}

impl<E> Recorded<E> {
    /// Wraps an engine with a record. The record keeps all written data in memory.
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
                    // Bytes outside of the segment's memory are not written by any engine.
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
        // Recorded before submission: when `submit` returns, the change may already be durable.
        let id = self.record.submit(change);
        if let Err(full) = self.engine.submit(tag, io, segments) {
            self.record.complete(id, false);
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
                record.complete(id, result.is_ok());
            }
            done(tag, result, segments);
        });
    }
}

impl<E: WaitPoint> Wrapper for Recorded<E> {
    type Inner = E;

    fn inner(&mut self) -> &mut E {
        &mut self.engine
    }
}
