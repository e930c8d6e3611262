//! The interface between a [`Vif`](super::Vif) and what opens its port and runs its queues.

use super::{Attach, SessionConfig};
use crate::port::PacketBuf;
use crate::queue::{Policy, Queue, Waker};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use pvio_event_channel::BackendPlatform;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::ToolstackBack;

/// Opens ports and runs queues, for example with taps and threads.
pub trait VifServer<P: BackendPlatform> {
    /// Packet buffer of the ports.
    type Buf: PacketBuf;
    /// A running queue. Dropping it stops the queue and releases everything that it owns.
    type Running;
    /// Memory of in-flight records.
    type Record: SharedMemory + Clone;

    /// Returns `len` bytes of memory for the in-flight record of a device's session: new memory,
    /// or, with `resumed`, the memory that the earlier process left. If no memory survives the
    /// process, it is [`HeapMemory`](pvio_ring::shm::HeapMemory), and no session can be resumed.
    ///
    /// # Errors
    /// A [`Fault`]; with `resumed`, the session ends and the frontend reconnects.
    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<Self::Record, Fault>;

    /// Removes the record of a device's session, which has ended.
    fn remove_record(&mut self, _device: &str) {}

    /// Returns the largest number of queues of a vif, at least 1 (`multi-queue-max-queues`).
    fn max_queues(&self) -> u32;

    /// Announces the number of queues of a session that is about to be resumed, which may be larger than
    /// what is [offered](Self::max_queues) now. Called before [`open`](Self::open).
    fn expect_queues(&mut self, _queues: usize) {}

    /// Returns how the guest's pages are accessed.
    fn policy(&self) -> Policy {
        Policy::default()
    }

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

    /// Creates the interface or port of the vif. Called once; it lives as long as the device, so
    /// that its attachment survives reconnections of the guest.
    ///
    /// # Errors
    /// A [`Fault`] that describes the remedy to the operator.
    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault>;

    /// Non-blocking form of [`open`](Self::open): called again, when the server wakes the thread
    /// that drives the device, until it is ready. The default implementation calls
    /// [`open`](Self::open).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        self.open(vif, attach).map(Poll::Ready)
    }

    /// Removes what [`open`](Self::open) created. Called again until it is ready. The default
    /// implementation leaves that to the drop of the server.
    fn close(&mut self) -> Poll<()> {
        Poll::Ready(())
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
        queue: Queue<P, Self::Buf, Self::Record>,
    ) -> Result<Self::Running, Fault>;

    /// Whether a started queue is running.
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks a resource that this needs.
    fn ready(&mut self, _running: &mut Self::Running) -> Result<Poll<()>, Fault> {
        Ok(Poll::Ready(()))
    }

    /// Called when every queue is running: the guest is connected.
    fn started(&mut self);

    /// Called when the guest is disconnected; the queues of [`start`](Self::start) are dropped
    /// already.
    fn stopped(&mut self);

    /// Applies changed toolstack settings that may change while the vif runs.
    ///
    /// # Errors
    /// A [`Fault`]; the previous settings stay in force.
    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let _ = vif;
        Ok(())
    }

    /// Returns the reason why a queue ended without a request to stop, once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<Fault>;

    /// Stops a queue. Called again until it is ready; dropping the queue then does not block. The
    /// default implementation leaves everything to the drop.
    fn stop(&mut self, _running: &mut Self::Running) -> Poll<()> {
        Poll::Ready(())
    }
}
