//! Ports of a vif without a tap.
#![forbid(unsafe_code)]

use super::NicSettings;
use crate::afxdp::{AfXdp, AfXdpError, AfXdpPort};
use crate::file::{FilePort, Recording, packets_of};
use crate::options::{NicOptions, Plug};
use crate::settings::RuntimeSettings;
use crate::switch::{Socket, Switch, SwitchPort};
use crate::worker::{News, Worker};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_netback::Platform;
use pvio_netback::queue::Queue;
use pvio_netback::stats::Stats;
use pvio_netback::vif::Session;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{LogLimit, PrivateBuf};
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

pub(super) enum OtherPort {
    Switch {
        switch: Arc<Switch>,
        /// `Some` while a guest is connected.
        socket: Option<Socket>,
    },
    AfXdp(Arc<AfXdp>),
    Loopback,
    Files {
        recording: Option<Arc<Recording>>,
        /// Packets still to be sent to the guest, by its first queue.
        replay: VecDeque<Vec<u8>>,
    },
}

impl OtherPort {
    /// Opens the port for at most `queues` queues. Returns `None` if the options select a tap.
    pub fn open(
        said: &NicOptions,
        name: &str,
        site: &NicSettings,
        queues: u32,
    ) -> Result<Option<Self>, Fault> {
        Ok(Some(match &said.plug {
            Plug::Tap | Plug::Opened(_) => return Ok(None),
            Plug::AfXdp(name) => {
                let opened = AfXdp::open(name, said.netns.as_deref(), queues);
                Self::AfXdp(Arc::new(opened.map_err(unusable)?))
            }
            Plug::Switch(name) => {
                let switch = site.switches.get(name).map_err(super::fault)?;
                Self::Switch { switch, socket: None }
            }
            Plug::Loopback => Self::Loopback,
            Plug::Files { record, replay } => {
                let replay = replay.as_deref().map(packets_of).transpose();
                let replay = replay.map_err(|text| Fault::new("nic-replay", text))?;
                let begin = |path: &std::path::PathBuf| {
                    Recording::begin(path, name).map_err(|e| {
                        let text = format!("{} cannot be recorded to: {e}", path.display());
                        Fault::new("nic-record", text)
                    })
                };
                let recording = record.as_ref().map(begin).transpose()?;
                Self::Files { recording, replay: replay.unwrap_or_default() }
            }
        }))
    }

    /// Returns the number of queues if the port determines it.
    pub fn queues(&self) -> Option<u32> {
        if let Self::AfXdp(interface) = self { Some(interface.queues()) } else { None }
    }

    /// Returns the rate limit of log lines for started queues, if there is one.
    pub fn starts(&self) -> Option<&Arc<LogLimit>> {
        if let Self::AfXdp(interface) = self { Some(interface.starts()) } else { None }
    }

    pub fn begin(&mut self, session: &Session) -> Result<(), Fault> {
        if let Self::Switch { switch, socket } = self {
            let takes = (session.features.gso_v4, session.features.gso_v6);
            let joined = switch.join(session.queues, takes);
            *socket = Some(joined.map_err(|error| Fault::new("switch-join", error))?);
        }
        Ok(())
    }

    pub fn stopped(&mut self) {
        if let Self::Switch { socket, .. } = self {
            *socket = None;
        }
    }

    /// Starts the worker of a queue. The inner result is the system's.
    pub fn start<P, R>(
        &mut self,
        index: usize,
        (name, queue, mail): (&str, Queue<P, PrivateBuf, R>, Option<OwnedFd>),
        knobs: Arc<RuntimeSettings>,
        tell: impl FnMut(News) + Send + 'static,
    ) -> Result<io::Result<Worker>, Fault>
    where
        P: Platform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        Ok(match self {
            Self::Switch { socket, .. } => {
                let none = || Fault::new("switch-join", "the vif is not plugged in");
                let end = socket.as_ref().ok_or_else(none)?.end(index);
                let make = move |stats: Arc<Stats>| {
                    let port = SwitchPort::new(end?, &stats)?;
                    Ok(knobs.around(port, stats, index))
                };
                Worker::spawn(name, queue, make, mail, tell)
            }
            Self::AfXdp(interface) => {
                let interface = Arc::clone(interface);
                let make = move |stats: Arc<Stats>| {
                    // The kernel may take some time to release the queue from its last socket.
                    let socket = interface.queue(u32::try_from(index).unwrap_or(u32::MAX));
                    let socket = socket.map_err(io::Error::other)?;
                    let port = AfXdpPort::new(socket, Arc::clone(&stats))?;
                    Ok(knobs.around(port, stats, index))
                };
                Worker::spawn(name, queue, make, mail, tell)
            }
            Self::Loopback => {
                let make = move |stats| Ok(knobs.around(FilePort::loopback()?, stats, index));
                Worker::spawn(name, queue, make, mail, tell)
            }
            Self::Files { recording, replay } => {
                let (recording, replay) = (recording.clone(), core::mem::take(replay));
                let make = move |stats| {
                    Ok(knobs.around(FilePort::files(recording, replay)?, stats, index))
                };
                Worker::spawn(name, queue, make, mail, tell)
            }
        })
    }
}

fn unusable(error: AfXdpError) -> Fault {
    Fault::new(error.code(), error)
}
