//! One thread per queue, whose only wait point is the tap's io_uring.
#![forbid(unsafe_code)]

use crate::Platform;
use crate::fault::QueueError;
use crate::port::tap::Tap;
use crate::port::tap_port::{TapPort, Watch};
use crate::queue::Queue;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use pvio_uring::{PrivateBuf, Spin};
use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

/// Packets moved each way between two looks at everything else.
const BUDGET: usize = 256;
/// How long packets wait for the buffers of a guest that will not say when it posts some
/// (Linux: `rx_drain_timeout` without `feature-rx-notify`).
const DRAIN: Duration = Duration::from_millis(30);
/// A running worker. Dropping it stops it; the rings are unmapped then.
#[derive(Debug)]
pub struct Worker {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Closing it wakes the worker to see `stop`.
    wake: Option<PipeWriter>,
    outcome: Receiver<WorkerError>,
}

/// Why a worker ended by itself.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WorkerError {
    /// The queue cannot go on.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The tap cannot be read any more (somebody removed the interface), or io_uring fails.
    #[error("the tap: {0}")]
    Tap(String),
}

impl WorkerError {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Queue(error) => error.code(),
            Self::Tap(_) => "tap-lost",
        }
    }
}

impl Worker {
    /// Starts a thread that moves packets between a queue and a tap. `ended` is called by that
    /// thread if it ends by itself, for the reason that [`error`](Self::error) then gives.
    ///
    /// # Errors
    /// What the system says when it has no thread, descriptor or io_uring to give.
    pub fn start<P>(
        name: &str,
        queue: Queue<P, PrivateBuf>,
        tap: Tap,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self>
    where
        P: Platform + Send + 'static,
        P::Channel: AsFd,
    {
        let (woken, wake) = io::pipe()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let events = queue.channels().map(|channel| channel.as_fd().try_clone_to_owned());
        let events = events.collect::<io::Result<Vec<OwnedFd>>>()?;
        let (tell, outcome) = sync_channel(1);
        let (ready, made) = sync_channel(1);
        let thread = Builder::new().name(String::from(name)).spawn(move || {
            // Made here: an io_uring belongs to the thread that uses it.
            let mut port = match TapPort::new(tap, Arc::clone(queue.stats())) {
                Ok(port) => port,
                Err(error) => return drop(ready.send(Err(error))),
            };
            // One for each channel, of which there are two at most, and the pipe.
            let events: Vec<Watch> = events.into_iter().filter_map(|e| port.watch(e)).collect();
            port.watch(woken.into());
            let _ = ready.send(Ok(()));
            let mut serving = Serving { queue, port, events };
            if let Err(error) = serving.serve(&stopped) {
                let _ = tell.send(error);
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

    /// Why the worker ended by itself, if it did; told once.
    #[must_use]
    pub fn error(&self) -> Option<WorkerError> {
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
            tracing::error!("a network worker panicked");
        }
    }
}

/// Dropped in this order: first the rings are unmapped, then the port waits for the kernel.
struct Serving<P: Platform> {
    queue: Queue<P, PrivateBuf>,
    port: TapPort,
    events: Vec<Watch>,
}

impl<P: Platform> Serving<P> {
    fn serve(&mut self, stop: &AtomicBool) -> Result<(), WorkerError> {
        let mut spin = Spin::default();
        // Asked every turn: a busy guest never lets us sleep.
        while !stop.load(Ordering::Acquire) {
            self.pump()?;
            if self.queue.poll(&mut self.port, BUDGET)?.any() {
                continue;
            }
            if spin.until(|| self.look())? || !self.queue.may_sleep()? {
                continue;
            }
            spin.sleeping();
            self.sleep()?;
        }
        Ok(())
    }

    /// Takes what the kernel has finished. Events are taken before the rings are looked at, so
    /// that what comes after the look raises a new one; tells whether there was any.
    fn pump(&mut self) -> Result<bool, WorkerError> {
        self.port.pump().map_err(tap_lost)?;
        self.queue.unblock();
        let mut fired = false;
        for &event in &self.events {
            fired |= self.port.fired(event);
        }
        if fired {
            self.queue.take_events()?;
        }
        Ok(fired)
    }

    /// Whether there is something to do on either side.
    fn look(&mut self) -> Result<bool, WorkerError> {
        Ok(self.queue.has_work()? || self.port.look().map_err(tap_lost)?)
    }

    /// Waits for an event of the guest, a packet, or the end.
    fn sleep(&mut self) -> Result<(), WorkerError> {
        let waits_unseen = self.queue.backlog() > 0 && !self.queue.features().rx_notify;
        self.port.wait(waits_unseen.then_some(DRAIN)).map_err(tap_lost)?;
        self.queue.stats().count_wakeup();
        let fired = self.pump()?;
        if waits_unseen && !fired && !self.queue.has_work()? {
            self.queue.drop_backlog(&mut self.port);
        }
        Ok(())
    }
}

fn tap_lost(error: io::Error) -> WorkerError {
    WorkerError::Tap(alloc::format!("{error}"))
}
