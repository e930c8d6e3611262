//! A thread pool that executes the operations of a [`Store`], for all queues of a disk.

use super::{Executor, Job};
use crate::engine::store::{Store, engine_error};
use crate::engine::{EngineError, Io, threads};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use crossbeam_channel::{Receiver, Sender, unbounded};
use pvio_runtime::LogLimit;
use pvio_runtime::retry;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

/// The thread pool. Dropping it waits for the operations in progress, and closes the store.
pub struct ThreadPool {
    failures: Arc<LogLimit>,
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadPool {
    /// Starts `count` threads, whose names begin with `name`.
    ///
    /// # Errors
    /// The system's error if it cannot create a thread.
    pub fn start(name: &str, count: usize, store: Arc<dyn Store>) -> io::Result<Self> {
        // Bounded by the sum of the queues' depths: they submit no more.
        let (send, jobs) = unbounded::<Job>();
        let broken = Arc::new(AtomicBool::new(false));
        let threads = Vec::with_capacity(count);
        let mut pool = Self { failures: Arc::default(), jobs: Some(send), threads };
        for _ in 0..count {
            let (jobs, store, broken) = (jobs.clone(), Arc::clone(&store), Arc::clone(&broken));
            let failures = Arc::clone(&pool.failures);
            let work = move || serve(&jobs, &*store, &broken, &failures);
            pool.threads.push(threads::start(name, work)?);
        }
        Ok(pool)
    }

    /// Returns the counter of failed operations.
    #[must_use]
    pub const fn failures(&self) -> &Arc<LogLimit> {
        &self.failures
    }
}

impl Executor for ThreadPool {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        for job in jobs {
            if let Some(send) = &self.jobs {
                // The threads take jobs until this sender is dropped. A job that no thread can take
                // is dropped, which completes it with an error.
                let _ = send.send(job);
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Executes jobs. A panic in a format's library makes the image unusable, but nothing else.
fn serve(jobs: &Receiver<Job>, store: &dyn Store, broken: &AtomicBool, failures: &LogLimit) {
    for mut job in jobs {
        if broken.load(Ordering::Acquire) {
            job.finish(Err(EngineError::Lost));
            continue;
        }
        let result = catch_unwind(AssertUnwindSafe(|| match job.io {
            // The flusher handles interruption itself, once for all flushes that wait.
            Io::Flush => store.flush(),
            io => retry::blocking(|| perform(store, io, &mut job.data)),
        }));
        let result = result.unwrap_or_else(|_| {
            broken.store(true, Ordering::Release);
            tracing::error!("the library of an image format panicked: every further operation on the image fails");
            Err(io::Error::other(EngineError::Lost))
        });
        if let Err(error) = &result
            && let Some(unlogged) = failures.admit()
        {
            tracing::warn!(io = ?job.io, %error, unlogged, "operation failed");
        }
        job.finish(result.map_err(|e| engine_error(&e)));
    }
}

/// Executes one operation.
pub(super) fn perform(store: &dyn Store, io: Io, data: &mut [u8]) -> io::Result<()> {
    let bytes = |sectors: u64| {
        sectors.checked_mul(512).ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    match io {
        Io::Read { sector } => store.read(bytes(sector)?, data),
        Io::Write { sector } => store.write(bytes(sector)?, data),
        Io::Flush => store.flush(),
        Io::Discard { sector, sectors, secure: true } => {
            store.discard_securely(bytes(sector)?, bytes(sectors)?)
        }
        Io::Discard { sector, sectors, secure: false } => {
            store.discard(bytes(sector)?, bytes(sectors)?)
        }
        Io::WriteZeroes { sector, sectors } => store.write_zeroes(bytes(sector)?, bytes(sectors)?),
    }
}
