//! One thread per queue, whose only wait point is its port; for a tap, the tap's io_uring.
#![forbid(unsafe_code)]

use crate::NetPort;
use crate::wait::{Wait, Watch};
use alloc::borrow::Cow;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Poll;
use core::time::Duration;
use pvio_event_channel::BackendPlatform;
use pvio_netback::fault::QueueError;
use pvio_netback::queue::{Queue, Reception};
use pvio_netback::stats::Stats;
use pvio_ring::error::Remedy;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{Gather, Spin};
use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

/// Limit of packets moved in each direction per round.
const BUDGET: usize = 256;

/// Running worker. Dropping it stops it and waits until the rings are unmapped. A caller that must
/// not block [stops](Self::stop) it first.
#[derive(Debug)]
pub struct Worker {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Closing it wakes the worker, which then checks `stop`.
    wake: Option<PipeWriter>,
    made: Receiver<io::Result<()>>,
    serves: bool,
    outcome: Receiver<Option<WorkerError>>,
    /// The outcome was received: the thread has released everything.
    over: bool,
}

/// Event that a worker reports from its own thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum News {
    /// The guest has not received for a long time: no more packets should be sent to it.
    Stalled,
    /// The guest receives again.
    Ready,
    /// The worker runs or has failed to start; [`Worker::ready`] returns which.
    Begun,
    /// The worker has ended: because it was stopped, or for the reason in [`Worker::error`].
    Ended,
}

/// Reason why a worker ended on its own.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WorkerError {
    /// The queue cannot continue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The tap cannot be read any more (its interface was removed), or io_uring fails.
    #[error("the port cannot be used any more: {0}")]
    Tap(String),
    /// The worker panicked.
    #[error("the queue's worker thread panicked")]
    Panicked,
}

impl Remedy for WorkerError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Queue(error) => error.remedy(),
            Self::Tap(_) => {
                Some("check that its interface exists, then attach the NIC again".into())
            }
            Self::Panicked => Some("see the log, then attach the NIC again".into()),
        }
    }
}

impl WorkerError {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Queue(error) => error.code(),
            Self::Tap(_) => "tap-lost",
            Self::Panicked => "worker-panicked",
        }
    }
}

impl Worker {
    /// Starts a thread that moves packets between a queue and a port, and waits until it runs. The
    /// thread calls `make` to create the port, and `tell` for events.
    ///
    /// # Errors
    /// An error of the system if it has no thread, descriptor or io_uring available.
    pub fn start<P, N, R>(
        name: &str,
        queue: Queue<P, N::Buf, R>,
        make: impl FnOnce(Arc<Stats>) -> io::Result<N> + Send + 'static,
        tell: impl FnMut(News) + Send + 'static,
    ) -> io::Result<Self>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        N: Wait + 'static,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        let mut worker = Self::spawn(name, queue, make, None, tell)?;
        worker.made.recv().unwrap_or_else(|_| Err(ended_at_once()))?;
        worker.serves = true;
        Ok(worker)
    }

    /// As `start`, but does not wait; see [`ready`](Self::ready). It also supports a queue that has
    /// siblings: their [`Waker`](pvio_netback::queue::Waker) makes `mail`, an eventfd, readable.
    ///
    /// # Errors
    /// An error of the system if it has no thread or descriptor available.
    pub fn spawn<P, N, R>(
        name: &str,
        queue: Queue<P, N::Buf, R>,
        make: impl FnOnce(Arc<Stats>) -> io::Result<N> + Send + 'static,
        mail: Option<OwnedFd>,
        mut tell: impl FnMut(News) + Send + 'static,
    ) -> io::Result<Self>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        N: Wait + 'static,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        let (woken, wake) = io::pipe()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let events = queue.channels().map(|channel| channel.as_fd().try_clone_to_owned());
        let events = events.collect::<io::Result<Vec<OwnedFd>>>()?;
        let watched = mail.as_ref().map(OwnedFd::try_clone).transpose()?;
        let (put, outcome) = sync_channel(1);
        let (ready, made) = sync_channel(1);
        let thread = Builder::new().name(String::from(name)).spawn(move || {
            let work = || {
                // Created by this thread, since an io_uring belongs to the thread that uses it.
                let mut port = match make(Arc::clone(queue.stats())) {
                    Ok(port) => port,
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        tell(News::Begun);
                        return Ok(());
                    }
                };
                // One watch for each channel, of which there are at most three, one for the
                // siblings and one for the pipe.
                let mail = mail.zip(watched.and_then(|watched| port.watch(watched)));
                let events: Vec<Watch> = events.into_iter().filter_map(|e| port.watch(e)).collect();
                port.watch(woken.into());
                let _ = ready.send(Ok(()));
                tell(News::Begun);
                Serving { queue, port, events, mail }.serve(&stopped, &mut tell)
            };
            // The closure releases everything that the queue and the port own, also after a panic.
            let outcome = catch_unwind(AssertUnwindSafe(work));
            let _ = put.send(outcome.unwrap_or(Err(WorkerError::Panicked)).err());
            tell(News::Ended);
        })?;
        let wake = Some(wake);
        Ok(Self { thread: Some(thread), stop, wake, made, serves: false, outcome, over: false })
    }

    /// Whether the worker runs.
    ///
    /// # Errors
    /// An error of the system if it has no io_uring available, or an error of the port's creation.
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

    /// Returns the reason why the worker ended on its own, once.
    #[must_use]
    pub fn error(&mut self) -> Option<WorkerError> {
        let outcome = self.outcome.try_recv().ok()?;
        self.over = true;
        outcome
    }

    /// Stops the worker. Called again until it is ready: the worker has then released everything,
    /// and dropping it does not block.
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

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic was reported as its outcome.
            let _ = thread.join();
        }
    }
}

/// State of the thread. The drop order matters: the rings are unmapped first, then the port waits
/// for the kernel.
struct Serving<P: BackendPlatform, N: NetPort, R> {
    queue: Queue<P, N::Buf, R>,
    port: N,
    events: Vec<Watch>,
    /// Eventfd by which the siblings wake it.
    mail: Option<(OwnedFd, Watch)>,
}

impl<P: BackendPlatform, N: Wait, R: SharedMemory + Clone> Serving<P, N, R> {
    fn serve(&mut self, stop: &AtomicBool, tell: &mut impl FnMut(News)) -> Result<(), WorkerError> {
        let (mut spin, mut gather) = (Spin::default(), Gather::default());
        // Checked in every round, since with a busy guest the thread never sleeps.
        while !stop.load(Ordering::Acquire) {
            self.pump()?;
            let now = now();
            self.queue.set_clock(now);
            self.port.turn(now);
            let moved = self.queue.poll(&mut self.port, BUDGET)?;
            gather.done(moved.rx);
            let busy = moved.any();
            let late = self.queue.deadline().is_some_and(|deadline| deadline <= now);
            if late || !busy {
                match self.queue.tick(&mut self.port)? {
                    None => {}
                    Some(Reception::Stalled) => tell(News::Stalled),
                    Some(Reception::Ready) => tell(News::Ready),
                }
            }
            if busy || late {
                continue;
            }
            if spin.until(|| self.look())? || !self.queue.may_sleep()? {
                continue;
            }
            spin.sleeping();
            self.sleep(gather.before_sleep())?;
        }
        Ok(())
    }

    /// Processes completed operations. Events are taken before the rings are checked, so that a
    /// request that arrives after the check raises a new event. Returns whether there was an event.
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
        if let Some((mail, watch)) = &self.mail
            && self.port.fired(*watch)
        {
            // Cleared, so that it can be waited for; it may be clear already.
            let _ = rustix::io::read(mail, &mut [0_u8; 8]);
        }
        Ok(fired)
    }

    /// Whether the queue or the port has work.
    fn look(&mut self) -> Result<bool, WorkerError> {
        Ok(self.queue.has_work()? || self.port.look().map_err(tap_lost)?)
    }

    /// Waits for an event of the guest, a packet, a stop, or a deadline. If `gather` is set, first
    /// waits that long for packets to accumulate.
    fn sleep(&mut self, gather: Option<Duration>) -> Result<(), WorkerError> {
        let now = now();
        let deadline = self.queue.deadline().into_iter().chain(self.port.deadline()).min();
        let deadline = deadline.map(|deadline| deadline.saturating_sub(now));
        if let Some(time) = gather {
            let time = deadline.map_or(time, |deadline| deadline.min(time));
            self.port.gather(time).map_err(tap_lost)?;
        }
        if gather.is_none() || !self.port.look().map_err(tap_lost)? {
            self.port.wait(deadline).map_err(tap_lost)?;
        }
        self.queue.stats().count_wakeup();
        Ok(())
    }
}

/// Returns the time of the clock that all workers share: the limits of shared rates depend on it.
fn now() -> Duration {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGIN.elapsed()
}

fn tap_lost(error: io::Error) -> WorkerError {
    WorkerError::Tap(alloc::format!("{error}"))
}
