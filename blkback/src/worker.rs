//! One thread per queue, whose only wait point is the engine's io_uring.

use crate::engine::uring::Watch;
use crate::engine::wait::{DiskEngine, WaitEngine};
use crate::image::Image;
use crate::pages::Buf;
use crate::queue::{Progress, Queue, QueueFault, QueueParts};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use pvio_event_channel::EventChannel;
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::shm::SharedMemory;
use pvio_uring::Spin;
use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::string::String;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Requests taken before answers are published.
const BUDGET: u32 = 128;
/// How long a worker sleeps at most while it keeps pages mapped that nobody may need.
const GLANCE: Duration = Duration::from_secs(10);
/// How often a worker that is never idle looks at the clock.
const TURNS: u32 = 1024;
/// How long a stopping worker waits for requests already begun.
const DRAIN: Duration = Duration::from_secs(30);

/// A running worker. Dropping it stops it and waits until every request it began is over.
#[derive(Debug)]
pub struct Worker {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Closing it wakes the worker to see `stop`.
    wake: Option<PipeWriter>,
    outcome: Receiver<QueueFault>,
}

impl Worker {
    /// Starts a thread that serves a queue from an image. `ended` is called by that thread if the
    /// queue ends by a fault, which [`fault`](Self::fault) then gives.
    ///
    /// # Errors
    /// What the system says when it has no thread, descriptor or io_uring to give.
    pub fn start<P, C, R>(
        name: &str,
        parts: QueueParts<P, C, R>,
        image: Arc<Image>,
        ended: impl FnOnce() + Send + 'static,
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
            // Made here: an io_uring belongs to the thread that uses it.
            let depth = parts.ring.layout().slots();
            let mut engine = match image.engine(depth) {
                Ok(engine) => engine,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let event = engine.watch(event);
            engine.watch(woken.into());
            let _ = ready.send(Ok(()));
            let mut queue = Queue::new(parts, engine);
            if let Err(fault) = serve(&mut queue, event, &stopped) {
                let _ = tell.send(fault);
                ended();
            }
        })?;
        let worker = Self { thread: Some(thread), stop, wake: Some(wake), outcome };
        match made.recv() {
            Ok(Ok(())) => Ok(worker),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the worker thread ended at once")),
        }
    }

    /// Why the queue ended by itself, if it did.
    #[must_use]
    pub fn fault(&self) -> Option<QueueFault> {
        self.outcome.try_recv().ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        drop(self.wake.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a disk worker panicked");
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
        // Asked every turn: a busy guest never lets us sleep.
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
        // With I/O under way the kernel has something to wake us for; spinning is for the guest's
        // next request.
        if queue.in_flight() == 0 && spin.until(|| queue.has_requests())? {
            continue;
        }
        if queue.final_check()? {
            continue;
        }
        spin.sleeping();
        queue.tick(begin.elapsed());
        let most = (queue.kept_pages() > 0).then_some(GLANCE);
        queue.engine_mut().wait(most).map_err(os_error)?;
        // Watches are known to have fired when completions were taken.
        queue.poll(0)?;
        if queue.engine_mut().fired(event) {
            queue.stats().wakeups.add(1);
            queue.channel().take()?;
        }
    }
}

/// Answers what was begun, takes nothing new.
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
