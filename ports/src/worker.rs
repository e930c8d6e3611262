//! One thread per queue, whose only wait point is its port; for a tap, the tap's io_uring.
#![forbid(unsafe_code)]

use crate::NetPort;
use crate::wait::WaitPort;
use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_event_channel::{BackendPlatform, SpuriousEvents};
use pvio_netback::fault::QueueError;
use pvio_netback::queue::{Queue, Reception};
use pvio_netback::stats::Stats;
use pvio_ring::error::Remedy;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{EventFd, Gate, Gather, Notify, Spin, StopFlag, Watch, monotonic};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Limit of packets moved in each direction per round.
const BUDGET: usize = 256;

/// Minimum interval at which the counters of a queue that is never idle are published.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(100);

/// Publishes the counters of a queue; called on its worker's thread.
pub type Publish = Box<dyn Fn(&Stats) + Send>;

/// Running worker of a queue.
pub type Worker = pvio_runtime::Worker<WorkerError>;

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

/// Starts a thread that moves packets between a queue and a port, and waits until it runs. The
/// thread calls `make` to create the port.
///
/// # Errors
/// An error of the system if it has no thread, descriptor or io_uring available.
pub fn start<P, N, R>(
    name: &str,
    queue: Queue<P, N::Buf, R>,
    make: impl FnOnce(Arc<Stats>) -> io::Result<N> + Send + 'static,
    notify: Notify,
) -> io::Result<Worker>
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
    N: WaitPort + 'static,
    R: SharedMemory + Clone + Send + Sync + 'static,
{
    let mut worker = spawn(name, queue, make, None, notify, |_| ())?;
    worker.wait_ready()?;
    Ok(worker)
}

/// As [`start`], but does not wait; see [`Worker::spawn`](pvio_runtime::Worker::spawn) for `notify`.
/// It also supports a queue that has siblings: their [`Waker`](pvio_netback::queue::Waker) notifies
/// `wakeup`. The thread calls `reception` when the guest stalls, or receives again.
///
/// # Errors
/// An error of the system if it has no thread or descriptor available.
pub fn spawn<P, N, R>(
    name: &str,
    queue: Queue<P, N::Buf, R>,
    make: impl FnOnce(Arc<Stats>) -> io::Result<N> + Send + 'static,
    wakeup: Option<EventFd>,
    notify: Notify,
    reception: impl FnMut(Reception) + Send + 'static,
) -> io::Result<Worker>
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
    N: WaitPort + 'static,
    R: SharedMemory + Clone + Send + Sync + 'static,
{
    spawn_held(name, queue, make, wakeup, notify, reception, (Gate::opened(), None))
}

/// As [`spawn`]. The thread creates the port, with an io_uring that executes only what the port
/// needs, and serves when `gate` is open. `publish` is called before it waits, and at intervals while
/// it never does.
///
/// # Errors
/// An error of the system if it has no thread or descriptor available.
pub fn spawn_held<P, N, R>(
    name: &str,
    queue: Queue<P, N::Buf, R>,
    make: impl FnOnce(Arc<Stats>) -> io::Result<N> + Send + 'static,
    wakeup: Option<EventFd>,
    notify: Notify,
    reception: impl FnMut(Reception) + Send + 'static,
    (gate, publish): (Gate, Option<Publish>),
) -> io::Result<Worker>
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
    N: WaitPort + 'static,
    R: SharedMemory + Clone + Send + Sync + 'static,
{
    let events = queue.channels().map(|channel| channel.as_fd().try_clone_to_owned());
    let events = events.collect::<io::Result<Vec<OwnedFd>>>()?;
    let start = move |stopped| {
        let mut port = make(Arc::clone(queue.stats()))?;
        // Dropped before the port, also if a watch fails.
        let queue = queue;
        // One watch for each channel, of which there are at most three, one for the siblings and
        // one for the stop.
        let wakeup = match wakeup {
            Some(event) => Some((port.watch(event.to_fd()?)?, event)),
            None => None,
        };
        let events = events.into_iter().map(|event| port.watch(event));
        let events = events.collect::<io::Result<_>>()?;
        port.watch(stopped)?;
        let (spurious, published) = (SpuriousEvents::default(), Duration::ZERO);
        Ok(Serving { queue, port, events, spurious, wakeup, reception, publish, published })
    };
    let serve = |mut serving: Serving<_, _, _, _>, stop: &StopFlag| serving.serve(stop);
    Worker::spawn_held(name, notify, WorkerError::Panicked, start, serve, gate)
}

/// State of the thread. The drop order matters: the rings are unmapped first, then the port waits
/// for the kernel.
struct Serving<P: BackendPlatform, N: NetPort, R, F> {
    queue: Queue<P, N::Buf, R>,
    port: N,
    events: Vec<Watch>,
    spurious: SpuriousEvents,
    /// Eventfd by which the siblings wake it.
    wakeup: Option<(Watch, EventFd)>,
    reception: F,
    publish: Option<Publish>,
    /// When the counters were published last.
    published: Duration,
}

impl<P, N, R, F> Serving<P, N, R, F>
where
    P: BackendPlatform,
    N: WaitPort,
    R: SharedMemory + Clone,
    F: FnMut(Reception),
{
    fn serve(&mut self, stop: &StopFlag) -> Result<(), WorkerError> {
        let (mut spin, mut gather) = (Spin::default(), Gather::default());
        // Checked in every round, since with a busy guest the thread never sleeps.
        while !stop.is_set() {
            self.poll()?;
            let now = monotonic();
            self.queue.set_clock(now);
            self.port.set_clock(now);
            let moved = self.queue.poll(&mut self.port, BUDGET)?;
            gather.done(moved.rx);
            let busy = moved.any();
            let late = self.queue.deadline().is_some_and(|deadline| deadline <= now);
            if (late || !busy)
                && let Some(reception) = self.queue.tick(&mut self.port)?
            {
                (self.reception)(reception);
            }
            if busy {
                self.spurious.worked();
            }
            if busy || late {
                if now.saturating_sub(self.published) >= PUBLISH_INTERVAL {
                    self.publish(now);
                }
                continue;
            }
            if spin.until(|| self.has_work())? || self.queue.final_check()? {
                continue;
            }
            spin.sleeping();
            self.sleep(gather.before_sleep())?;
        }
        self.publish(monotonic());
        Ok(())
    }

    /// Processes completed operations. Events are taken before the rings are checked, so that a
    /// request that arrives after the check raises a new event.
    fn poll(&mut self) -> Result<(), WorkerError> {
        self.port.poll().map_err(tap_lost)?;
        self.queue.unblock();
        // A watch that is not read does not end a wait.
        if self.spurious.may_take(monotonic) {
            let mut fired = false;
            for &event in &self.events {
                fired |= self.port.fired(event);
            }
            if fired {
                self.queue.take_events()?;
                self.spurious.taken();
            }
        }
        if let Some((watch, event)) = &self.wakeup
            && self.port.fired(*watch)
        {
            // Cleared, so that it can be waited for; it may be clear already.
            event.clear();
        }
        Ok(())
    }

    /// Whether the queue or the port has work.
    fn has_work(&mut self) -> Result<bool, WorkerError> {
        Ok(self.queue.has_work()? || self.port.has_work().map_err(tap_lost)?)
    }

    fn publish(&mut self, now: Duration) {
        if let Some(publish) = &self.publish {
            publish(self.queue.stats());
            self.published = now;
        }
    }

    /// Waits for an event of the guest, a packet, a stop, or a deadline. If `gather` is set, first
    /// waits that long for packets to accumulate.
    fn sleep(&mut self, gather: Option<Duration>) -> Result<(), WorkerError> {
        let now = monotonic();
        self.publish(now);
        let deadline = self.queue.deadline().into_iter().chain(self.port.deadline()).min();
        let deadline = deadline.map(|deadline| deadline.saturating_sub(now));
        let stats = self.queue.stats();
        let delay = self.spurious.before_wait(now, || stats.count_delay_of_events());
        let deadline = deadline.into_iter().chain(delay).min();
        if let Some(time) = gather {
            let time = deadline.map_or(time, |deadline| deadline.min(time));
            self.port.gather(time).map_err(tap_lost)?;
        }
        if gather.is_none() || !self.port.has_work().map_err(tap_lost)? {
            self.port.wait(deadline).map_err(tap_lost)?;
        }
        self.queue.stats().count_wakeup();
        Ok(())
    }
}

fn tap_lost(error: io::Error) -> WorkerError {
    WorkerError::Tap(alloc::format!("{error}"))
}
