//! What opens disks and runs queues for a [`Vbd`](super::Vbd).

use crate::config::Config;
use crate::engine::{FlushState, Geometry};
use crate::queue::{QueueFault, QueueParts};
use alloc::sync::Arc;
use core::task::Poll;
use pvio_event_channel::EventChannels;
use pvio_grant_table::policy::MappingBudget;
use pvio_grant_table::{DomId, GrantCopier, GrantMapper};
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::ToolstackBack;

/// What a vbd needs of the platform it runs on.
pub trait Platform: GrantMapper + GrantCopier + EventChannels + Clone {}
impl<P: GrantMapper + GrantCopier + EventChannels + Clone> Platform for P {}

/// What has become of a disk that is being opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opening {
    /// It is open, and looks so.
    Done(Geometry),
    /// It is not done.
    Pending,
    /// Neither, and why: somebody has the image, and is waited for.
    Busy(Fault),
}

/// Opens disks and runs queues: threads, or whatever the platform has.
pub trait Serve<P: Platform> {
    /// A queue that is being served. Dropping it finishes what is under way and lets go of
    /// everything.
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

    /// Reports whether the earlier process of a session to be resumed mapped guest pages for single requests.
    /// Called before the disk is opened. If it did, opening waits until these pages are unmapped.
    fn mapped_before(&mut self, _mapped: bool) {}

    /// The session of a device is over, and its record of no more use.
    fn remove_record(&mut self, _device: &str) {}

    /// What is offered for a disk, where the toolstack's words about it ask for something else than
    /// is usual. Asked before the disk is opened, and before the toolstack's script has run.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do.
    fn configure(&mut self, _disk: &ToolstackBack, usual: Config) -> Result<Config, Fault> {
        Ok(usual)
    }

    /// Takes over what the toolstack changed of a disk that is open.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do; what was in force stays so.
    fn refresh(&mut self, _disk: &ToolstackBack) -> Result<(), Fault> {
        Ok(())
    }

    /// Opens what backs the disk, and lets go of what was open before. Nothing is being served.
    /// Of a drive without a medium ([`ToolstackBack::is_empty_drive`]) this is a disk of no sectors,
    /// whose queues are [started](Self::start) all the same.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do.
    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault>;

    /// The same where opening takes time and nothing may wait for it: called again with the same
    /// words, when the server wakes whoever drives the device, until it is done. The one given by
    /// default opens at once.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    fn poll_open(&mut self, disk: &ToolstackBack) -> Result<Opening, Fault> {
        self.open(disk).map(Opening::Done)
    }

    /// Closes what is open, or is being opened; called again until it is ready. The one given by
    /// default leaves that to the server's end.
    fn close(&mut self) -> Poll<()> {
        Poll::Ready(())
    }

    /// Whether a flush of the disk that is open has failed. The same object for as long as it is open.
    fn flush_state(&self) -> Arc<FlushState> {
        Arc::default()
    }

    /// How many pages of a guest all its disks may keep mapped. The same object for the same guest.
    fn mapping_budget(&self, _guest: DomId) -> Arc<MappingBudget> {
        MappingBudget::unlimited()
    }

    /// Begins to look up how large the disk is now, if it may have become larger or smaller since it was
    /// opened. Called now and then while it is served; waits for nothing. If the size is another one, the
    /// server wakes whoever drives the device.
    fn look_up_size(&mut self) {}

    /// How many sectors of 512 bytes the disk had when that was last looked up, if ever.
    fn sectors(&mut self) -> Option<u64> {
        None
    }

    /// Begins to serve a queue from it, without waiting until it is [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel, Self::Record>,
    ) -> Result<Self::Running, Fault>;

    /// Whether a queue that was started is served.
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn ready(&mut self, _running: &mut Self::Running) -> Result<Poll<()>, Fault> {
        Ok(Poll::Ready(()))
    }

    /// Why a queue ended by itself, if it did; told once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<QueueFault>;

    /// Stops serving a queue: nothing new is taken, and what was begun is finished. Called again
    /// until it is ready; dropping the queue does not wait then. The one given by default leaves
    /// everything to that.
    fn stop(&mut self, _running: &mut Self::Running) -> Poll<()> {
        Poll::Ready(())
    }
}
