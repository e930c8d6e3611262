//! One thread per queue, whose only wait point is the engine's io_uring.

use crate::engine::wait::{DiskEngine, WaitEngine};
use crate::image::Image;
use alloc::boxed::Box;
use alloc::sync::Arc;
use pvio_blkback::Stats;
use pvio_blkback::pages::Buf;
use pvio_blkback::queue::{Progress, Queue, QueueFault, QueueParts};
use pvio_event_channel::{EventChannel, SpuriousEvents};
use pvio_grant_table::{GrantCopier, GrantMapper};
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{Gate, Notify, Spin, StopFlag, WaitPoint, Watch};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Maximum number of requests to take before responses are published.
const BUDGET: u32 = 128;
/// Maximum time that a worker waits while it has cached mappings, which it must evict when idle.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Number of polls after which a worker that is never idle reads the clock.
const POLLS_PER_TICK: u32 = 1024;
/// Maximum time that a stopping worker waits for requests in flight.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum time that a stopping worker waits for space while its disk is paused. Then its requests are
/// left to a later process or, if there will be none, complete with an error.
const PAUSED_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval of the drain's checks of its timeout.
const DRAIN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Publishes the counters of a queue; called on its worker's thread.
pub type Publish = Box<dyn Fn(&Stats) + Send>;

/// A running worker of a queue. A stopped worker completes the requests in flight.
pub type Worker = pvio_runtime::Worker<QueueFault>;

/// Starts a thread that serves a queue from an image, and waits until it is ready. For `notify` see
/// [`Worker::spawn`](pvio_runtime::Worker::spawn).
///
/// # Errors
/// The system's error if it has no thread, descriptor or io_uring, or the error of creating the
/// image's engine.
pub fn start<P, C, R>(
    name: &str,
    parts: QueueParts<P, C, R>,
    image: Arc<Image>,
    notify: Notify,
) -> io::Result<Worker>
where
    P: GrantMapper + GrantCopier + Send + 'static,
    C: EventChannel + AsFd + Send + 'static,
    R: SharedMemory + Clone + Send + 'static,
{
    let mut worker = spawn(name, parts, image, notify)?;
    worker.wait_ready()?;
    Ok(worker)
}

/// Starts a thread that serves a queue from an image, as [`start`], without waiting for it.
///
/// # Errors
/// The system's error if it has no thread or descriptor.
pub fn spawn<P, C, R>(
    name: &str,
    parts: QueueParts<P, C, R>,
    image: Arc<Image>,
    notify: Notify,
) -> io::Result<Worker>
where
    P: GrantMapper + GrantCopier + Send + 'static,
    C: EventChannel + AsFd + Send + 'static,
    R: SharedMemory + Clone + Send + 'static,
{
    spawn_held(name, parts, image, notify, Gate::opened(), None)
}

/// As [`spawn`]. The thread creates its engine, with an io_uring that executes only what the engine
/// needs, and serves when `gate` is open. `publish` is called before it waits, and at intervals while
/// it never does.
///
/// # Errors
/// The system's error if it has no thread or descriptor.
pub fn spawn_held<P, C, R>(
    name: &str,
    parts: QueueParts<P, C, R>,
    image: Arc<Image>,
    notify: Notify,
    gate: Gate,
    publish: Option<Publish>,
) -> io::Result<Worker>
where
    P: GrantMapper + GrantCopier + Send + 'static,
    C: EventChannel + AsFd + Send + 'static,
    R: SharedMemory + Clone + Send + 'static,
{
    let event = parts.channel.as_fd().try_clone_to_owned()?;
    let start = move |stopped| Serving::new(parts, image, event, stopped, publish);
    let serve = |mut serving: Serving<_, _, _>, stop: &StopFlag| serving.serve(stop);
    Worker::spawn_held(name, notify, QueueFault::Panicked, start, serve, gate)
}

type WorkerQueue<P, C, R> = Queue<P, C, DiskEngine<Buf<<P as GrantMapper>::Mapping>>, R>;

/// State of the thread. The image is released last.
struct Serving<P, C, R>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    R: SharedMemory + Clone,
{
    queue: WorkerQueue<P, C, R>,
    event: Watch,
    spurious: SpuriousEvents,
    publish: Option<Publish>,
    image: Arc<Image>,
}

impl<P, C, R> Serving<P, C, R>
where
    P: GrantMapper + GrantCopier,
    C: EventChannel,
    R: SharedMemory + Clone,
{
    fn new(
        parts: QueueParts<P, C, R>,
        image: Arc<Image>,
        event: OwnedFd,
        stopped: OwnedFd,
        publish: Option<Publish>,
    ) -> io::Result<Self> {
        let mut engine = image.engine(parts.ring.layout().slots())?;
        if parts.record.is_taken_over() && image.settle().is_err() {
            parts.record.note_failed_flush();
        }
        let event = engine.watch(event)?;
        engine.watch(stopped)?;
        let queue = Queue::new(parts, engine);
        Ok(Self { queue, event, spurious: SpuriousEvents::default(), publish, image })
    }

    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueFault> {
        let mut spin = Spin::default();
        let begin = Instant::now();
        let mut polls = 0_u32;
        loop {
            // Checked in every iteration, because a worker with a busy guest never waits.
            if stop.is_set() {
                return self.finish();
            }
            let queue = &mut self.queue;
            if queue.poll(BUDGET)? == Progress::Some {
                self.spurious.worked();
                polls = polls.wrapping_add(1);
                if polls.is_multiple_of(POLLS_PER_TICK) {
                    queue.tick(begin.elapsed());
                    self.publish();
                }
                continue;
            }
            // With I/O in flight, a completion wakes the worker; spinning is only useful for the
            // guest's next request.
            if queue.in_flight() == 0 && spin.until(|| queue.has_work())? {
                continue;
            }
            // A watch that has fired would not end the wait.
            self.take_event(begin)?;
            let queue = &mut self.queue;
            if queue.final_check()? {
                continue;
            }
            spin.sleeping();
            let now = begin.elapsed();
            queue.tick(now);
            let delayed = || queue.stats().delayed_events.add(1);
            let delay = self.spurious.before_wait(now, delayed);
            self.publish();
            let queue = &mut self.queue;
            let idle = (queue.cached_mappings() > 0).then_some(IDLE_CHECK_INTERVAL);
            let most = idle.into_iter().chain(delay).min();
            queue.engine_mut().wait_due(most).map_err(os_error)?;
            // Watches are marked as fired when completions are collected.
            queue.poll(0)?;
            self.take_event(begin)?;
        }
    }

    fn publish(&self) {
        if let Some(publish) = &self.publish {
            publish(self.queue.stats());
        }
    }

    /// Clears the event channel if its watch has fired and its events are not delayed. The rings must
    /// be checked after that.
    fn take_event(&mut self, begin: Instant) -> Result<(), QueueFault> {
        let queue = &mut self.queue;
        if self.spurious.may_take(|| begin.elapsed()) && queue.engine_mut().fired(self.event) {
            queue.stats().wakeups.add(1);
            queue.channel().take()?;
            self.spurious.taken();
        }
        Ok(())
    }

    /// Completes requests in flight without taking new ones.
    fn finish(&mut self) -> Result<(), QueueFault> {
        let queue = &mut self.queue;
        queue.drain();
        let begin = Instant::now();
        while !queue.is_drained() && begin.elapsed() < DRAIN_TIMEOUT {
            if queue.is_paused() && begin.elapsed() >= PAUSED_DRAIN_TIMEOUT {
                let pauses = self.image.pauses();
                if !pauses.is_abandoned() {
                    break;
                }
                pauses.set_holds(false);
            }
            queue.engine_mut().wait_due(Some(DRAIN_CHECK_INTERVAL)).map_err(os_error)?;
            queue.poll(0)?;
        }
        let drained = queue.poll(0).map(drop);
        self.publish();
        drained
    }
}

fn os_error(error: io::Error) -> QueueFault {
    QueueFault::Wait(error.raw_os_error().unwrap_or_default())
}
