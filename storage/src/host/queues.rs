//! Serves the queues of a session from an open disk, with one thread for each.

use super::disk::OpenDisk;
use crate::worker::{self, Worker};
use alloc::format;
use alloc::sync::Arc;
use core::task::Poll;
use pvio_blkback::queue::{QueueFault, QueueParts};
use pvio_blkback::session::QueueServer;
use pvio_event_channel::BackendPlatform;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::Notify;
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::AsFd;

/// Serves the queues of a session from an open disk.
pub struct ImageQueues {
    disk: Arc<OpenDisk>,
    wake: Notify,
}

impl ImageQueues {
    /// Creates the server of a session's queues. `wake` is called, on any thread, when a queue is
    /// ready, has failed to start, or has ended.
    #[must_use]
    pub const fn new(disk: Arc<OpenDisk>, wake: Notify) -> Self {
        Self { disk, wake }
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
        worker::spawn(name, parts, Arc::clone(self.disk.image()), Arc::clone(&self.wake))
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
