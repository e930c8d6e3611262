//! Serves the queues of a session from an open disk, with one thread for each.

use super::disk::OpenDisk;
use crate::worker::{self, Publish, Worker};
use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use core::task::Poll;
use pvio_blkback::Stats;
use pvio_blkback::queue::{QueueFault, QueueParts};
use pvio_blkback::session::QueueServer;
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::policy::MappingBudget;
use pvio_recordfile::CounterFile;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{Gate, Notify};
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::AsFd;

/// The budgets of a disk, in the order in which they are published.
pub const DISK_BUDGETS: [&str; 4] = ["table-bytes", "jobs", "job-bytes", "kept-pages of the guest"];

/// The events of a disk, in the order in which their counts are published, behind its budgets.
pub const DISK_EVENTS: [&str; 6] = [
    "paused",
    "buffers-unregistered",
    "operations-failed",
    "server-lost",
    "server-back",
    "server-given-up",
];

/// Where the counters of a disk are published.
#[derive(Clone)]
struct Published {
    counters: CounterFile,
    mappings: Arc<MappingBudget>,
    /// Counts of the events in earlier processes.
    earlier: [u64; DISK_EVENTS.len()],
}

/// Serves the queues of a session from an open disk.
pub struct ImageQueues {
    disk: Arc<OpenDisk>,
    wake: Notify,
    gate: Gate,
    published: Option<Published>,
    /// Number of the next queue.
    next: usize,
}

impl ImageQueues {
    /// Creates the server of a session's queues. `wake` is called, on any thread, when a queue is
    /// ready, has failed to start, or has ended.
    #[must_use]
    pub fn new(disk: Arc<OpenDisk>, wake: Notify) -> Self {
        Self { disk, wake, gate: Gate::opened(), published: None, next: 0 }
    }

    /// Lets the queues wait at a gate when they are ready.
    #[must_use]
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// Publishes the counters of each queue for another process, whenever its worker waits, and
    /// after those of the last queue usage and limit of [each budget of the disk](DISK_BUDGETS) and
    /// the count of [each event](DISK_EVENTS).
    #[must_use]
    pub fn publishing(self, counters: CounterFile, mappings: Arc<MappingBudget>) -> Self {
        let words = counters.words(counters.queues().saturating_sub(1));
        let mut counts = words.skip(2 * DISK_BUDGETS.len());
        let earlier = DISK_EVENTS.map(|_| counts.next().unwrap_or_default());
        drop(counts);
        Self { published: Some(Published { counters, mappings, earlier }), ..self }
    }

    /// Returns the disk.
    #[must_use]
    pub const fn disk(&self) -> &Arc<OpenDisk> {
        &self.disk
    }
}

impl<P, R> QueueServer<P, R> for ImageQueues
where
    P: BackendPlatform<Channel: AsFd> + Send + 'static,
    R: SharedMemory + Clone + Send + 'static,
{
    type Running = Worker;

    fn start(&mut self, name: &str, parts: QueueParts<P, P::Channel, R>) -> Result<Worker, Fault> {
        self.disk.restrain();
        let queue = self.next;
        self.next += 1;
        let load = Arc::clone(self.disk.load());
        let events = self.disk.image().events();
        let publish = self.published.clone().map(|published| -> Publish {
            let Published { counters, mappings, earlier } = published;
            Box::new(move |stats: &Stats| {
                counters.publish(queue, stats.words());
                let kept = ("", mappings.used() as u64, mappings.most() as u64);
                let budgets = load.budgets().into_iter().chain([kept]);
                let words = budgets.flat_map(|(_, used, most)| [used, most]);
                let counts = DISK_EVENTS.iter().zip(earlier).map(|(name, earlier)| {
                    let seen = events.iter().filter(|(event, _)| event == name);
                    seen.fold(earlier, |sum, (_, log)| sum.saturating_add(log.seen()))
                });
                counters.publish(counters.queues().saturating_sub(1), words.chain(counts));
            })
        });
        let (image, wake) = (Arc::clone(self.disk.image()), Arc::clone(&self.wake));
        worker::spawn_held(name, parts, image, wake, self.gate.clone(), publish)
            .map_err(not_started)
    }

    fn ready(&mut self, running: &mut Worker) -> Result<Poll<()>, Fault> {
        match running.ready() {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(e)) => Err(not_started(e)),
        }
    }

    fn fault(&mut self, running: &mut Worker) -> Option<QueueFault> {
        running.fault()
    }

    fn stop(&mut self, running: &mut Worker) -> Poll<()> {
        self.disk.hasten();
        running.stop()
    }
}

fn not_started(error: io::Error) -> Fault {
    Fault::new("worker", format!("the queue's worker cannot start: {error}"))
}
