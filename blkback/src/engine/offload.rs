//! An engine whose operations are done elsewhere: by other threads, or at the end of a socket.
//!
//! Data goes through private buffers, copied by the queue's own thread: out of the guest's memory
//! once, when a write is begun, and into it once, when a read is over. The guest's memory is never
//! seen by another thread.

use super::store::Store;
use super::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::{Region, SharedMemory};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Buffers up to this size are kept for the next operation.
const KEEP: usize = 128 << 10;
const EFAULT: i32 = 14;

/// One operation, on its way to whoever does it.
#[derive(Debug)]
pub struct Job {
    /// What to do.
    pub io: Io,
    /// What to write; what a read fills, of the right length already.
    pub data: Vec<u8>,
    tag: u32,
    /// `None` once it is finished.
    to: Option<Arc<Completions>>,
}

impl Job {
    /// It is over: `data` goes back to the queue.
    pub fn finish(mut self, result: Result<(), EngineError>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<(), EngineError>) {
        if let Some(to) = self.to.take() {
            to.push(Finished { tag: self.tag, result, data: core::mem::take(&mut self.data) });
        }
    }
}

impl Drop for Job {
    /// One that nobody finished was dropped by a panic of whoever had it.
    fn drop(&mut self) {
        self.end(Err(EngineError::Lost));
    }
}

#[derive(Debug)]
struct Finished {
    tag: u32,
    result: Result<(), EngineError>,
    data: Vec<u8>,
}

/// Does operations elsewhere. Every job must be [finished](Job::finish), in any order; one that is
/// dropped fails with [`EngineError::Lost`], which ends its queue.
pub trait Executor: Send + Sync {
    /// Takes a batch of jobs; never blocks.
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>);
}

/// An executor called as a [`Store`]: each call waits for its one operation.
pub(crate) struct Blocking(pub Arc<dyn Executor>);

impl Blocking {
    fn call(&self, io: Io, data: Vec<u8>) -> io::Result<Vec<u8>> {
        // Reading the eventfd waits: there is nothing else to wait for.
        let to = Arc::new(Completions::new(EventfdFlags::empty())?);
        let job = Job { io, data, tag: 0, to: Some(Arc::clone(&to)) };
        self.0.execute(&mut core::iter::once(job));
        while rustix::io::read(&to.event, &mut [0u8; 8]) == Err(Errno::INTR) {}
        let over = to.over().pop();
        let over = over.ok_or_else(|| io::Error::other("an operation got lost"))?;
        match over.result {
            Ok(()) => Ok(over.data),
            Err(EngineError::Os(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Err(EngineError::Short) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(EngineError::Unsupported) => Err(io::ErrorKind::Unsupported.into()),
            Err(EngineError::Lost) => Err(io::Error::other(EngineError::Lost)),
        }
    }
}

impl Store for Blocking {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let data = self.call(Io::Read { sector: at / 512 }, alloc::vec![0; into.len()])?;
        into.copy_from_slice(&data);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.call(Io::Write { sector: at / 512 }, from.to_vec()).map(drop)
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Io::Flush, Vec::new()).map(drop)
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        let io = Io::Discard { sector: at / 512, sectors: len / 512, secure: false };
        self.call(io, Vec::new()).map(drop)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.call(Io::WriteZeroes { sector: at / 512, sectors: len / 512 }, Vec::new()).map(drop)
    }
}

/// What is over, on its way back to the queue.
#[derive(Debug)]
struct Completions {
    over: Mutex<Vec<Finished>>,
    /// Readable from when the list has something in it until it is taken. Both happen under the
    /// lock, so that neither a completion nor the word of it can be missed.
    event: OwnedFd,
}

impl Completions {
    fn new(flags: EventfdFlags) -> io::Result<Self> {
        Ok(Self { over: Mutex::default(), event: eventfd(0, flags | EventfdFlags::CLOEXEC)? })
    }

    fn over(&self) -> MutexGuard<'_, Vec<Finished>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, finished: Finished) {
        let mut over = self.over();
        over.push(finished);
        if over.len() == 1 {
            // Cannot be full: it is written once between two reads.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    fn take(&self, into: &mut Vec<Finished>) {
        let mut over = self.over();
        if !over.is_empty() {
            while rustix::io::read(&self.event, &mut [0u8; 8]) == Err(Errno::INTR) {}
            into.append(&mut over);
        }
    }
}

/// The queue's end.
pub struct Offload<B> {
    geometry: Geometry,
    executor: Arc<dyn Executor>,
    completions: Arc<Completions>,
    /// By tag: where a read's data goes. Kept until the operation is over.
    pending: Vec<Option<(Segments<B>, bool)>>,
    batch: Vec<Job>,
    finished: Vec<Finished>,
    /// Reused: buffers, and lists of segments.
    buffers: Vec<Vec<u8>>,
    lists: Vec<Segments<B>>,
}

impl<B> Offload<B> {
    /// An engine for `depth` operations at a time.
    ///
    /// # Errors
    /// What the system says when it has no descriptor to give.
    pub fn new(executor: Arc<dyn Executor>, geometry: Geometry, depth: u32) -> io::Result<Self> {
        Ok(Self {
            geometry,
            executor,
            completions: Arc::new(Completions::new(EventfdFlags::NONBLOCK)?),
            pending: (0..depth).map(|_| None).collect(),
            batch: Vec::with_capacity(depth as usize),
            finished: Vec::with_capacity(depth as usize),
            buffers: Vec::new(),
            lists: Vec::new(),
        })
    }

    /// Readable while there is something to reap.
    ///
    /// # Errors
    /// What the system says when it has no descriptor to give.
    pub fn completions(&self) -> io::Result<OwnedFd> {
        self.completions.event.try_clone()
    }
}

impl<B: SharedMemory> BlockEngine<B> for Offload<B> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let Some(pending) = self.pending.get_mut(tag as usize) else { return Err(Full) };
        let len = match io {
            Io::Read { .. } | Io::Write { .. } => segments.iter().map(|s| s.len).sum(),
            _ => 0,
        };
        let mut data = self.buffers.pop().unwrap_or_default();
        data.resize(len, 0);
        let copied = match io {
            Io::Write { .. } => gather(segments, &mut data),
            _ => Some(()),
        };
        let mut list = self.lists.pop().unwrap_or_default();
        list.append(segments);
        *pending = Some((list, matches!(io, Io::Read { .. })));
        if copied.is_some() {
            self.batch.push(Job { io, data, tag, to: Some(Arc::clone(&self.completions)) });
        } else {
            self.finished.push(Finished { tag, result: Err(EngineError::Os(EFAULT)), data });
        }
        Ok(())
    }

    fn kick(&mut self) {
        if !self.batch.is_empty() {
            self.executor.execute(&mut self.batch.drain(..));
        }
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.completions.take(&mut self.finished);
        for Finished { tag, mut result, data } in self.finished.drain(..) {
            let pending = self.pending.get_mut(tag as usize).and_then(Option::take);
            let Some((mut segments, read)) = pending else { continue };
            if read && result.is_ok() && scatter(&segments, &data).is_none() {
                result = Err(EngineError::Os(EFAULT));
            }
            if data.capacity() <= KEEP {
                self.buffers.push(data);
            }
            done(tag, result, &mut segments);
            segments.clear();
            self.lists.push(segments);
        }
    }
}

/// Copies segments into a buffer of their length.
fn gather<B: SharedMemory>(segments: &Segments<B>, into: &mut [u8]) -> Option<()> {
    let mut rest = into;
    for seg in segments {
        let (part, left) = rest.split_at_mut_checked(seg.len)?;
        seg.buf.read_bytes(seg.offset, part)?;
        rest = left;
    }
    Some(())
}

/// Copies a buffer into segments of its length.
fn scatter<B: SharedMemory>(segments: &Segments<B>, from: &[u8]) -> Option<()> {
    let mut rest = from;
    for seg in segments {
        let (part, left) = rest.split_at_checked(seg.len)?;
        seg.buf.write_bytes(seg.offset, part)?;
        rest = left;
    }
    Some(())
}
