//! State of the hypervisor: domains, their memory, their ports. It does no I/O except for creating
//! memfds and eventfds. Every reply to a domain is computed here.

use crate::config::{DomainConfig, DomainInfo};
use crate::error::DomainError;
use crate::events::signal;
use crate::layout::{self, EVENTS_LEN, Frames, MAX_PORTS, Memory, event_bits};
use crate::mem::{Mapped, sealed_memfd};
use crate::protocol::{Reply, Request, Status};
use pvio_event_channel::Port;
use pvio_grant_table::DomId;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Number of a connection; never reused.
pub(crate) type ConnId = u64;

/// Reply and the descriptors sent with it.
pub(crate) type Answer = (Reply, Vec<Arc<OwnedFd>>);

/// A request that a correct domain never sends; its connection is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Violation;

/// All domains.
#[derive(Debug)]
pub(crate) struct Machine {
    domains: BTreeMap<u16, Record>,
    next: u16,
}

#[derive(Debug)]
struct Record {
    name: String,
    memory: Memory,
    memory_file: Arc<OwnedFd>,
    events: Mapped,
    events_file: Arc<OwnedFd>,
    max_ports: u32,
    ports: BTreeMap<u32, End>,
    next_port: u32,
    process: Option<(ConnId, i32)>,
}

/// One end of an event channel. It holds the eventfds of both ends, so that after one end is
/// closed, another can be bound in its place.
#[derive(Debug)]
struct End {
    /// Domain that may bind to the other end. `None` once that domain is destroyed, even if a new
    /// domain has its id: the memory that this end accesses is that of the destroyed one.
    remote: Option<DomId>,
    bound_to: Option<Port>,
    wake_us: Arc<OwnedFd>,
    wake_them: Arc<OwnedFd>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self { domains: BTreeMap::new(), next: 1 }
    }

    /// Creates a domain that no process has joined as.
    pub(crate) fn create(&mut self, config: &DomainConfig) -> Result<DomId, DomainError> {
        let frames = config.check()?;
        if self.domains.values().any(|record| record.name == config.name) {
            return Err(DomainError::NameInUse(config.name.clone()));
        }
        let id = match config.id {
            Some(id) if !id.is_real() => return Err(DomainError::NoDomain(id)),
            Some(id) if self.domains.contains_key(&id.0) => return Err(DomainError::IdInUse(id)),
            Some(id) => id,
            None => self.free_id().ok_or(DomainError::OutOfIds)?,
        };
        let record = Record::new(id, config, frames)?;
        if config.id.is_none() {
            self.next = id.0 + 1;
        }
        self.domains.insert(id.0, record);
        Ok(id)
    }

    /// Returns the next free id after the last one allocated, so that ids are reused as late as
    /// possible.
    fn free_id(&self) -> Option<DomId> {
        let all = (self.next..DomId::FIRST_RESERVED).chain(1..self.next);
        all.map(DomId).find(|id| id.is_real() && !self.domains.contains_key(&id.0))
    }

    /// Destroys a domain: its ports are closed, pages that it had mapped are released to their
    /// owners, and its memory is freed with its last user.
    pub(crate) fn destroy(&mut self, id: DomId) -> Result<(), DomainError> {
        let gone = self.domains.remove(&id.0).ok_or(DomainError::NoDomain(id))?;
        gone.memory.set_dead();
        for end in gone.ports.values() {
            self.unbind(end);
        }
        for record in self.domains.values_mut() {
            record.memory.table().forget_user(id);
            for end in record.ports.values_mut().filter(|end| end.remote == Some(id)) {
                end.remote = None;
            }
        }
        Ok(())
    }

    /// Destroys the domain of a connection, if it has one.
    pub(crate) fn hung_up(&mut self, conn: ConnId) -> Option<DomId> {
        let id = self.domain_of(conn)?;
        self.destroy(id).ok().map(|()| id)
    }

    /// Returns the domain of a connection.
    pub(crate) fn domain_of(&self, conn: ConnId) -> Option<DomId> {
        let is = |record: &Record| record.process.is_some_and(|(process, _)| process == conn);
        self.domains.iter().find(|(_, record)| is(record)).map(|(id, _)| DomId(*id))
    }

    /// Returns all domains.
    pub(crate) fn list(&self) -> Vec<DomainInfo> {
        let info = |(id, record): (&u16, &Record)| DomainInfo {
            id: DomId(*id),
            name: record.name.clone(),
            pid: record.process.map(|(_, pid)| pid),
            ports: record.ports.len(),
        };
        self.domains.iter().map(info).collect()
    }

    /// Serves the request of a process to join as a domain.
    pub(crate) fn join(&mut self, id: DomId, conn: ConnId, pid: i32) -> Answer {
        let Some(record) = self.domains.get_mut(&id.0) else { return no(Status::NoDomain) };
        if record.process.is_some() {
            return no(Status::Taken);
        }
        record.process = Some((conn, pid));
        let files = vec![Arc::clone(&record.memory_file), Arc::clone(&record.events_file)];
        (record.frames_reply(), files)
    }

    /// Serves a request of domain `user`.
    pub(crate) fn serve(&mut self, user: DomId, request: Request) -> Result<Answer, Violation> {
        Ok(match request {
            Request::Join(_) | Request::Xenstore => return Err(Violation),
            Request::Memory(id) => self.memory(user, id),
            Request::AllocUnbound(remote) => self.alloc_unbound(user, remote),
            Request::Bind(remote, port) => self.bind(user, remote, port),
            Request::Close(port) => self.close(user, port),
            Request::Kick(remote, port) => self.kick(user, remote, port),
        })
    }

    fn memory(&self, user: DomId, id: DomId) -> Answer {
        match self.domains.get(&id.0) {
            None => no(Status::NoDomain),
            Some(record) if !record.memory.grants_to(user) => no(Status::NothingGranted),
            Some(record) => (record.frames_reply(), vec![Arc::clone(&record.memory_file)]),
        }
    }

    fn alloc_unbound(&mut self, user: DomId, remote: DomId) -> Answer {
        let Some(their_events) = self.events_file(remote) else { return no(Status::NoDomain) };
        let Some(record) = self.domains.get_mut(&user.0) else { return no(Status::NoDomain) };
        let Some(port) = record.free_port() else { return no(Status::NoPorts) };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (Ok(ours), Ok(theirs)) = (eventfd(0, flags), eventfd(0, flags)) else {
            return no(Status::NoResources);
        };
        let end = End {
            remote: Some(remote),
            bound_to: None,
            wake_us: Arc::new(ours),
            wake_them: Arc::new(theirs),
        };
        record.open(port, end, their_events)
    }

    fn bind(&mut self, user: DomId, remote: DomId, port: Port) -> Answer {
        let Some(their_events) = self.events_file(remote) else { return no(Status::NoDomain) };
        let theirs = self.domains.get(&remote.0).and_then(|record| record.ports.get(&port.0));
        let Some(theirs) = theirs.filter(|end| end.bound_to.is_none() && end.remote == Some(user))
        else {
            return no(Status::BadPort);
        };
        let end = End {
            remote: Some(remote),
            bound_to: Some(port),
            wake_us: Arc::clone(&theirs.wake_them),
            wake_them: Arc::clone(&theirs.wake_us),
        };
        let Some(record) = self.domains.get_mut(&user.0) else { return no(Status::NoDomain) };
        let Some(own_port) = record.free_port() else { return no(Status::NoPorts) };
        let wake_us = Arc::clone(&end.wake_us);
        let answer = record.open(own_port, end, their_events);
        layout::set_link(&record.events, own_port, port.0);
        if let Some(record) = self.domains.get_mut(&remote.0) {
            layout::set_link(&record.events, port, own_port.0);
            if let Some(end) = record.ports.get_mut(&port.0) {
                end.bound_to = Some(own_port);
            }
        }
        // After the link was stored: a sender that found no peer bound and discarded an event wrote
        // its data before this.
        if let Some(record) = self.domains.get(&user.0) {
            record.raise(own_port, &wake_us);
        }
        answer
    }

    fn close(&mut self, user: DomId, port: Port) -> Answer {
        let Some(record) = self.domains.get_mut(&user.0) else { return no(Status::NoDomain) };
        let Some(end) = record.ports.remove(&port.0) else { return no(Status::BadPort) };
        layout::set_link(&record.events, port, 0);
        self.unbind(&end);
        (Status::Done.into(), Vec::new())
    }

    /// Makes the peer's end of a closed end available for binding again.
    fn unbind(&mut self, gone: &End) {
        let (Some(port), Some(remote)) = (gone.bound_to, gone.remote) else { return };
        let Some(record) = self.domains.get_mut(&remote.0) else { return };
        layout::set_link(&record.events, port, 0);
        if let Some(end) = record.ports.get_mut(&port.0) {
            end.bound_to = None;
        }
    }

    fn kick(&self, user: DomId, remote: DomId, port: Port) -> Answer {
        let known = self
            .domains
            .get(&user.0)
            .is_some_and(|record| record.ports.values().any(|end| end.remote == Some(remote)));
        let Some(record) = self.domains.get(&remote.0).filter(|_| known) else {
            return no(Status::BadPort);
        };
        if let Some(end) = record.ports.get(&port.0) {
            record.raise(port, &end.wake_us);
        }
        (Status::Done.into(), Vec::new())
    }

    fn events_file(&self, id: DomId) -> Option<Arc<OwnedFd>> {
        self.domains.get(&id.0).map(|record| Arc::clone(&record.events_file))
    }
}

impl Record {
    fn new(id: DomId, config: &DomainConfig, frames: Frames) -> Result<Self, DomainError> {
        let memory_file = sealed_memfd(&format!("pvio-{id}-memory"), frames.len())?;
        let events_file = sealed_memfd(&format!("pvio-{id}-events"), EVENTS_LEN)?;
        Ok(Self {
            name: config.name.clone(),
            memory: Memory { mapped: Mapped::front(&memory_file, frames.low_len())?, frames },
            memory_file: Arc::new(memory_file),
            events: Mapped::front(&events_file, EVENTS_LEN)?,
            events_file: Arc::new(events_file),
            max_ports: config.max_ports,
            ports: BTreeMap::new(),
            next_port: 1,
            process: None,
        })
    }

    fn frames_reply(&self) -> Reply {
        let frames = self.memory.frames;
        Reply { status: Status::Done, results: [frames.total(), frames.grant()] }
    }

    /// Returns the next free port after the last one allocated, so that numbers are reused as late
    /// as possible.
    fn free_port(&self) -> Option<Port> {
        if self.ports.len() >= self.max_ports as usize {
            return None;
        }
        let all = (self.next_port..=MAX_PORTS).chain(1..self.next_port);
        all.map(Port).find(|port| !self.ports.contains_key(&port.0))
    }

    /// Assigns an end to `port`. No peer is linked to it yet.
    fn open(&mut self, port: Port, end: End, their_events: Arc<OwnedFd>) -> Answer {
        self.next_port = port.0 % MAX_PORTS + 1;
        event_bits(&self.events).clear(port);
        layout::set_link(&self.events, port, 0);
        let files = vec![Arc::clone(&end.wake_us), Arc::clone(&end.wake_them), their_events];
        self.ports.insert(port.0, end);
        (Reply { status: Status::Done, results: [port.0, 0] }, files)
    }

    /// Wakes the owner of `port`, even if an event is pending already: that event may have been
    /// meant for the port's previous owner.
    fn raise(&self, port: Port, wake: &OwnedFd) {
        event_bits(&self.events).raise(port);
        signal(wake);
    }
}

fn no(status: Status) -> Answer {
    (status.into(), Vec::new())
}
