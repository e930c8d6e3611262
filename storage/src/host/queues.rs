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

/// Serves the queues of a session from an open disk.
pub struct ImageQueues {
    disk: Arc<OpenDisk>,
    wake: Notify,
    gate: Gate,
    published: Option<(CounterFile, Arc<MappingBudget>)>,
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
    /// after those of the last queue usage and limit of [each budget of the disk](DISK_BUDGETS).
    #[must_use]
    pub fn publishing(self, counters: CounterFile, mappings: Arc<MappingBudget>) -> Self {
        Self { published: Some((counters, mappings)), ..self }
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
        let publish = self.published.clone().map(|(counters, mappings)| -> Publish {
            Box::new(move |stats: &Stats| {
                counters.publish(queue, stats.words());
                let kept = ("", mappings.used() as u64, mappings.most() as u64);
                let budgets = load.budgets().into_iter().chain([kept]);
                let words = budgets.flat_map(|(_, used, most)| [used, most]);
                counters.publish(counters.queues().saturating_sub(1), words);
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
