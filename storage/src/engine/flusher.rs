//! The thread that flushes a disk for all of its queues, one flush at a time.
//!
//! Linux reports a failed write-back to only one of the callers that flush the same open file. If
//! two queues flushed at a time, the one that does not see the error would report lost data as
//! durable. One flush serves all queues that are waiting when it begins.
//!
//! If no write has completed since the last successful flush began, a flush has nothing to do: the
//! device is not told. Otherwise, a guest that only flushes would slow down everyone who uses the
//! host's device. QEMU does the same.

use super::offload::{Executor, Job};
use super::store::Store;
use super::{EngineError, FlushState, Io, store, threads};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_runtime::sync::atomic::{AtomicBool, Ordering};
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

struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Whether a write may have completed after the last successful flush began. An earlier process
    /// may have written, too.
    unflushed: AtomicBool,
}

impl Default for Shared {
    fn default() -> Self {
        let (waiting, changed) = (Mutex::default(), Condvar::default());
        Self { waiting, changed, unflushed: AtomicBool::new(true) }
    }
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

    /// Records that a write has completed, before its completion is announced to anyone.
    pub fn mark_written(&self) {
        let unflushed = &self.shared.unflushed;
        // Sequentially consistent: a flush that clears it after this load begins after the write.
        // Only the first write after a flush changes the cache line that all queues share.
        if !unflushed.load(Ordering::SeqCst) {
            unflushed.store(true, Ordering::SeqCst);
        }
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
        // A failed flush fails all later ones, so the mark need not be restored.
        let needed = shared.unflushed.swap(false, Ordering::SeqCst);
        let result = state.flush(|| {
            if !needed {
                return Ok(());
            }
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::engine::offload::Blocking;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Counting(AtomicUsize);

    impl Store for Counting {
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
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn flush_reaches_the_store_once_after_each_write() {
        let store = Arc::new(Counting::default());
        let flusher = Arc::new(Flusher::start(store.clone(), Arc::default()).unwrap());
        let queue = Blocking::new(flusher.clone(), 1).unwrap();
        let flushes = |times: usize| {
            (0..times).for_each(|_| queue.flush().unwrap());
            store.0.load(Ordering::Relaxed)
        };
        // An earlier process may have written.
        assert_eq!(flushes(3), 1);
        flusher.mark_written();
        flusher.mark_written();
        assert_eq!(flushes(3), 2);
        assert_eq!(flushes(1), 2);
    }
}

/// Model of the thread, in every interleaving (`cargo xtask test loom`).
#[cfg(all(loom, test))]
mod model {
    use super::*;
    use crate::engine::offload::Blocking;
    use loom::thread;
    use std::sync::atomic::AtomicUsize;

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
                let marks = Arc::downgrade(&flusher);
                let other = thread::spawn(move || {
                    let first = queue.flush().is_ok();
                    // A write of another queue, whose handle of the thread may be the last one.
                    marks.upgrade().iter().for_each(|flusher| flusher.mark_written());
                    [first, queue.flush().is_ok()]
                });
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
