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
use pvio_runtime::sync::{Condvar, Mutex, MutexGuard};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
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

/// Model of the thread, in every interleaving (`cargo xtask test loom`).
#[cfg(all(loom, test))]
mod model {
    use super::*;
    use crate::engine::offload::Blocking;
    use loom::thread;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Fails or panics from the second flush on.
    struct Failing {
        flushes: AtomicUsize,
        panics: bool,
    }

    impl Store for Failing {
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Ok(())
        }

        fn discard(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            match self.flushes.fetch_add(1, Ordering::Relaxed) {
                0 => Ok(()),
                _ if self.panics => std::panic::resume_unwind(alloc::boxed::Box::new(())),
                _ => Err(io::Error::from_raw_os_error(EIO)),
            }
        }
    }

    fn check(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    #[test]
    fn every_flush_is_finished_although_the_thread_stops() {
        for panics in [false, true] {
            check(move || {
                let shared = Arc::new(Shared::default());
                let (flushes, state) = (AtomicUsize::new(0), Arc::new(FlushState::default()));
                let thread = {
                    let (shared, state) = (Arc::clone(&shared), Arc::clone(&state));
                    thread::spawn(move || {
                        let _ended = Ended(&shared);
                        serve(&shared, &Failing { flushes, panics }, &state);
                    })
                };
                let flusher = Arc::new(Flusher { shared: Arc::clone(&shared), thread: None });
                let queue = Blocking::new(Arc::clone(&flusher) as Arc<dyn Executor>, 1).unwrap();
                let other = thread::spawn(move || [queue.flush().is_ok(), queue.flush().is_ok()]);
                // The last handle stops the thread: this one or that of the queue.
                drop(flusher);
                let [first, second] = other.join().unwrap();
                thread.join().unwrap();
                assert!(first && !second, "the second flush fails");
                assert!(state.has_failed(), "a failed flush was forgotten");
                let late = Flusher { shared, thread: None };
                let late = Blocking::new(Arc::new(late), 1).unwrap();
                assert!(late.flush().is_err(), "no thread is left");
            });
        }
    }
}
