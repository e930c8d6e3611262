//! Link to the queues of a network interface, by AF_XDP.
#![forbid(unsafe_code)]

use super::{LinkDescription, LinkOps, LinkParams, WorkerSetup, not_duplicated, not_open};
use crate::afxdp::{AfXdp, AfXdpPort, InterfacePlace};
use crate::worker::Worker;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::BackendPlatform;
use pvio_netback::stats::Stats;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::LogLimit;
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Link to a network interface.
pub(in crate::host) struct AfXdpLink {
    interface: Arc<AfXdp>,
    /// Sockets that another process created, by queue, until they are used.
    sockets: Option<Vec<Option<OwnedFd>>>,
}

impl AfXdpLink {
    /// Opens the interface of that name.
    pub fn open(interface: &str, params: &LinkParams) -> Result<Self, Fault> {
        let netns = params.options.netns.as_deref();
        let interface = Arc::new(AfXdp::open(interface, netns, params.queues)?);
        Ok(Self { interface, sockets: None })
    }

    /// Returns the link to an interface that another process opened. It uses the sockets that this
    /// process created, if there are any.
    pub fn from_opened(
        descriptors: Vec<OwnedFd>,
        place: &InterfacePlace,
        queues: u32,
    ) -> Result<Self, Fault> {
        let mut descriptors = descriptors.into_iter();
        let program = descriptors.next().zip(descriptors.next()).ok_or_else(not_open)?;
        let interface = Arc::new(AfXdp::from_opened(place.clone(), queues, program.into()));
        let sockets: Vec<_> = descriptors.map(Some).collect();
        Ok(Self { interface, sockets: (!sockets.is_empty()).then_some(sockets) })
    }
}

impl LinkOps for AfXdpLink {
    fn max_queues(&self) -> Option<u32> {
        Some(self.interface.queues())
    }

    fn event(&self) -> Option<(&'static str, Arc<LogLimit>)> {
        Some(("queue-starts", Arc::clone(self.interface.starts())))
    }

    fn hand_over(&mut self) -> Result<Option<(LinkDescription, Vec<OwnedFd>)>, Fault> {
        let (place, queues) = (self.interface.place(), self.interface.queues());
        let program = self.interface.descriptors().map_err(|e| not_duplicated(&e))?;
        let sockets = (0..queues).map(|queue| self.interface.socket(queue));
        let sockets = sockets.collect::<Result<Vec<_>, _>>()?;
        let description = LinkDescription::AfXdp { place, queues, sockets: true };
        Ok(Some((description, program.into_iter().chain(sockets).collect())))
    }

    fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        let queue = u32::try_from(setup.index).map_err(|_| not_open())?;
        let socket = match &mut self.sockets {
            Some(sockets) => {
                let socket = sockets.get_mut(setup.index).and_then(Option::take);
                Some(socket.ok_or_else(not_open)?)
            }
            None => None,
        };
        let interface = Arc::clone(&self.interface);
        let port = move |stats: &Arc<Stats>| {
            let socket = socket.map_or_else(|| interface.socket(queue), Ok);
            // The kernel may take some time to release the queue from its last socket.
            let bound = socket.and_then(|socket| interface.bind(queue, socket));
            AfXdpPort::new(bound.map_err(io::Error::other)?, Arc::clone(stats))
        };
        setup.spawn(port, |_| {})
    }
}
