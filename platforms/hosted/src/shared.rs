//! What the embedding process and the hypervisor's thread share.

use crate::config::DomainConfig;
use crate::error::DomainError;
use crate::machine::{ConnId, Machine};
use crate::names::Names;
use crate::pages::lock;
use crossbeam_channel::Sender;
use pvio_grant_table::DomId;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// What became of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HypervisorEvent {
    /// A process is this domain now.
    Joined {
        /// The domain.
        domid: DomId,
    },
    /// The domain was destroyed: its process ended, broke the protocol, or
    /// [`destroy_domain`](crate::Hypervisor::destroy_domain) was called.
    Died {
        /// The domain.
        domid: DomId,
    },
}

/// What the embedding process and the hypervisor's thread both reach.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) machine: Mutex<Machine>,
    pub(crate) names: Names,
    pub(crate) wake: OwnedFd,
    pub(crate) stop: AtomicBool,
    pub(crate) events: Sender<HypervisorEvent>,
}

impl Shared {
    /// Two events a domain at most, and only the embedding process makes domains: the queue is as
    /// long as that process lets it get.
    pub(crate) fn tell(&self, event: HypervisorEvent) {
        // Nobody listens any more while the hypervisor stops.
        let _ = self.events.send(event);
    }

    /// Makes a domain. Machine and names change under one lock, so that a number that is handed out
    /// again never meets what is left of the domain that had it.
    pub(crate) fn create(&self, config: &DomainConfig) -> Result<DomId, DomainError> {
        let mut machine = lock(&self.machine);
        let id = machine.create(config)?;
        if let Err(why) = self.names.add(id, &config.name) {
            machine.destroy(id)?;
            let _ = self.names.remove(id);
            return Err(DomainError::Xenstore(why));
        }
        Ok(id)
    }

    /// Destroys a domain.
    pub(crate) fn destroy(&self, id: DomId) -> Result<(), DomainError> {
        let mut machine = lock(&self.machine);
        machine.destroy(id)?;
        self.died(id);
        Ok(())
    }

    /// Destroys the domain a connection was, if it was one.
    pub(crate) fn hung_up(&self, conn: ConnId) {
        let mut machine = lock(&self.machine);
        if let Some(id) = machine.hung_up(conn) {
            self.died(id);
        }
    }

    fn died(&self, domid: DomId) {
        // Fails only if the store's thread ended, and then nobody is left to see the names.
        let _ = self.names.remove(domid);
        self.tell(HypervisorEvent::Died { domid });
    }
}
