//! The capture of a NIC's packets in the process of the NIC.

use pvio_ports::capture_socket::{CaptureSocket, send_captured};
use pvio_ports::wrappers::capture::{Busy, Probe};
use pvio_runtime::Notify;
use pvio_xenbus::driver::Fault;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The point at which the packets of a NIC are captured, in all processes of all its sessions.
#[derive(Clone)]
pub struct CapturePoint {
    active: Arc<Mutex<Option<Active>>>,
    /// Lets the supervisor tell the process.
    wake: Notify,
}

struct Active {
    snaplen: usize,
    /// The end of the process, which its successor uses as well.
    sender: OwnedFd,
    /// Whether the running process has this end.
    told: bool,
}

/// A capture, which ends when this is dropped.
#[derive(Debug)]
pub struct ActiveCapture {
    /// Where the packets arrive.
    pub socket: CaptureSocket,
    point: CapturePoint,
}

impl CapturePoint {
    /// Returns a capture point without a capture. `wake` is called, on any thread, when one
    /// must be sent to the process.
    #[must_use]
    pub fn new(wake: Notify) -> Self {
        Self { active: Arc::default(), wake }
    }

    /// Starts a capture of up to `snaplen` bytes of each packet. It begins with the next session if
    /// there is none.
    ///
    /// # Errors
    /// [`Busy`], or the system has no descriptor.
    pub fn open(&self, snaplen: usize) -> io::Result<ActiveCapture> {
        let mut active = self.lock();
        if active.is_some() {
            return Err(io::Error::other(Busy));
        }
        let (socket, sender) = CaptureSocket::pair()?;
        *active = Some(Active { snaplen, sender, told: false });
        drop(active);
        (self.wake)();
        Ok(ActiveCapture { socket, point: self.clone() })
    }

    /// Returns the length to capture of each packet if there is a capture: for a process that
    /// starts, or about which the process that runs was not told.
    pub(super) fn tell(&self, starts: bool) -> Option<usize> {
        let mut active = self.lock();
        let active = active.as_mut().filter(|active| starts || !active.told)?;
        active.told = true;
        Some(active.snaplen)
    }

    /// Returns a descriptor to which a process sends the packets.
    pub(super) fn sender(&self) -> Option<OwnedFd> {
        self.lock().as_ref()?.sender.try_clone().ok()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for CapturePoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CapturePoint").field("is_active", &self.lock().is_some()).finish()
    }
}

impl Drop for ActiveCapture {
    fn drop(&mut self) {
        *self.point.lock() = None;
    }
}

/// Starts the thread of a NIC's process that sends captured packets: no thread can be created once
/// system calls are restricted. Each capture that it is sent ends before it takes the next one.
pub(super) fn start_thread(probe: Probe) -> Result<Sender<(usize, OwnedFd)>, Fault> {
    let (sender, captures) = channel::<(usize, OwnedFd)>();
    let serve = move || {
        for (snaplen, socket) in captures {
            tracing::info!("capture started");
            match send_captured(&probe, snaplen, &socket) {
                Ok(()) => tracing::info!("capture ended"),
                Err(error) => tracing::info!(%error, "capture ended: its reader is gone"),
            }
        }
    };
    let thread = std::thread::Builder::new().name("capture".into()).spawn(serve);
    let failed = |e| Fault::new("worker", format!("the thread of captures cannot start: {e}"));
    thread.map(|_| sender).map_err(failed)
}
