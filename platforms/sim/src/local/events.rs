//! Event channels.

use super::{LocalDomain, State, lock};
use pvio_event_channel::two_level::{EventPage, PORTS};
use pvio_event_channel::{DomId, EventChannel, EventChannels, EventError, Port};
use pvio_ring::shm::HeapMemory;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// Pending and mask bits of a domain.
pub(super) type Bits = EventPage<HeapMemory>;

pub(super) fn bits() -> Bits {
    EventPage::new(HeapMemory::pages(1))
}

/// Ports of all domains.
#[derive(Default)]
pub(super) struct Ports(HashMap<(DomId, Port), End>);

/// State of a port. A port that is not listed is closed.
enum End {
    /// Domain `remote` may bind to it.
    Unbound { remote: DomId },
    /// Events are sent to that port of that domain.
    Bound { remote: Weak<State>, port: Port },
}

/// One end of an event channel. Dropping it closes the end.
pub struct LocalChannel {
    domain: LocalDomain,
    port: Port,
}

impl EventChannels for LocalDomain {
    type Channel = LocalChannel;

    fn alloc_unbound(&self, remote: DomId) -> Result<LocalChannel, EventError> {
        self.add(|_| Ok(End::Unbound { remote }))
    }

    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<LocalChannel, EventError> {
        let peer = self.machine.find(remote).ok_or(EventError::NoDomain)?;
        let channel = self.add(|ports| match ports.0.get(&(remote, port)) {
            Some(End::Unbound { remote: meant }) if *meant == self.state.id => {
                Ok(End::Bound { remote: Arc::downgrade(&peer), port })
            }
            _ => Err(EventError::BadPort),
        })?;
        self.state.events.raise(channel.port);
        Ok(channel)
    }
}

impl LocalChannel {
    /// Whether an event is pending. It is not taken; this shows whether a sleeping thread would
    /// wake.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.domain.is_alive() && self.domain.state.events.pending(self.port)
    }
}

impl EventChannel for LocalChannel {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<(), EventError> {
        let state = &self.domain.state;
        let ports = lock(&self.domain.machine.0.ports);
        match ports.0.get(&(state.id, self.port)) {
            _ if !self.domain.is_alive() => Err(EventError::Closed),
            None => Err(EventError::Closed),
            Some(End::Unbound { .. }) => Ok(()),
            Some(End::Bound { remote, port }) => {
                state.events_sent.fetch_add(1, Ordering::Relaxed);
                if let Some(remote) = remote.upgrade() {
                    remote.events.raise(*port);
                }
                Ok(())
            }
        }
    }

    fn take(&self) -> Result<bool, EventError> {
        if !self.domain.is_alive() {
            return Err(EventError::Closed);
        }
        Ok(self.domain.state.events.take(self.port))
    }
}

impl LocalDomain {
    /// Allocates the lowest free port in the state `end`, atomically.
    fn add(
        &self,
        end: impl FnOnce(&Ports) -> Result<End, EventError>,
    ) -> Result<LocalChannel, EventError> {
        if !self.is_alive() {
            return Err(EventError::Closed);
        }
        let id = self.state.id;
        let mut ports = lock(&self.machine.0.ports);
        let free = (1..PORTS).map(Port).find(|&p| !ports.0.contains_key(&(id, p)));
        let port = free.ok_or(EventError::NoPorts)?;
        let end = end(&ports)?;
        if let End::Bound { remote, port: theirs } = &end
            && let Some(remote) = remote.upgrade()
        {
            let back = End::Bound { remote: Arc::downgrade(&self.state), port };
            ports.0.insert((remote.id, *theirs), back);
        }
        self.state.events.clear(port);
        ports.0.insert((id, port), end);
        Ok(LocalChannel { domain: self.clone(), port })
    }
}

impl Ports {
    pub(super) fn open(&self, id: DomId) -> usize {
        self.0.keys().filter(|(domain, _)| *domain == id).count()
    }

    pub(super) fn close_all(&mut self, id: DomId) {
        let ports: Vec<Port> = self.0.keys().filter(|(d, _)| *d == id).map(|&(_, p)| p).collect();
        ports.into_iter().for_each(|port| self.close(id, port));
    }

    /// Closes an end. The same domain may bind to the other end again, as on Xen.
    fn close(&mut self, id: DomId, port: Port) {
        if let Some(End::Bound { remote, port: theirs }) = self.0.remove(&(id, port))
            && let Some(remote) = remote.upgrade()
            && let Some(end) = self.0.get_mut(&(remote.id, theirs))
        {
            *end = End::Unbound { remote: id };
        }
    }
}

impl Drop for LocalChannel {
    fn drop(&mut self) {
        // The ports of a killed domain are closed already, and its id may be in use by a new
        // domain.
        if self.domain.is_alive() {
            lock(&self.domain.machine.0.ports).close(self.domain.state.id, self.port);
        }
    }
}

impl fmt::Debug for LocalChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {} of domain {}", self.port, self.domain.state.id)
    }
}
