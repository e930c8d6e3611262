//! The processes of an earlier supervisor.

use super::channel::{Channel, Received};
use super::child::Process;
use super::hub::{Hub, HubWatch};
use super::messages::{FromDevice, ToDevice, is_understood};
use super::registry::Registry;
use pvio_ring::error::Report;
use pvio_runtime::Notify;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

/// How long after the start a process may wait for its device: longer than a toolstack's connection
/// to xenstore takes.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a process may take to name its session.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// The processes that were found when the supervisor started, by device, until they are claimed.
#[derive(Debug, Clone, Default)]
pub struct FoundProcesses(Arc<Found>);

#[derive(Debug)]
struct Found {
    processes: Mutex<BTreeMap<String, Channel>>,
    since: Instant,
}

impl Default for Found {
    fn default() -> Self {
        Self { processes: Mutex::default(), since: Instant::now() }
    }
}

impl FoundProcesses {
    /// Connects to the processes of an earlier supervisor.
    ///
    /// # Errors
    /// The system's error.
    pub fn connect(registry: &Registry) -> io::Result<Self> {
        let processes = Mutex::new(registry.processes()?);
        Ok(Self(Arc::new(Found { processes, since: Instant::now() })))
    }

    /// Returns the devices whose processes were not claimed yet.
    #[must_use]
    pub fn devices(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Claims the process of a device, if there is one.
    ///
    /// # Errors
    /// The system's error.
    pub fn claim(&self, device: &str, hub: &Hub, wake: Notify) -> io::Result<Option<FoundProcess>> {
        let Some(channel) = self.lock().remove(device) else { return Ok(None) };
        let watch = hub.watch(channel.as_fd(), wake)?;
        Ok(Some(FoundProcess { channel, since: Instant::now(), _watch: watch }))
    }

    /// Stops the processes that nobody has claimed some time after the start: their devices were
    /// removed while no supervisor ran.
    pub fn stop_unclaimed(&self) {
        if self.0.since.elapsed() < CLAIM_TIMEOUT {
            return;
        }
        for (device, channel) in std::mem::take(&mut *self.lock()) {
            tracing::info!(device, "a device process without a device is stopped");
            if let Err(error) = channel.send(&ToDevice::<(), ()>::Stop, &[]) {
                tracing::warn!(device, error = %Report(&error), "the process cannot be stopped");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Channel>> {
        self.0.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process of an earlier supervisor, before it has named its session.
#[derive(Debug)]
pub struct FoundProcess {
    channel: Channel,
    since: Instant,
    _watch: HubWatch,
}

/// A process of an earlier supervisor, and the session that it serves.
#[derive(Debug)]
pub struct Adoptable<I> {
    /// The process.
    pub process: Process,
    /// The session; `None` if it speaks another version of the protocol.
    pub session: Option<I>,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
}

impl FoundProcess {
    /// Returns the process when it has named its session; `None` if it does not.
    pub fn poll<I: DeserializeOwned>(self) -> Result<Option<Adoptable<I>>, Self> {
        match self.channel.receive_from::<FromDevice<I>>() {
            Ok(None) if self.since.elapsed() < HELLO_TIMEOUT => Err(self),
            Ok(Some(Received {
                message: FromDevice::Hello { version, session },
                descriptors,
                sender: Some(pid),
            })) => {
                let Ok(process) = Process::found(pid, self.channel) else { return Ok(None) };
                let session = session.filter(|_| is_understood(version)).map(|session| *session);
                Ok(Some(Adoptable { process, session, descriptors }))
            }
            _ => Ok(None),
        }
    }
}

/// The state of looking for a device's process.
#[derive(Debug, Default)]
pub enum Search<I> {
    /// Not begun.
    #[default]
    Before,
    /// The process has not named its session yet.
    Waiting(FoundProcess),
    /// The process is known, and not used yet.
    Known(Adoptable<I>),
    /// There is none, or it is used.
    Over,
}

impl<I> Search<I> {
    /// Takes the process, if it is known; the search is over then.
    pub fn take_known(&mut self) -> Option<Adoptable<I>> {
        match std::mem::replace(self, Self::Over) {
            Self::Known(known) => Some(known),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl<I: DeserializeOwned> Search<I> {
    /// Continues the search; ready when it is over, or the process is known.
    pub fn poll(
        &mut self,
        device: &str,
        found: &FoundProcesses,
        hub: &Hub,
        wake: &Notify,
    ) -> Poll<()> {
        if matches!(self, Self::Before) {
            *self = match found.claim(device, hub, Arc::clone(wake)) {
                Ok(Some(process)) => Self::Waiting(process),
                Ok(None) => Self::Over,
                Err(error) => {
                    tracing::warn!(device, %error, "the device process cannot be watched");
                    Self::Over
                }
            };
        }
        match std::mem::replace(self, Self::Over) {
            Self::Waiting(process) => match process.poll() {
                Err(process) => {
                    *self = Self::Waiting(process);
                    return Poll::Pending;
                }
                Ok(Some(known)) => *self = Self::Known(known),
                Ok(None) => {}
            },
            other => *self = other,
        }
        Poll::Ready(())
    }
}
