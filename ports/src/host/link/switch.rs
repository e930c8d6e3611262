//! Link to a switch of this process.
#![forbid(unsafe_code)]

use super::{LinkOps, LinkParams, WorkerSetup};
use crate::switch::{Switch, SwitchMembership, SwitchPort};
use crate::worker::Worker;
use alloc::string::ToString;
use alloc::sync::Arc;
use pvio_event_channel::BackendPlatform;
use pvio_netback::session::SessionConfig;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use std::os::fd::AsFd;

/// Link to a switch.
pub(in crate::host) struct SwitchLink {
    switch: Arc<Switch>,
    /// `Some` while a guest is connected.
    membership: Option<SwitchMembership>,
}

impl SwitchLink {
    /// Returns a link to the switch of that name.
    pub fn open(name: &str, params: &LinkParams) -> Result<Self, Fault> {
        Ok(Self { switch: params.settings.switches.get(name)?, membership: None })
    }
}

impl LinkOps for SwitchLink {
    fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault> {
        let gso = (session.features.gso_v4, session.features.gso_v6);
        let joined = self.switch.join(session.queues, gso);
        self.membership =
            Some(joined.map_err(|error| Fault::new("switch-join", error.to_string()))?);
        Ok(())
    }

    fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        let none = || Fault::new("switch-join", "the vif is not connected to its switch");
        let member_queue = self.membership.as_ref().ok_or_else(none)?.queue(setup.index);
        setup.spawn(move |stats| SwitchPort::new(member_queue?, stats), |_| {})
    }

    fn stopped(&mut self) {
        self.membership = None;
    }
}
