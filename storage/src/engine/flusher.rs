//! The thread that flushes a disk for all of its queues, one flush at a time.
//!
//! Linux reports a failed write-back to only one of the callers that flush the same open file. If
//! two queues flushed at a time, the one that does not see the error would report lost data as
//! durable. One flush serves all queues that are waiting when it begins.

use super::offload::{Executor, Job};
use super::store::Store;
use super::{EngineError, FlushState, Io, store, threads};
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

const EIO: i32 = 5;

/// Handle of the thread that flushes a disk. Dropping it waits for the flush in flight.
pub struct Flusher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: Vec<Job>,
    stop: bool,
    /// Whether the thread has ended, by `stop` or by a panic: no job is taken any more.
    ended: bool,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flusher {
    /// Starts the thread. A failed flush is recorded in `state`.
    ///
    /// # Errors
    /// The system's error if it cannot create a thread.
    pub fn start(store: Arc<dyn Store>, state: Arc<FlushState>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = threads::start("flush", move || {
            let _ended = Ended(&theirs);
            serve(&theirs, &*store, &state);
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Executor for Flusher {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        let mut waiting = self.shared.waiting();
        for job in jobs {
            match job.io {
                _ if waiting.ended => job.finish(Err(EngineError::Lost)),
                Io::Flush => waiting.jobs.push(job),
                _ => job.finish(Err(EngineError::Unsupported)),
            }
        }
        drop(waiting);
        self.shared.changed.notify_one();
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.shared.waiting().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Fails the waiting jobs when the thread ends, also by a panic.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.ended = true;
        let jobs = core::mem::take(&mut waiting.jobs);
        drop(waiting);
        jobs.into_iter().for_each(|job| job.finish(Err(EngineError::Lost)));
    }
}

fn serve(shared: &Shared, store: &dyn Store, state: &FlushState) {
    let mut jobs = Vec::new();
    loop {
        let mut waiting = shared.waiting();
        while waiting.jobs.is_empty() && !waiting.stop {
            waiting = shared.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        core::mem::swap(&mut waiting.jobs, &mut jobs);
        drop(waiting);
        if jobs.is_empty() {
            return;
        }
        let known = state.has_failed();
        let result = state.flush(|| {
            let flushed = catch_unwind(AssertUnwindSafe(|| store.flush()));
            flushed.unwrap_or_else(|_| Err(io::Error::from_raw_os_error(EIO)))
        });
        if let Err(error) = &result
            && !known
        {
            tracing::error!(%error, "flush failed: data that a guest wrote may be lost");
        }
        let result = result.map_err(|error| store::engine_error(&error));
        jobs.drain(..).for_each(|job| job.finish(result));
    }
}

/// An executor that passes flushes to a [`Flusher`].
pub struct Flushed {
    flusher: Arc<Flusher>,
    others: Arc<dyn Executor>,
}

impl Flushed {
    /// Creates an executor that passes all operations except flushes to `others`.
    #[must_use]
    pub fn new(flusher: Arc<Flusher>, others: Arc<dyn Executor>) -> Self {
        Self { flusher, others }
    }
}

impl Executor for Flushed {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        let mut others = jobs.filter_map(|job| match job.io {
            Io::Flush => {
                self.flusher.execute(&mut core::iter::once(job));
                None
            }
            _ => Some(job),
        });
        self.others.execute(&mut others);
    }
}
