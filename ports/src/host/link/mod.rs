//! What a vif is connected to. Each kind of link has a file and an arm of [`Link`].
//!
//! | link | port of each queue |
//! |---|---|
//! | `tap` | [`TapPort`](crate::tap::TapPort) |
//! | `switch` | [`SwitchPort`](crate::switch::SwitchPort) |
//! | `afxdp` | [`AfXdpPort`](crate::afxdp::AfXdpPort) |
//! | `file` | [`FilePort`](crate::file::FilePort) |
//!
//! A link is opened once and stays open as long as the device, so that its attachment survives
//! reconnections of the guest. It is opened and dropped on separate threads, since either may block.
#![forbid(unsafe_code)]

mod afxdp;
mod description;
mod file;
mod switch;
mod tap;

pub use description::LinkDescription;
pub(super) use tap::TapEvents;

use super::config::{NicConfig, NicSettings};
use crate::afxdp::AfXdpError;
use crate::options::{LinkSpec, NicOptions};
use crate::settings::RuntimeSettings;
use crate::wait::WaitPort;
use crate::worker::{self, Publish, Worker};
use afxdp::AfXdpLink;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use file::FileLink;
use pvio_event_channel::BackendPlatform;
use pvio_netback::queue::{Queue, Reception, Waker};
use pvio_netback::session::SessionConfig;
use pvio_netback::stats::Stats;
use pvio_netback::vif::Attach;
use pvio_ring::error::{Remedy, Report};
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{EventFd, Gate, LogLimit, PrivateBuf};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::ToolstackBack;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use switch::SwitchLink;
use tap::TapLink;

/// An open link.
pub(super) enum Link {
    Tap(TapLink),
    Switch(SwitchLink),
    AfXdp(AfXdpLink),
    File(FileLink),
}

/// Calls a method of the link of any kind.
macro_rules! dispatch {
    ($link:expr, $name:ident => $call:expr) => {
        match $link {
            Self::Tap($name) => $call,
            Self::Switch($name) => $call,
            Self::AfXdp($name) => $call,
            Self::File($name) => $call,
        }
    };
}

/// Operations of a link. A link is closed when it is dropped.
trait LinkOps {
    /// Returns the largest number of queues, if the link limits it.
    fn max_queues(&self) -> Option<u32> {
        None
    }

    /// Returns the count of a rate-limited log line of this link, with its name.
    fn event(&self) -> Option<(&'static str, Arc<LogLimit>)> {
        None
    }

    /// Returns what another process needs to use this link instead of this one; `None` if that is
    /// not possible.
    fn hand_over(&mut self) -> Result<Option<(LinkDescription, Vec<OwnedFd>)>, Fault> {
        Ok(None)
    }

    /// Prepares the link for a session.
    fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault> {
        let _ = session;
        Ok(())
    }

    /// Starts the worker of a queue.
    fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static;

    /// Called when every queue of the session runs.
    fn started(&mut self) {}

    /// Called when the session has ended and its queues have stopped.
    fn stopped(&mut self) {}
}

/// Parameters of a link.
pub(super) struct LinkParams {
    /// Name of the vif.
    pub name: String,
    pub vif: ToolstackBack,
    pub attach: Attach,
    pub config: NicConfig,
    pub options: NicOptions,
    pub settings: Arc<NicSettings>,
    /// Largest number of queues.
    pub queues: u32,
    pub tap_events: TapEvents,
}

impl Link {
    /// Opens the link that the options select.
    pub fn open(params: &LinkParams) -> Result<Self, Fault> {
        Ok(match &params.options.link {
            LinkSpec::NewTap => Self::Tap(TapLink::create(params)?),
            LinkSpec::ExistingTap(name) => Self::Tap(TapLink::open(name, params)?),
            LinkSpec::Switch(name) => Self::Switch(SwitchLink::open(name, params)?),
            LinkSpec::AfXdp(interface) => Self::AfXdp(AfXdpLink::open(interface, params)?),
            LinkSpec::Loopback => Self::File(FileLink::Loopback),
            LinkSpec::Files { record, replay } => {
                Self::File(FileLink::open(record.as_deref(), replay.as_deref(), params)?)
            }
        })
    }

    /// Returns the link to what another process opened.
    pub fn from_opened(
        description: &LinkDescription,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, Fault> {
        let (found, expected) = (descriptors.len(), description.descriptors());
        if found != expected {
            let text = format!("the NIC's port has {expected} descriptors, not {found}");
            return Err(Fault::new("nic-descriptors", text));
        }
        Ok(match description {
            LinkDescription::Tap { mtu, .. } => Self::Tap(TapLink::from_opened(descriptors, *mtu)?),
            LinkDescription::Loopback => Self::File(FileLink::Loopback),
            LinkDescription::Files { interface, record, replay } => {
                let replay = replay.as_deref();
                Self::File(FileLink::from_opened(descriptors, interface, *record, replay)?)
            }
            LinkDescription::AfXdp { place, queues, .. } => {
                Self::AfXdp(AfXdpLink::from_opened(descriptors, place, *queues)?)
            }
        })
    }

    /// Returns the largest number of queues, if the link limits it.
    pub fn max_queues(&self) -> Option<u32> {
        dispatch!(self, link => link.max_queues())
    }

    /// Returns the count of a rate-limited log line of this link, with its name.
    pub fn event(&self) -> Option<(&'static str, Arc<LogLimit>)> {
        dispatch!(self, link => link.event())
    }

    /// Returns what another process needs to use this link instead of this one; `None` if that is
    /// not possible.
    pub fn hand_over(&mut self) -> Result<Option<(LinkDescription, Vec<OwnedFd>)>, Fault> {
        dispatch!(self, link => link.hand_over())
    }

    /// Prepares the link for a session.
    pub fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault> {
        dispatch!(self, link => link.begin(session))
    }

    /// Starts the worker of a queue.
    pub fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        dispatch!(self, link => link.start(setup))
    }

    /// Called when every queue of the session runs.
    pub fn started(&mut self) {
        dispatch!(self, link => link.started());
    }

    /// Called when the session has ended and its queues have stopped.
    pub fn stopped(&mut self) {
        dispatch!(self, link => link.stopped());
    }
}

/// Everything that the worker of a queue needs, except its port.
pub(super) struct WorkerSetup<P: BackendPlatform, R> {
    /// Number of the queue, counted from 0.
    pub index: usize,
    pub name: String,
    pub queue: Queue<P, PrivateBuf, R>,
    /// Eventfd by which the other queues of the session wake the worker.
    pub wakeup: Option<EventFd>,
    pub settings: Arc<RuntimeSettings>,
    /// Wakes the thread that drives the device.
    pub wake: Waker,
    /// Holds the worker back until its process is ready to serve.
    pub gate: Gate,
    /// Publishes the counters of the queue.
    pub publish: Option<Publish>,
}

impl<P, R> WorkerSetup<P, R>
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
    R: SharedMemory + Clone + Send + Sync + 'static,
{
    /// Starts the worker. Its thread calls `port` to create the port, and `stalled` when the guest
    /// has not received for a long time (`true`) or receives again (`false`).
    fn spawn<N>(
        self,
        port: impl FnOnce(&Arc<Stats>) -> io::Result<N> + Send + 'static,
        stalled: impl Fn(bool) + Send + 'static,
    ) -> Result<Worker, Fault>
    where
        N: WaitPort<Buf = PrivateBuf> + 'static,
    {
        let Self { index, name, queue, wakeup, settings, wake, gate, publish } = self;
        let wrapped = move |stats: Arc<Stats>| {
            let port = port(&stats)?;
            Ok(settings.wrap(port, stats, index))
        };
        let reception = move |reception| stalled(reception == Reception::Stalled);
        let spawned =
            worker::spawn_held(&name, queue, wrapped, wakeup, wake, reception, (gate, publish));
        spawned.map_err(not_started)
    }
}

/// Returns the fault of a worker that cannot start.
pub(super) fn not_started(error: io::Error) -> Fault {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<AfXdpError>());
    let text = format!("the queue's worker cannot start: {}", Report(&error));
    Fault { remedy: cause.and_then(Remedy::remedy), ..Fault::new("worker", text) }
}

/// Returns the fault of a link whose descriptors cannot be duplicated.
fn not_duplicated(error: &io::Error) -> Fault {
    let text = format!("the descriptors of the NIC's port cannot be duplicated: {error}");
    Fault::new("nic-descriptors", text)
}

/// Returns the fault of a session without an open link.
pub(super) fn not_open() -> Fault {
    Fault::new("tap-missing", "no port is open for the queue")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_that_cannot_start_reports_cause_and_remedy() {
        let fault =
            not_started(io::Error::other(AfXdpError::NotPermitted("open an AF_XDP socket")));
        assert!(fault.text.ends_with("cannot open an AF_XDP socket: permission denied"), "{fault}");
        assert!(fault.remedy.is_some_and(|remedy| remedy.contains("CAP_NET_ADMIN")));
        let fault = not_started(io::ErrorKind::OutOfMemory.into());
        assert!(fault.text.ends_with("out of memory") && fault.remedy.is_none(), "{fault}");
    }
}
