//! The interface of a [`Vbd`](super::Vbd) to what opens disks and runs queues.

use crate::config::Config;
use crate::engine::{FlushState, Geometry};
use crate::queue::{QueueFault, QueueParts};
use alloc::sync::Arc;
use core::task::Poll;
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::DomId;
use pvio_grant_table::policy::MappingBudget;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::ToolstackBack;

/// The progress of opening a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opening {
    /// The disk is open and has this geometry.
    Done(Geometry),
    /// Opening has not finished.
    Pending,
    /// The image is in use elsewhere, and opening is retried; with the reason.
    Busy(Fault),
}

/// Opens disks and runs queues, with threads or the platform's equivalent.
pub trait VbdServer<P: BackendPlatform> {
    /// A queue that is being served. Dropping it completes the operations in flight and releases
    /// all resources.
    type Running;

    /// Memory for in-flight records.
    type Record: SharedMemory + Clone;

    /// Returns `len` bytes of memory for the in-flight record of a device's session: new memory or,
    /// to resume an earlier process's session, that process's memory. Where no memory outlives the
    /// process, it is [`HeapMemory`](pvio_ring::shm::HeapMemory), and sessions cannot be resumed.
    ///
    /// # Errors
    /// A [`Fault`]. If `resumed` is set, the session ends and the frontend reconnects.
    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<Self::Record, Fault>;

    /// Reports whether the earlier process of a session to be resumed mapped guest pages for single requests.
    /// Called before the disk is opened. If it did, opening waits until these pages are unmapped.
    fn mapped_before(&mut self, _mapped: bool) {}

    /// Removes the record of a device whose session has ended.
    fn remove_record(&mut self, _device: &str) {}

    /// Returns the settings for a disk, which may differ from the usual ones by the toolstack's
    /// keys. Called before the disk is opened and before the toolstack's script has run.
    ///
    /// # Errors
    /// A [`Fault`] that states the remedy for the operator.
    fn configure(&mut self, _disk: &ToolstackBack, usual: Config) -> Result<Config, Fault> {
        Ok(usual)
    }

    /// Applies changes of the toolstack's keys to the open disk.
    ///
    /// # Errors
    /// A [`Fault`] that states the remedy for the operator; the previous settings stay in force.
    fn refresh(&mut self, _disk: &ToolstackBack) -> Result<(), Fault> {
        Ok(())
    }

    /// Opens the disk's image, and closes a previously open one. No queue is being served. A drive
    /// without media ([`ToolstackBack::is_empty_drive`]) is a disk of no sectors, whose queues are
    /// [started](Self::start) as usual.
    ///
    /// # Errors
    /// A [`Fault`] that states the remedy for the operator.
    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault>;

    /// Opens the disk without blocking. Called again with the same keys, when the server wakes the
    /// device's driver, until it is done. The default implementation opens synchronously.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    fn poll_open(&mut self, disk: &ToolstackBack) -> Result<Opening, Fault> {
        self.open(disk).map(Opening::Done)
    }

    /// Closes the open disk, or cancels opening. Called again until it is ready. The default
    /// implementation leaves closing to the server's drop.
    fn close(&mut self) -> Poll<()> {
        Poll::Ready(())
    }

    /// Returns whether a flush of the open disk has failed. The same object while the disk is open.
    fn flush_state(&self) -> Arc<FlushState> {
        Arc::default()
    }

    /// Returns the budget of cached mappings that a guest's disks share. The same object for the
    /// same guest.
    fn mapping_budget(&self, _guest: DomId) -> Arc<MappingBudget> {
        MappingBudget::unlimited()
    }

    /// Starts to look up the current disk size, which may have changed since the disk was opened.
    /// Called periodically while the disk is served; does not block. If the size changed, the
    /// server wakes the device's driver.
    fn look_up_size(&mut self) {}

    /// Returns the disk size in sectors of 512 bytes as of the last lookup, if there was one.
    fn sectors(&mut self) -> Option<u64> {
        None
    }

    /// Starts to serve a queue, without waiting until it is [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks the resources.
    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel, Self::Record>,
    ) -> Result<Self::Running, Fault>;

    /// Returns whether a started queue is being served.
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks the resources.
    fn ready(&mut self, _running: &mut Self::Running) -> Result<Poll<()>, Fault> {
        Ok(Poll::Ready(()))
    }

    /// Returns the fault that ended a queue, if one did; reported once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<QueueFault>;

    /// Stops serving a queue: it takes no new requests and completes those in flight. Called again
    /// until it is ready; dropping the queue does not block then. The default implementation leaves
    /// all of this to the drop.
    fn stop(&mut self, _running: &mut Self::Running) -> Poll<()> {
        Poll::Ready(())
    }
}
