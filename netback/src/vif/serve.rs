//! What opens ports and runs queues for a [`Vif`](super::Vif).

use super::{Attach, Session};
use crate::Platform;
use crate::port::PacketBuf;
use crate::queue::{Policy, Queue, Waker};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::ToolstackBack;

/// Opens ports and runs queues: taps and threads, or whatever the platform has.
pub trait Serve<P: Platform> {
    /// Memory of the ports.
    type Buf: PacketBuf;
    /// A queue that is being served. Dropping it stops that and lets go of everything the queue has.
    type Running;
    /// Memory for in-flight records.
    type Record: SharedMemory + Clone;

    /// `len` bytes of memory for the in-flight record of a session of a device: new memory, or, to take an
    /// earlier process's session over, what that process left. Where nothing outlives the process it is
    /// [`HeapMemory`](pvio_ring::shm::HeapMemory), and there is nothing to take over.
    ///
    /// # Errors
    /// A [`Fault`]; with `resumed`, the session ends and the frontend starts over.
    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<Self::Record, Fault>;

    /// The session of a device is over, and its record of no more use.
    fn remove_record(&mut self, _device: &str) {}

    /// How many queues a vif may have at most, at least 1 (`multi-queue-max-queues`).
    fn max_queues(&self) -> u32;

    /// Announces the number of queues of a session that is about to be resumed, which may be larger than
    /// what is [offered](Self::max_queues) now. Called before [`open`](Self::open).
    fn expect_queues(&mut self, _queues: usize) {}

    /// How the guest's pages are to be reached.
    fn policy(&self) -> Policy {
        Policy::default()
    }

    /// Whether guests may have pages kept mapped: their staging grants.
    fn stages(&self) -> bool {
        true
    }

    /// How each of so many queues of the session that begins is woken, for their siblings to do so.
    /// Asked for before [`begin`](Self::begin), and only for a guest that has a control ring. The ones
    /// given by default do nothing, which is enough for queues that are polled all the time.
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn wakers(&mut self, queues: usize) -> Result<Vec<Waker>, Fault> {
        let nothing: Waker = Arc::new(|| ());
        Ok(core::iter::repeat_n(nothing, queues).collect())
    }

    /// Makes what the vif's packets go to. Done once; it lives as long as the device, so that
    /// what is attached to it stays across reconnections of the guest.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do.
    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault>;

    /// The same where that takes time and nothing may wait for it: called again, when the server
    /// wakes whoever drives the device, until it is ready. The one given by default opens at once.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        self.open(vif, attach).map(Poll::Ready)
    }

    /// Takes away what [`open`](Self::open) made; called again until it is ready. The one given by
    /// default leaves that to the server's end.
    fn close(&mut self) -> Poll<()> {
        Poll::Ready(())
    }

    /// A session begins: what [`open`](Self::open) made is set up for it. Whatever comes of that,
    /// [`stopped`](Self::stopped) follows at last.
    ///
    /// # Errors
    /// A [`Fault`]; nothing is started.
    fn begin(&mut self, session: &Session) -> Result<(), Fault>;

    /// Begins to serve queue number `index`, counted from 0, without waiting until it is
    /// [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn start(
        &mut self,
        index: usize,
        name: &str,
        queue: Queue<P, Self::Buf, Self::Record>,
    ) -> Result<Self::Running, Fault>;

    /// Whether a queue that was started is served.
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn ready(&mut self, _running: &mut Self::Running) -> Result<Poll<()>, Fault> {
        Ok(Poll::Ready(()))
    }

    /// Every queue is served: the guest is there.
    fn started(&mut self);

    /// No guest is there any more; what [`start`](Self::start) gave is dropped already.
    fn stopped(&mut self);

    /// The toolstack changed what may be changed while the vif is served.
    ///
    /// # Errors
    /// A [`Fault`]; what was in force stays so.
    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let _ = vif;
        Ok(())
    }

    /// Why a queue ended by itself, if it did; told once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<Fault>;

    /// Stops serving a queue. Called again until it is ready; dropping the queue does not wait then.
    /// The one given by default leaves everything to that.
    fn stop(&mut self, _running: &mut Self::Running) -> Poll<()> {
        Poll::Ready(())
    }
}
