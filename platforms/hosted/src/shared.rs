//! State that the embedding process and the hypervisor's thread share.

use crate::config::DomainConfig;
use crate::error::DomainError;
use crate::machine::{ConnId, Ended, Machine};
use crate::names::Names;
use crate::pages::lock;
use crossbeam_channel::Sender;
use pvio_grant_table::DomId;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// Event of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HypervisorEvent {
    /// A process has joined as this domain.
    Joined {
        /// Domain id.
        domid: DomId,
    },
    /// The process that had joined as this domain ended, or violated the protocol. The domain still
    /// exists: it has device connections, or it is
    /// [`rejoinable`](crate::DomainConfig::rejoinable). Another process may join.
    Left {
        /// Domain id.
        domid: DomId,
    },
    /// The domain was destroyed: its last connection ended, or
    /// [`destroy_domain`](crate::Hypervisor::destroy_domain) was called.
    Died {
        /// Domain id.
        domid: DomId,
    },
}

/// State that both threads access.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) machine: Mutex<Machine>,
    pub(crate) names: Names,
    pub(crate) wake: OwnedFd,
    pub(crate) stop: AtomicBool,
    pub(crate) events: Sender<HypervisorEvent>,
}

impl Shared {
    /// Queues an event. A domain has two events, and two more for each process that joins. The
    /// embedding process, which reads them, starts these processes.
    pub(crate) fn tell(&self, event: HypervisorEvent) {
        // While the hypervisor stops, there is no receiver any more.
        let _ = self.events.send(event);
    }

    /// Creates a domain. Machine and names change under one lock, so that a reused id never finds
    /// remains of the previous domain with that id.
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

    /// Ends a connection, and destroys its domain if that was the last one.
    pub(crate) fn hung_up(&self, conn: ConnId) {
        let mut machine = lock(&self.machine);
        match machine.hung_up(conn) {
            Some(Ended::Domain(id)) => self.died(id),
            Some(Ended::Process(domid)) => self.tell(HypervisorEvent::Left { domid }),
            Some(Ended::Device) | None => {}
        }
    }

    fn died(&self, domid: DomId) {
        // Fails only if the store's thread has ended, and then no client can see the names.
        let _ = self.names.remove(domid);
        self.tell(HypervisorEvent::Died { domid });
    }
}
