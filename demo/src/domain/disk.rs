//! A disk attached through the frontend driver, as the guest's file system reads it.

use super::watcher::name_of;
use crate::guest::fs::BlockRead;
use crate::guest::status::Devices;
use pvio_blkfront::blocking::{BlockingDisk, DiskError};
use pvio_daemon::failure::Failure;
use pvio_hosted::Domain;
use pvio_ring::error::Report;
use pvio_runtime::LogLimit;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::DeviceAddr;
use std::io;
use std::time::Duration;

/// How long a read waits for a reconnection to the backend. The HTTP server responds to its client
/// earlier; the read itself continues when the driver domain is restarted.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// How long to wait for the backend to close when the guest closes its disk.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The disk; closed when dropped.
pub struct AttachedDisk {
    session: Option<BlockingDisk<Domain, Client>>,
    size: u64,
    devices: Devices,
    name: String,
    sessions: u32,
}

impl std::fmt::Debug for AttachedDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AttachedDisk({} bytes)", self.size)
    }
}

impl AttachedDisk {
    /// Attaches the disk as soon as its backend is ready. `devices` is updated with the number of
    /// sessions.
    ///
    /// # Errors
    /// The backend cannot serve the disk; the failure has the backend's message.
    pub fn attach(domain: &Domain, addr: DeviceAddr, devices: Devices) -> Result<Self, Failure> {
        let xs = domain.xenstore().map_err(Failure::of)?;
        let session =
            BlockingDisk::attach(domain.clone(), xs, addr, RECONNECT_TIMEOUT).map_err(failure)?;
        let size = session.size();
        let name = name_of(addr);
        let mut disk = Self { session: Some(session), size, devices, name, sessions: 0 };
        disk.update_sessions();
        Ok(disk)
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.size
    }

    fn update_sessions(&mut self) {
        let sessions = self.session.as_ref().map_or(0, |session| session.device().sessions());
        if sessions != self.sessions {
            self.sessions = sessions;
            self.devices.set_sessions(&self.name, sessions);
        }
    }
}

/// Converts the error of a disk, with the backend's message if there is one.
pub fn failure(e: DiskError) -> Failure {
    match e {
        DiskError::Closed(why) if !why.is_empty() => Failure::new(why, ""),
        other => Failure::of(other),
    }
}

impl BlockRead for AttachedDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let session = self.session.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let result = session.read_at(offset, buf).map_err(io::Error::other);
        self.update_sessions();
        result
    }

    fn poll_backend(&mut self) {
        if let Some(session) = &mut self.session
            && let Err(e) = session.queue()
        {
            static FAILED: LogLimit = LogLimit::new();
            if let Some(unlogged) = FAILED.admit() {
                tracing::warn!(error = %Report(&e), unlogged, "the disk cannot be used");
            }
        }
        self.update_sessions();
    }
}

impl Drop for AttachedDisk {
    fn drop(&mut self) {
        if let Some(mut session) = self.session.take() {
            session.set_patience(CLOSE_TIMEOUT);
            if let Err(e) = session.close() {
                tracing::warn!(error = %Report(&e), "the disk cannot be closed");
            }
        }
    }
}
