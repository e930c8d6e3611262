//! The interface between a session and what runs its queues.

use super::SessionConfig;
use crate::port::PacketBuf;
use crate::queue::{Queue, Waker};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use pvio_event_channel::BackendPlatform;
use pvio_xenbus::driver::Fault;

/// Serves the queues of one session on an open port, for example with a thread for each queue. `R`
/// is the memory of in-flight records.
pub trait QueueServer<P: BackendPlatform, R> {
    /// Packet buffer of the ports.
    type Buf: PacketBuf;
    /// A running queue. Dropping it stops the queue and releases everything that it owns.
    type Running;

    /// Whether staging grants are supported.
    fn stages(&self) -> bool {
        true
    }

    /// Returns a waker for each queue of the new session, with which the other queues wake it.
    /// Called before [`begin`](Self::begin), and only for a guest that has a control ring. The
    /// default wakers do nothing, which is sufficient for queues that are polled continuously.
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks a resource that this needs.
    fn wakers(&mut self, queues: usize) -> Result<Vec<Waker>, Fault> {
        let nothing: Waker = Arc::new(|| ());
        Ok(core::iter::repeat_n(nothing, queues).collect())
    }

    /// Prepares the port for a new session. [`stopped`](Self::stopped) is called later, even if
    /// this or a later step fails.
    ///
    /// # Errors
    /// A [`Fault`]; nothing is started.
    fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault>;

    /// Starts queue number `index`, counted from 0, without waiting until it is
    /// [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks a resource that this needs.
    fn start(
        &mut self,
        index: usize,
        name: &str,
        queue: Queue<P, Self::Buf, R>,
    ) -> Result<Self::Running, Fault>;

    /// Whether a started queue is running.
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks a resource that this needs.
    fn ready(&mut self, _running: &mut Self::Running) -> Result<Poll<()>, Fault> {
        Ok(Poll::Ready(()))
    }

    /// Called when every queue is running: the guest is connected.
    fn started(&mut self) {}

    /// Called when the guest is disconnected; the queues of [`start`](Self::start) are dropped
    /// already.
    fn stopped(&mut self) {}

    /// Returns the reason why a queue ended without a request to stop, once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<Fault>;

    /// Stops a queue. Called again until it is ready; dropping the queue then does not block. The
    /// default implementation leaves everything to the drop.
    fn stop(&mut self, _running: &mut Self::Running) -> Poll<()> {
        Poll::Ready(())
    }
}
