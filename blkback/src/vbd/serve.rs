//! The interface of a [`Vbd`](super::Vbd) to what opens disks and serves sessions.

use crate::config::Config;
use crate::engine::Geometry;
use crate::session::{Begin, SessionIdentity, SessionSpec};
use crate::stats::Stats;
use alloc::sync::Arc;
use core::task::Poll;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
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

/// Opens one disk and serves its sessions, in this process
/// ([`Session`](crate::session::Session)) or in another one. It serves at most one session at a
/// time.
///
/// A session starts with [`start`](Self::start) and is stopped with [`stop`](Self::stop), which
/// leaves its in-flight record: it can continue, here with [`Begin::Again`] or in a later process
/// with [`Begin::Resumed`]. [`end`](Self::end) removes the record.
pub trait VbdServer {
    /// A session that is being served. Dropping it stops it, as [`stop`](Self::stop), and may
    /// block.
    type Session;

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
    /// without media ([`ToolstackBack::is_empty_drive`]) is a disk of no sectors, whose sessions
    /// are [started](Self::start) as usual.
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

    /// Returns whether a flush of the open disk has failed.
    fn flush_failed(&self) -> bool {
        false
    }

    /// Returns whether operations of the open disk are held because its storage is full. When that
    /// changes, the server wakes the device's driver.
    fn is_paused(&self) -> bool {
        false
    }

    /// Starts to look up the current disk size, which may have changed since the disk was opened.
    /// Called periodically while the disk is served; does not block. If the size changed, the
    /// server wakes the device's driver.
    fn look_up_size(&mut self) {}

    /// Returns the disk size in sectors of 512 bytes as of the last lookup, if there was one.
    fn sectors(&mut self) -> Option<u64> {
        None
    }

    /// Returns the counters of each queue, over all sessions; at least one from the beginning.
    fn stats(&self) -> &[Arc<Stats>] {
        &[]
    }

    /// Checks whether a session of an earlier process can be resumed. Called before the disk is
    /// opened. If that process mapped guest pages for single requests, opening waits until these
    /// are unmapped.
    ///
    /// # Errors
    /// A [`Fault`]: the frontend reconnects. Where no memory outlives the process, no session can
    /// be resumed.
    fn resumable(&mut self, session: &SessionIdentity) -> Result<(), Fault>;

    /// Starts to serve a session of the open disk, without waiting until it is
    /// [ready](Self::ready). [`Begin::Again`] continues the session that this server started last,
    /// whose queues were stopped, after other media was opened.
    ///
    /// # Errors
    /// A [`Fault`] if nothing was started.
    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault>;

    /// Returns whether every queue of a session is being served. When that changes, the server
    /// wakes the device's driver.
    ///
    /// # Errors
    /// A [`Fault`]: the session cannot be served, and has to be stopped.
    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault>;

    /// Returns the fault that ended a session, if one did; reported once. The session has to be
    /// stopped.
    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault>;

    /// Sets the size of the disk in sectors of 512 bytes, for all queues of a session.
    fn resize(&mut self, session: &mut Self::Session, sectors: u64);

    /// Notes that requests must not be left to a later process by the next [`stop`](Self::stop):
    /// the session ends, or the media is changed. Those that are held because the storage is full
    /// complete with an error after a short time.
    fn abandon(&mut self, _session: &mut Self::Session) {}

    /// Stops serving a session: it takes no new requests and completes those in flight. Called
    /// again until it is ready; dropping the session does not block then.
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
}
