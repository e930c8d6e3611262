//! The interface between a [`Vif`](super::Vif) and what opens its port and runs its sessions.

use super::Attach;
use crate::queue::Policy;
use crate::session::{Begin, SessionSpec};
use crate::stats::Stats;
use alloc::sync::Arc;
use core::task::Poll;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{ToolstackBack, VifRate};

/// Opens the port of a vif and serves its sessions, in this process
/// ([`Session`](crate::session::Session)) or in another one. It serves at most one session at a
/// time.
///
/// A session starts with [`start`](Self::start) and is stopped with [`stop`](Self::stop), which
/// leaves its in-flight record: it can continue in a later process, with [`Begin::Resumed`].
/// [`end`](Self::end) removes the record.
pub trait VifServer {
    /// A session that is being served. Dropping it stops it, as [`stop`](Self::stop), and may
    /// block.
    type Session;

    /// Returns the counters of each queue, over all sessions: from the beginning one element for each
    /// queue that is [offered](Self::max_queues).
    fn stats(&self) -> &[Arc<Stats>];

    /// Returns the largest number of queues of a vif, at least 1 (`multi-queue-max-queues`).
    fn max_queues(&self) -> u32;

    /// Announces the number of queues of a session that is about to be resumed, which may be larger than
    /// what is [offered](Self::max_queues) now. Called before [`open`](Self::open).
    fn expect_queues(&mut self, _queues: usize) {}

    /// Returns how the guest's pages are accessed.
    fn policy(&self) -> Policy {
        Policy::default()
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

    /// Applies changed toolstack settings that may change while the vif runs.
    ///
    /// # Errors
    /// A [`Fault`]; the previous settings stay in force.
    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let _ = vif;
        Ok(())
    }

    /// Checks whether the session of an earlier process can be resumed from its in-flight record.
    ///
    /// # Errors
    /// A [`Fault`]: the session ends and the frontend reconnects.
    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault>;

    /// Starts to serve a session on the open port, without waiting until it is
    /// [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`] if nothing was started.
    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault>;

    /// Whether all queues of a session are running. Called again, when the server wakes the thread
    /// that drives the device, until they are.
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks a resource that this needs; the session is stopped then.
    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault>;

    /// Returns the reason why a session ended without a request to stop, once.
    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault>;

    /// Stops a session. Called again until it is ready; dropping the session then does not block.
    /// Its in-flight record stays, so that another process can resume it.
    fn stop(&mut self, session: &mut Self::Session) -> Poll<()>;

    /// Leaves a session to another process: as [`stop`](Self::stop), except that a session in a
    /// process of its own goes on.
    fn leave(&mut self, session: &mut Self::Session) -> Poll<()> {
        self.stop(session)
    }

    /// Makes sure that no process resumes a session of this device: invalidates the record of the
    /// session that this server started last, and removes the device's record, whichever process
    /// created it. No session is being served.
    fn end(&mut self, device: DeviceAddr);

    /// Sets the guest's transmit rate limit for all queues of a session together.
    fn set_rate(&mut self, session: &mut Self::Session, rate: Option<VifRate>);

    /// Sets whether the guest receives only the multicast groups that it selected.
    fn filter_groups(&mut self, session: &mut Self::Session, chosen: bool);

    /// Sets the headroom before each frame to the guest, in bytes.
    fn set_headroom(&mut self, session: &mut Self::Session, bytes: u16);
}
