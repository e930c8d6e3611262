//! A device's session in a process of its own, which is replaced when it dies.

mod launch;
mod moving;

use self::launch::{binary_path, launch, process_fault};
use super::channel::ChannelError;
use super::child::{Process, Program};
use super::confine::Confinement;
use super::deaths::Deaths;
use super::faults::reported;
use super::found::FoundProcesses;
use super::hub::{Hub, HubWatch};
use super::messages::{Descriptor, FromDevice, Start, ToDevice};
use super::registry::Registry;
use crate::upgrade::progress::{Moving, Outcome, Upgrade};
use pvio_recordfile::RecordDir;
use pvio_ring::error::Report;
use pvio_runtime::{Notify, Task};
use pvio_xenbus::driver::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// Maximum number of messages that are read in one step.
const MAX_MESSAGES: usize = 64;
/// Number of descriptors in a message: their purposes have paths, which can be long.
pub(super) const AT_ONCE: usize = 8;
/// How long a process may take to begin to serve.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a process may take to complete the requests in flight.
const STOP_TIMEOUT: Duration = Duration::from_secs(35);

/// What the processes of all devices are started with.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The events of all processes.
    pub hub: Hub,
    /// Their sockets.
    pub registry: Registry,
    /// The program of new processes, to which the command of a kind of process is added.
    pub program: Program,
    /// The name of the platform in the commands of device processes.
    pub platform: &'static str,
    /// In-flight records and fences; without them, a process that dies ends its session.
    pub records: Option<RecordDir>,
    /// The confinement of the processes.
    pub confinement: Confinement,
    /// The processes of an earlier supervisor that were not claimed yet, by device.
    pub found: FoundProcesses,
    /// The upgrade that the supervisor is part of.
    pub upgrade: Upgrade,
}

/// The descriptors and the message with which a session starts.
pub struct Launch<S> {
    /// Descriptors, with their purpose.
    pub descriptors: Vec<(Descriptor, OwnedFd)>,
    /// The message.
    pub serve: S,
}

/// The part of a session that depends on the class of the device.
pub trait Session: Send + Sync + 'static {
    /// The hidden command that runs its process, after the name of the platform.
    const COMMAND: &str;
    /// The message with which it starts.
    type Serve: Serialize;
    /// A change of its settings.
    type Change: Serialize;
    /// What identifies it to another supervisor.
    type Identity: DeserializeOwned;

    /// Returns the name of the device's fence, if it does I/O that may outlive its process.
    fn fence(&self) -> Option<String>;

    /// Returns whether the session can go on in another process.
    fn survives(&self) -> bool;

    /// Returns all settings that can change, as they are.
    fn settings(&self) -> Vec<Self::Change>;

    /// Returns the settings that have changed since the last call.
    fn changed(&self) -> Vec<Self::Change>;

    /// Returns the descriptors that a process needs for a change.
    fn descriptors(&self, _change: &Self::Change) -> Vec<OwnedFd> {
        Vec::new()
    }

    /// Notes that the process has ended after it had completed all requests.
    fn drained(&self) {}

    /// Returns what a process needs. Blocks; called on a separate thread, after all I/O of an
    /// earlier process has ended. `fence` is held by the process as long as it does I/O. `io` is how
    /// long the I/O of the process that died may have gone on after its death; `None` if it is
    /// unknown when that died.
    ///
    /// # Errors
    /// A [`Fault`] ends the session.
    fn launch(
        &self,
        start: Start,
        fence: Option<OwnedFd>,
        io: Option<Duration>,
    ) -> Result<Launch<Self::Serve>, Fault>;
}

/// A message for the owner of a session.
pub type Message<S> = FromDevice<<S as Session>::Identity>;

/// A session in a process.
pub struct Supervised<S: Session> {
    device: String,
    environment: Environment,
    session: Arc<S>,
    wake: Notify,
    stage: Stage,
    deaths: Deaths,
    /// Processes that were replaced, over the whole session.
    replaced: u64,
    /// The replacement of its process by one of another binary.
    moving: Option<Moving>,
    /// The binary of its processes, if it is not that of the supervisor.
    binary: Option<Arc<File>>,
}

enum Stage {
    Starting(Task<Result<Process, Fault>>),
    Running(Running),
    Stopping(Running, Instant),
    Ended,
}

struct Running {
    process: Process,
    ready: bool,
    since: Instant,
    _watches: [HubWatch; 2],
}

impl<S: Session> Supervised<S> {
    /// Starts a session.
    ///
    /// # Errors
    /// A [`Fault`] if the system has no thread.
    pub fn start(
        device: &str,
        environment: &Environment,
        session: Arc<S>,
        start: Start,
        wake: Notify,
    ) -> Result<Self, Fault> {
        let mut supervised = Self::new(device, environment, session, wake);
        supervised.launch(start, Duration::ZERO, None)?;
        Ok(supervised)
    }

    /// Continues the session in the process that serves it, which an earlier supervisor started.
    ///
    /// # Errors
    /// A [`Fault`] if the system lacks a resource.
    pub fn adopt(
        device: &str,
        environment: &Environment,
        session: Arc<S>,
        process: Process,
        wake: Notify,
    ) -> Result<Self, Fault> {
        let mut supervised = Self::new(device, environment, session, wake);
        supervised.stage = Stage::Running(Running { ready: true, ..supervised.watched(process)? });
        supervised.tell_settings(&supervised.session.settings());
        supervised.adopted();
        Ok(supervised)
    }

    fn new(device: &str, environment: &Environment, session: Arc<S>, wake: Notify) -> Self {
        Self {
            device: device.into(),
            environment: environment.clone(),
            session,
            wake,
            stage: Stage::Ended,
            deaths: Deaths::new(),
            replaced: 0,
            moving: None,
            binary: None,
        }
    }

    /// Returns what the session was started with.
    #[must_use]
    pub const fn session(&self) -> &Arc<S> {
        &self.session
    }

    /// Returns the number of its process, if one runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        match &self.stage {
            Stage::Running(running) | Stage::Stopping(running, _) => Some(running.process.pid()),
            Stage::Starting(_) | Stage::Ended => None,
        }
    }

    /// Returns how many processes were replaced because they died.
    #[must_use]
    pub const fn replaced(&self) -> u64 {
        self.replaced
    }

    /// Handles what has happened: calls `on` for messages, and replaces a process that has died.
    /// Ready while the session is served. To be called whenever the owner is woken.
    ///
    /// # Errors
    /// A [`Fault`]: the session has ended.
    pub fn poll(&mut self, on: &mut dyn FnMut(Message<S>)) -> Result<Poll<()>, Fault> {
        match &mut self.stage {
            Stage::Starting(task) => match task.poll() {
                Poll::Pending => Ok(Poll::Pending),
                Poll::Ready(started) => {
                    self.stage = Stage::Ended;
                    let failed = |e| Fault::new("device-process", format!("{e}"));
                    let process = match started.map_err(failed).flatten() {
                        Ok(process) => process,
                        Err(fault) => return self.failed_to_start(fault).map(|()| Poll::Pending),
                    };
                    self.stage = Stage::Running(self.watched(process)?);
                    // They may have changed since they were read for its start.
                    self.tell_settings(&self.session.settings());
                    self.poll(on)
                }
            },
            Stage::Running(_) => {
                self.tell_settings(&self.session.changed());
                let polled = self.poll_running(on)?;
                Ok(if self.moves(polled) { Poll::Pending } else { polled })
            }
            Stage::Stopping(..) if self.moving.is_some() => {
                self.poll_stopping(on).map(|()| Poll::Pending)
            }
            Stage::Stopping(..) | Stage::Ended => Ok(Poll::Pending),
        }
    }

    fn tell_settings(&self, settings: &[S::Change]) {
        settings.iter().for_each(|change| self.change(change));
    }

    fn poll_running(&mut self, on: &mut dyn FnMut(Message<S>)) -> Result<Poll<()>, Fault> {
        let Stage::Running(running) = &mut self.stage else { return Ok(Poll::Pending) };
        let mut left = MAX_MESSAGES;
        let lost = loop {
            if left == 0 {
                // The rest is read in the next step, which this one requests.
                (self.wake)();
                break None;
            }
            left -= 1;
            match running.process.receive::<Message<S>>() {
                Ok(None) if running.process.has_ended() => break Some(None),
                Ok(None) => break None,
                Ok(Some((FromDevice::Ready, _))) if running.ready => {} // not logged again
                Ok(Some((FromDevice::Ready, _))) => {
                    running.ready = true;
                    let (pid, start) = (running.process.pid(), running.since.elapsed());
                    tracing::info!(device = self.device, pid, ?start, "the device process serves");
                }
                Ok(Some((FromDevice::Fault(fault), _))) => {
                    let (fault, ready) = (reported(fault), running.ready);
                    self.end();
                    if ready {
                        return Err(fault);
                    }
                    return self.failed_to_start(fault).map(|()| Poll::Pending);
                }
                Ok(Some((message, _))) => on(message),
                Err(error) => break Some(Some(error)),
            }
        };
        match lost {
            Some(error) => self.replace_dead(error).map(|()| Poll::Pending),
            None if running.ready => Ok(Poll::Ready(())),
            None if running.since.elapsed() > START_TIMEOUT => {
                self.end();
                let text = "the device process does not begin to serve";
                self.failed_to_start(Fault::new("device-process", text)).map(|()| Poll::Pending)
            }
            None => Ok(Poll::Pending),
        }
    }

    /// Starts a successor of a process that has died or that violates the protocol.
    fn replace_dead(&mut self, error: Option<ChannelError>) -> Result<(), Fault> {
        let Stage::Running(running) = std::mem::replace(&mut self.stage, Stage::Ended) else {
            return Ok(());
        };
        running.process.kill();
        let status = running.process.wait();
        let how = status.map_or_else(|| "it ended".into(), |status| status.to_string());
        let device = self.device.as_str();
        let error = error.filter(|error| !matches!(error, ChannelError::Closed));
        let error = error.map(|error| Report(&error).to_string());
        let survives = self.environment.records.is_some() && self.session.survives();
        let Some(delay) = self.deaths.next(running.ready).filter(|_| survives) else {
            let text = format!("the device process ended unexpectedly ({how})");
            const REMEDY: &str =
                "see the log for the reason, and report it: this is a fault of pvio";
            return Err(Fault::new("device-process", text).with_remedy(REMEDY));
        };
        tracing::warn!(device, how, error, ?delay, "the device process ended: it is replaced");
        self.replaced += 1;
        if !running.ready && self.is_moving() {
            let fault = Fault::new("device-process", format!("the new process ended ({how})"));
            return self.failed_to_start(fault);
        }
        let start = if running.ready { Start::Resumed } else { Start::ResumedOrNew };
        self.launch(start, delay, Some(Instant::now()))
    }

    fn launch(
        &mut self,
        start: Start,
        delay: Duration,
        died: Option<Instant>,
    ) -> Result<(), Fault> {
        let (device, mut environment) = (self.device.clone(), self.environment.clone());
        let (session, binary) = (Arc::clone(&self.session), self.binary.clone());
        if let Some(binary) = &binary {
            environment.program.path = binary_path(binary);
        }
        let work = move || {
            std::thread::sleep(delay);
            // The descriptor of the binary is open until the process has started.
            let _binary = binary;
            launch(&device, &environment, &*session, (start, died))
        };
        let wake = Arc::clone(&self.wake);
        let task = Task::spawn(format!("start-{}", self.device), work, move || wake());
        let failed = |e: io::Error| {
            Fault::new(
                "worker",
                format!("the thread that starts the device process cannot start: {e}"),
            )
        };
        self.stage = Stage::Starting(task.map_err(failed)?);
        Ok(())
    }

    fn watched(&self, process: Process) -> Result<Running, Fault> {
        let watch = |fd| self.environment.hub.watch(fd, Arc::clone(&self.wake));
        let [channel, end] = process.events();
        let watches = watch(channel).and_then(|one| Ok([one, watch(end)?]));
        let watches = watches.map_err(|e| process_fault(&e))?;
        Ok(Running { process, ready: false, since: Instant::now(), _watches: watches })
    }

    /// Tells the process about a change of the settings. One that does not read its messages is
    /// killed, and replaced.
    fn change(&self, change: &S::Change) {
        let Stage::Running(running) = &self.stage else { return };
        let descriptors = self.session.descriptors(change);
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let message = ToDevice::<&S::Serve, _>::Change(change);
        if let Err(error) = running.process.send(&message, &descriptors) {
            let (device, error) = (&self.device, Report(&error).to_string());
            tracing::warn!(device, error, "the device process cannot be told about a change");
            running.process.kill();
        }
    }

    /// Lets the process complete its requests and end; the session can be resumed. Called until ready.
    pub fn stop(&mut self) -> Poll<()> {
        self.tell_settings(&self.session.changed());
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Starting(mut task) => match task.poll() {
                Poll::Pending => {
                    self.stage = Stage::Starting(task);
                    return Poll::Pending;
                }
                Poll::Ready(Ok(Ok(process))) => match self.watched(process) {
                    Ok(running) => {
                        self.stage = Stage::Running(running);
                        return self.stop();
                    }
                    Err(fault) => {
                        tracing::warn!(device = self.device, %fault, "a process cannot be stopped")
                    }
                },
                Poll::Ready(_) => {}
            },
            Stage::Running(running) => {
                if running.process.send(&ToDevice::<S::Serve, S::Change>::Stop, &[]).is_err() {
                    running.process.kill();
                }
                self.stage = Stage::Stopping(running, Instant::now() + STOP_TIMEOUT);
                return self.stop();
            }
            Stage::Stopping(running, until) => {
                if running.process.has_ended() {
                    running.process.wait();
                } else {
                    if Instant::now() >= until {
                        running.process.kill();
                    }
                    self.stage = Stage::Stopping(running, until);
                    return Poll::Pending;
                }
            }
            Stage::Ended => {}
        }
        let _ = self.environment.registry.remove(&self.device);
        self.environment.upgrade.finish(&self.device, Outcome::Closed);
        Poll::Ready(())
    }

    /// Ends the process at once.
    fn end(&mut self) {
        if let Stage::Running(running) = std::mem::replace(&mut self.stage, Stage::Ended) {
            running.process.kill();
            running.process.wait();
        }
    }

    /// Leaves the process to the next supervisor.
    pub fn leave(&mut self) {
        self.stage = Stage::Ended;
    }
}
