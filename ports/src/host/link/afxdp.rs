//! Link to the queues of a network interface, by AF_XDP.
#![forbid(unsafe_code)]

use super::{LinkOps, LinkParams, WorkerSetup};
use crate::afxdp::{AfXdp, AfXdpPort};
use crate::worker::Worker;
use alloc::sync::Arc;
use pvio_event_channel::BackendPlatform;
use pvio_netback::stats::Stats;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::LogLimit;
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::AsFd;

/// Link to a network interface.
pub(in crate::host) struct AfXdpLink(Arc<AfXdp>);

impl AfXdpLink {
    /// Opens the interface of that name.
    pub fn open(interface: &str, params: &LinkParams) -> Result<Self, Fault> {
        let netns = params.options.netns.as_deref();
        Ok(Self(Arc::new(AfXdp::open(interface, netns, params.queues)?)))
    }
}

impl LinkOps for AfXdpLink {
    fn max_queues(&self) -> Option<u32> {
        Some(self.0.queues())
    }

    fn event(&self) -> Option<(&'static str, Arc<LogLimit>)> {
        Some(("queue-starts", Arc::clone(self.0.starts())))
    }

    fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        let (interface, index) = (Arc::clone(&self.0), setup.index);
        let port = move |stats: &Arc<Stats>| {
            // The kernel may take some time to release the queue from its last socket.
            let socket = interface.queue(u32::try_from(index).unwrap_or(u32::MAX));
            let socket = socket.map_err(io::Error::other)?;
            AfXdpPort::new(socket, Arc::clone(stats))
        };
        setup.spawn(port, |_| {})
    }
}
