//! An engine whose operations are executed elsewhere: by other threads, or by a server.
//!
//! Data passes through private buffers and is copied by the queue's own thread: out of guest memory
//! once, when a write is submitted, and into it once, when a read has completed. No other thread
//! accesses guest memory.
//!
//! # Memory
//! All buffers of a queue have at most [`DATA_MOST`] bytes. An operation with more than
//! [`JOB_MOST`] is split into several jobs; jobs without a buffer wait for others to complete.

mod blocking;
mod buffers;
mod completions;
mod thread_pool;
mod usage;

pub(crate) use blocking::Blocking;
pub use buffers::{DATA_MOST, JOB_MOST};
pub use thread_pool::ThreadPool;
pub use usage::BudgetUsage;

use super::lists::SpareLists;
use super::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use buffers::Buffers;
use completions::Completions;
use pvio_ring::shm::{Region, SharedMemory};
use pvio_runtime::EventFd;
use std::io;
use std::os::fd::OwnedFd;
use usage::QueueUsage;

const EFAULT: i32 = 14;

/// An operation, or a part of a large one, to be executed by an executor.
#[derive(Debug)]
pub struct Job {
    /// The operation.
    pub io: Io,
    /// The data to write, or a buffer of the right length for a read.
    pub data: Vec<u8>,
    part: Part,
    /// `None` after the job is finished.
    to: Option<Arc<Completions>>,
}

/// The part of an operation's data that a job transfers.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    tag: u32,
    place: Place,
    len: usize,
}

/// A position in an operation's segments.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    segment: usize,
    /// Offset from the segment's first byte.
    skip: usize,
}

impl Job {
    /// Completes the job and returns `data` to the queue.
    pub fn finish(mut self, result: Result<(), EngineError>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<(), EngineError>) {
        if let Some(to) = self.to.take() {
            to.push(Finished { part: self.part, result, data: core::mem::take(&mut self.data) });
        }
    }
}

impl Drop for Job {
    /// A job that is dropped unfinished was lost by a panic in its executor.
    fn drop(&mut self) {
        self.end(Err(EngineError::Lost));
    }
}

#[derive(Debug)]
struct Finished {
    part: Part,
    result: Result<(), EngineError>,
    data: Vec<u8>,
}

/// Executes operations outside of the queue's thread. Every job must be [finished](Job::finish), in
/// any order; a job that is dropped fails with [`EngineError::Lost`], which ends its queue.
pub trait Executor: Send + Sync {
    /// Submits a batch of jobs. Never blocks.
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>);
}

/// The queue's side: the engine.
pub struct Offload<B> {
    geometry: Geometry,
    executor: Arc<dyn Executor>,
    completions: Arc<Completions>,
    /// Operations in flight, by tag.
    pending: Vec<Option<Pending<B>>>,
    /// Tags of operations with data that is not submitted, in the order of submission.
    waiting: VecDeque<u32>,
    batch: Vec<Job>,
    finished: Vec<Finished>,
    buffers: Buffers,
    lists: SpareLists<B>,
    /// Number of unfinished jobs.
    jobs: usize,
    usage: QueueUsage,
}

/// An operation in flight.
struct Pending<B> {
    io: Io,
    segments: Segments<B>,
    /// Bytes of data that are not submitted, and their position.
    left: usize,
    next: Place,
    /// Number of sectors before that position.
    sectors: u64,
    /// Number of unfinished jobs.
    jobs: u32,
    result: Result<(), EngineError>,
}

impl<B> Offload<B> {
    /// Creates an engine for `depth` operations at a time, whose jobs are counted in `usage`.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn new(
        executor: Arc<dyn Executor>,
        geometry: Geometry,
        depth: u32,
        usage: &Arc<BudgetUsage>,
    ) -> io::Result<Self> {
        Ok(Self {
            geometry,
            executor,
            completions: Arc::new(Completions::new(EventFd::new()?)),
            pending: (0..depth).map(|_| None).collect(),
            batch: Vec::with_capacity(depth as usize),
            finished: Vec::with_capacity(depth as usize),
            waiting: VecDeque::with_capacity(depth as usize),
            buffers: Buffers::default(),
            lists: SpareLists::default(),
            jobs: 0,
            usage: QueueUsage::new(Arc::clone(usage), depth),
        })
    }

    /// Returns a descriptor that is readable while there are completions to reap.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn completions(&self) -> io::Result<OwnedFd> {
        self.completions.event.to_fd()
    }
}

impl<B: SharedMemory> BlockEngine<B> for Offload<B> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let Some(pending) = self.pending.get_mut(tag as usize) else { return Err(Full) };
        let left = match io {
            Io::Read { .. } | Io::Write { .. } => segments.iter().map(|s| s.len).sum(),
            _ => 0,
        };
        let segments = self.lists.list(segments);
        let (next, sectors, jobs, result) = (Place::default(), 0, 0, Ok(()));
        let pending = pending.insert(Pending { io, segments, left, next, sectors, jobs, result });
        if left > 0 {
            self.waiting.push_back(tag);
            self.send();
        } else {
            pending.jobs = 1;
            self.jobs += 1;
            let part = Part { tag, ..Part::default() };
            let to = Some(Arc::clone(&self.completions));
            self.batch.push(Job { io, data: Vec::new(), part, to });
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.usage.set(self.jobs, self.buffers.bytes());
        if !self.batch.is_empty() {
            self.executor.execute(&mut self.batch.drain(..));
        }
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        loop {
            self.completions.take(&mut self.finished);
            let mut finished = core::mem::take(&mut self.finished);
            for Finished { part, result, data } in finished.drain(..) {
                self.finish(part, result, data, done);
            }
            self.finished = finished;
            self.send();
            if self.finished.is_empty() {
                break;
            }
        }
        // Submits operations that waited for buffers.
        self.kick();
    }
}

impl<B: SharedMemory> Offload<B> {
    /// Creates jobs for waiting operations while there are buffers.
    fn send(&mut self) {
        while let Some(&tag) = self.waiting.front() {
            let pending = self.pending.get_mut(tag as usize).and_then(Option::as_mut);
            let Some(pending) = pending.filter(|pending| pending.left > 0) else {
                self.waiting.pop_front();
                continue;
            };
            let len = pending.left.min(JOB_MOST);
            let Some(mut data) = self.buffers.take(len) else { break };
            let part = Part { tag, place: pending.next, len };
            let io = pending.part_from();
            let moved = match io {
                Io::Write { .. } => {
                    walk(&pending.segments, part.place, &mut data, |seg, at, bytes| {
                        seg.read_bytes(at, bytes)
                    })
                }
                _ => walk(&pending.segments, part.place, &mut data, |_, _, _| Some(())),
            };
            pending.jobs += 1;
            self.jobs += 1;
            pending.left -= len;
            pending.sectors += (len / 512) as u64;
            match moved {
                Some(next) => {
                    pending.next = next;
                    let to = Some(Arc::clone(&self.completions));
                    self.batch.push(Job { io, data, part, to });
                }
                None => self.finished.push(Finished {
                    part,
                    result: Err(EngineError::Os(EFAULT)),
                    data,
                }),
            }
        }
    }

    /// Processes a finished job and, with its last job, completes the operation.
    fn finish(
        &mut self,
        part: Part,
        mut result: Result<(), EngineError>,
        mut data: Vec<u8>,
        done: &mut Done<'_, B>,
    ) {
        let Some(slot) = self.pending.get_mut(part.tag as usize) else { return };
        let Some(pending) = slot else { return };
        if matches!(pending.io, Io::Read { .. }) && result.is_ok() {
            let copied = walk(&pending.segments, part.place, &mut data, |seg, at, bytes| {
                seg.write_bytes(at, bytes)
            });
            result = copied.map(drop).ok_or(EngineError::Os(EFAULT));
        }
        if part.len > 0 {
            self.buffers.give_back(data, part.len);
        }
        pending.jobs -= 1;
        self.jobs -= 1;
        if result.is_err() {
            // The remaining data is not submitted after an error.
            pending.left = 0;
            pending.result = pending.result.and(result);
        }
        if pending.jobs == 0
            && pending.left == 0
            && let Some(mut over) = slot.take()
        {
            done(part.tag, over.result, &mut over.segments);
            self.lists.keep(over.segments);
        }
    }
}

impl<B> Pending<B> {
    /// Returns the rest of the operation, from the first byte that is not submitted.
    fn part_from(&self) -> Io {
        match self.io {
            Io::Read { sector } => Io::Read { sector: sector.saturating_add(self.sectors) },
            Io::Write { sector } => Io::Write { sector: sector.saturating_add(self.sectors) },
            other => other,
        }
    }
}

/// Iterates over segments from a position, and calls `each` for the parts of a buffer that lie in
/// one segment. Returns the position after them. `None` if the segments are too short, or if `each`
/// returns it.
fn walk<B: SharedMemory>(
    segments: &Segments<B>,
    mut place: Place,
    data: &mut [u8],
    mut each: impl FnMut(&B, usize, &mut [u8]) -> Option<()>,
) -> Option<Place> {
    let mut rest = data;
    while !rest.is_empty() {
        let seg = segments.get(place.segment)?;
        let there = seg.len.checked_sub(place.skip)?;
        let (part, after) = rest.split_at_mut(there.min(rest.len()));
        each(&seg.buf, seg.offset.checked_add(place.skip)?, part)?;
        place = match part.len() == there {
            true => Place { segment: place.segment + 1, skip: 0 },
            false => Place { skip: place.skip + part.len(), ..place },
        };
        rest = after;
    }
    Some(place)
}
