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
use pvio_recordfile::CounterFile;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{Gate, Notify};
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::AsFd;

/// Serves the queues of a session from an open disk.
pub struct ImageQueues {
    disk: Arc<OpenDisk>,
    wake: Notify,
    gate: Gate,
    counters: Option<CounterFile>,
    /// Number of the next queue.
    next: usize,
}

impl ImageQueues {
    /// Creates the server of a session's queues. `wake` is called, on any thread, when a queue is
    /// ready, has failed to start, or has ended.
    #[must_use]
    pub fn new(disk: Arc<OpenDisk>, wake: Notify) -> Self {
        Self { disk, wake, gate: Gate::opened(), counters: None, next: 0 }
    }

    /// Lets the queues wait at a gate when they are ready.
    #[must_use]
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// Publishes the counters of each queue for another process, whenever its worker waits.
    #[must_use]
    pub fn publishing(self, counters: CounterFile) -> Self {
        Self { counters: Some(counters), ..self }
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
        let publish = self.counters.clone().map(|counters| -> Publish {
            Box::new(move |stats: &Stats| counters.publish(queue, stats.words()))
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
