//! The processes of an earlier supervisor.

use super::channel::{Channel, Received};
use super::child::Process;
use super::hub::{Hub, HubWatch};
use super::messages::{FromDevice, VERSION};
use super::registry::Registry;
use pvio_runtime::Notify;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

/// How long a process may take to name its session.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// The processes that were found when the supervisor started, by device, until they are claimed.
#[derive(Debug, Clone, Default)]
pub struct FoundProcesses(Arc<Mutex<BTreeMap<String, Channel>>>);

impl FoundProcesses {
    /// Connects to the processes of an earlier supervisor.
    ///
    /// # Errors
    /// The system's error.
    pub fn connect(registry: &Registry) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(registry.processes()?))))
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

    /// Takes all processes that nobody claimed.
    #[must_use]
    pub fn take_all(&self) -> BTreeMap<String, Channel> {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Channel>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
                let session = session.filter(|_| version == VERSION).map(|session| *session);
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
