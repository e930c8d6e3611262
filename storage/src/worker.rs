//! One thread per queue, whose only wait point is the engine's io_uring.

use crate::engine::uring::Watch;
use crate::engine::wait::{DiskEngine, WaitEngine};
use crate::image::Image;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Poll;
use pvio_blkback::pages::Buf;
use pvio_blkback::queue::{Progress, Queue, QueueFault, QueueParts};
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::shm::SharedMemory;
use pvio_runtime::Spin;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::String;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Maximum number of requests to take before responses are published.
const BUDGET: u32 = 128;
/// Maximum time that a worker waits while it has cached mappings, which it must evict when idle.
const GLANCE: Duration = Duration::from_secs(10);
/// Number of polls after which a worker that is never idle reads the clock.
const TURNS: u32 = 1024;
/// Maximum time that a stopping worker waits for requests in flight.
const DRAIN: Duration = Duration::from_secs(30);

/// A running worker. Dropping it stops it and waits until every request in flight has completed. A
/// caller that must not block calls [`stop`](Self::stop) first.
#[derive(Debug)]
pub struct Worker {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Closing it wakes the worker, which then reads `stop`.
    wake: Option<PipeWriter>,
    made: Receiver<io::Result<()>>,
    serves: bool,
    outcome: Receiver<Option<QueueFault>>,
    /// Whether the outcome was received: the thread has released all resources.
    over: bool,
}

impl Worker {
    /// Starts a thread that serves a queue from an image, and waits until it is ready. For `news`
    /// see [`spawn`](Self::spawn).
    ///
    /// # Errors
    /// The system's error if it has no thread, descriptor or io_uring.
    pub fn start<P, C, R>(
        name: &str,
        parts: QueueParts<P, C, R>,
        image: Arc<Image>,
        news: impl Fn() + Send + 'static,
    ) -> io::Result<Self>
    where
        P: GrantMapper + GrantCopier + Send + 'static,
        C: EventChannel + AsFd + Send + 'static,
        R: SharedMemory + Clone + Send + 'static,
    {
        let mut worker = Self::spawn(name, parts, image, news)?;
        worker.made.recv().unwrap_or_else(|_| Err(ended_at_once()))?;
        worker.serves = true;
        Ok(worker)
    }

    /// Starts a thread that serves a queue from an image. The thread calls `news` when the worker
    /// is [ready](Self::ready), and when it has ended, for whatever reason.
    ///
    /// # Errors
    /// The system's error if it has no thread or descriptor.
    pub fn spawn<P, C, R>(
        name: &str,
        parts: QueueParts<P, C, R>,
        image: Arc<Image>,
        news: impl Fn() + Send + 'static,
    ) -> io::Result<Self>
    where
        P: GrantMapper + GrantCopier + Send + 'static,
        C: EventChannel + AsFd + Send + 'static,
        R: SharedMemory + Clone + Send + 'static,
    {
        let (woken, wake) = io::pipe()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let event = parts.channel.as_fd().try_clone_to_owned()?;
        let (tell, outcome) = sync_channel(1);
        let (ready, made) = sync_channel(1);
        let thread = Builder::new().name(String::from(name)).spawn(move || {
            let ready = Ready { made: ready, news: &news };
            let files = (event, woken);
            let work = || run(parts, &image, files, &stopped, ready);
            // `run` releases everything that the queue holds, also on a panic.
            let outcome = catch_unwind(AssertUnwindSafe(work));
            drop(image);
            let _ = tell.send(outcome.unwrap_or(Err(QueueFault::Panicked)).err());
            news();
        })?;
        let wake = Some(wake);
        Ok(Self { thread: Some(thread), stop, wake, made, serves: false, outcome, over: false })
    }

    /// Returns whether the worker serves the queue.
    ///
    /// # Errors
    /// The system's error if it has no io_uring, or the error of creating the image's engine.
    pub fn ready(&mut self) -> Poll<io::Result<()>> {
        if self.serves {
            return Poll::Ready(Ok(()));
        }
        match self.made.try_recv() {
            Ok(outcome) => {
                self.serves = outcome.is_ok();
                Poll::Ready(outcome)
            }
            Err(TryRecvError::Empty) => Poll::Pending,
            Err(TryRecvError::Disconnected) => Poll::Ready(Err(ended_at_once())),
        }
    }

    /// Returns the fault that ended the queue, if one did; reported once.
    #[must_use]
    pub fn fault(&mut self) -> Option<QueueFault> {
        let outcome = self.outcome.try_recv().ok()?;
        self.over = true;
        outcome
    }

    /// Stops the worker, which completes the requests in flight. Called again until it is ready:
    /// the worker then holds no resources, and dropping it does not block.
    pub fn stop(&mut self) -> Poll<()> {
        self.stop.store(true, Ordering::Release);
        drop(self.wake.take());
        self.over |= !matches!(self.outcome.try_recv(), Err(TryRecvError::Empty));
        if self.over { Poll::Ready(()) } else { Poll::Pending }
    }
}

fn ended_at_once() -> io::Error {
    io::Error::other("the worker thread ended at once")
}

/// Reports that a worker is ready, or why it cannot serve.
struct Ready<'a, F: Fn()> {
    made: SyncSender<io::Result<()>>,
    news: &'a F,
}

impl<F: Fn()> Ready<'_, F> {
    fn tell(self, outcome: io::Result<()>) {
        let _ = self.made.send(outcome);
        (self.news)();
    }
}

/// Runs a worker.
fn run<P, C, R>(
    parts: QueueParts<P, C, R>,
    image: &Image,
    (event, woken): (OwnedFd, PipeReader),
    stop: &AtomicBool,
    ready: Ready<'_, impl Fn()>,
) -> Result<(), QueueFault>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    R: SharedMemory + Clone,
{
    // Created on this thread, because an io_uring belongs to the thread that uses it.
    let depth = parts.ring.layout().slots();
    let mut engine = match image.engine(depth) {
        Ok(engine) => engine,
        Err(error) => {
            ready.tell(Err(error));
            return Ok(());
        }
    };
    if parts.record.is_taken_over() && image.settle().is_err() {
        parts.record.note_failed_flush();
    }
    let event = engine.watch(event);
    engine.watch(woken.into());
    ready.tell(Ok(()));
    serve(&mut Queue::new(parts, engine), event, stop)
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic is part of the outcome.
            let _ = thread.join();
        }
    }
}

type WorkerQueue<P, C, R> = Queue<P, C, DiskEngine<Buf<<P as GrantMapper>::Mapping>>, R>;

fn serve<P, C, R>(
    queue: &mut WorkerQueue<P, C, R>,
    event: Watch,
    stop: &AtomicBool,
) -> Result<(), QueueFault>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    R: SharedMemory + Clone,
{
    let mut spin = Spin::default();
    let begin = Instant::now();
    let mut turns = 0_u32;
    loop {
        // Checked in every iteration, because a worker with a busy guest never waits.
        if stop.load(Ordering::Acquire) {
            return finish(queue);
        }
        if queue.poll(BUDGET)? == Progress::Some {
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS) {
                queue.tick(begin.elapsed());
            }
            continue;
        }
        // With I/O in flight, a completion wakes the worker; spinning is only useful for the
        // guest's next request.
        if queue.in_flight() == 0 && spin.until(|| queue.has_work())? {
            continue;
        }
        if queue.final_check()? {
            continue;
        }
        spin.sleeping();
        queue.tick(begin.elapsed());
        let most = (queue.cached_mappings() > 0).then_some(GLANCE);
        queue.engine_mut().wait(most).map_err(os_error)?;
        // Watches are marked as fired when completions are collected.
        queue.poll(0)?;
        if queue.engine_mut().fired(event) {
            queue.stats().wakeups.add(1);
            queue.channel().take()?;
        }
    }
}

/// Completes requests in flight without taking new ones.
fn finish<P, C, R>(queue: &mut WorkerQueue<P, C, R>) -> Result<(), QueueFault>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    R: SharedMemory + Clone,
{
    queue.drain();
    let begin = Instant::now();
    while !queue.is_drained() && begin.elapsed() < DRAIN {
        queue.engine_mut().wait(Some(Duration::from_millis(100))).map_err(os_error)?;
        queue.poll(0)?;
    }
    queue.poll(0).map(drop)
}

fn os_error(error: io::Error) -> QueueFault {
    QueueFault::Wait(error.raw_os_error().unwrap_or_default())
}
