//! State of the hypervisor: domains, their memory, and the connections that act for them. It does
//! no I/O except for creating memfds and eventfds. Every reply to a domain is computed here, and in
//! the methods for ports (`ports`).

use crate::config::{DomainConfig, DomainInfo};
use crate::ends::End;
use crate::error::DomainError;
use crate::layout::{Frames, MAX_PORTS, Memory, Uses};
use crate::mem::{Mapped, sealed_memfd};
use crate::protocol::{Reply, Request, Scope, Status};
use pvio_event_channel::Port;
use pvio_grant_table::{Access, DomId};
use pvio_ring::shm::full_fence;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Number of a connection; never reused.
pub(crate) type ConnId = u64;

/// Reply and the descriptors sent with it.
pub(crate) type Answer = (Reply, Vec<Arc<OwnedFd>>);

/// Limit of device connections of one domain.
const MAX_DEVICES: usize = 4096;

/// A request that a correct domain never sends; its connection is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Violation;

/// Result of the end of a connection for its domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// The domain was destroyed.
    Domain(DomId),
    /// The process that had joined as the domain left it.
    Process(DomId),
    /// A device connection ended.
    Device,
}

/// All domains.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) domains: BTreeMap<u16, Record>,
    pub(crate) members: BTreeMap<ConnId, Member>,
    next: u16,
}

#[derive(Debug)]
pub(crate) struct Record {
    name: String,
    memory: Memory,
    memory_file: Arc<OwnedFd>,
    max_ports: u32,
    pub(crate) ports: BTreeMap<u32, End>,
    pub(crate) next_port: u32,
    process: Option<(ConnId, i32)>,
    rejoinable: bool,
}

/// Connection that acts for a domain: that of the process that joined as the domain, or of a
/// device.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) domain: DomId,
    /// Limits of a device connection.
    pub(crate) scope: Option<Scope>,
    /// Whether the frontend of a device was destroyed. Another domain may have its id.
    frontend_gone: bool,
    /// Uses of the grants of other domains, by domain.
    uses: BTreeMap<u16, (Arc<OwnedFd>, Uses)>,
}

impl Member {
    fn new(domain: DomId, scope: Option<Scope>) -> Self {
        Self { domain, scope, frontend_gone: false, uses: BTreeMap::new() }
    }

    /// Whether it may get memory and bind ports of this domain.
    pub(crate) fn reaches(&self, domain: DomId) -> bool {
        let frontend = |scope: &Scope| scope.frontend == domain && !self.frontend_gone;
        self.scope.as_ref().is_none_or(frontend)
    }
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self { domains: BTreeMap::new(), members: BTreeMap::new(), next: 1 }
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
        for (_, member) in self.members.extract_if(.., |_, member| member.domain == id) {
            member.uses.values().for_each(|(_, uses)| uses.revoke());
        }
        for end in gone.ports.values() {
            self.unbind(end);
        }
        for record in self.domains.values_mut() {
            record.memory.table().forget_user(id);
            for end in record.ports.values_mut().filter(|end| end.remote == Some(id)) {
                end.remote = None;
            }
        }
        for member in self.members.values_mut() {
            member.uses.remove(&id.0);
            member.frontend_gone |= member.scope.as_ref().is_some_and(|s| s.frontend == id);
        }
        Ok(())
    }

    /// Ends a connection. A domain is destroyed with its last connection, unless processes may join
    /// again. Otherwise only what the connection itself opened and mapped is closed and released.
    pub(crate) fn hung_up(&mut self, conn: ConnId) -> Option<Ended> {
        let member = self.members.remove(&conn)?;
        let id = member.domain;
        let record = self.domains.get_mut(&id.0)?;
        let joined = record.process.take_if(|(process, _)| *process == conn).is_some();
        let others = self.members.values().any(|member| member.domain == id);
        if !others && !record.rejoinable {
            member.uses.values().for_each(|(_, uses)| uses.revoke());
            return self.destroy(id).ok().map(|()| Ended::Domain(id));
        }
        if joined {
            record.memory.set_left();
        }
        self.close_all(id, conn);
        self.release(&member);
        Some(if joined { Ended::Process(id) } else { Ended::Device })
    }

    /// Ends the uses of other domains' grants by a connection that ended. A grant that another
    /// connection of the same domain uses too stays in use.
    fn release(&self, gone: &Member) {
        for (owner, (_, uses)) in &gone.uses {
            uses.revoke();
            let Some(record) = self.domains.get(owner) else { continue };
            let others = self.members.values().filter(|member| member.domain == gone.domain);
            let others: Vec<_> = others.filter_map(|member| member.uses.get(owner)).collect();
            let table = record.memory.table();
            for gref in uses.in_use() {
                let used = || others.iter().any(|(_, other)| other.count(gref) != 0);
                let ours = table.entry(gref).is_some_and(|(_, user)| user == gone.domain);
                if !ours || used() {
                    continue;
                }
                table.unpin(gref, Access::ReadWrite);
                full_fence();
                // Another connection began to use it at the same time, and its mark was cleared.
                if used() && table.pin(gref, gone.domain, Access::ReadWrite).is_err() {
                    let _ = table.pin(gref, gone.domain, Access::ReadOnly);
                }
            }
        }
    }

    /// Returns the domain of a connection.
    pub(crate) fn domain_of(&self, conn: ConnId) -> Option<DomId> {
        self.members.get(&conn).map(|member| member.domain)
    }

    /// Whether a connection is that of a device.
    pub(crate) fn is_device(&self, conn: ConnId) -> bool {
        self.members.get(&conn).is_some_and(|member| member.scope.is_some())
    }

    /// Returns all domains.
    pub(crate) fn list(&self) -> Vec<DomainInfo> {
        let info = |(id, record): (&u16, &Record)| DomainInfo {
            id: DomId(*id),
            name: record.name.clone(),
            pid: record.process.map(|(_, pid)| pid),
            ports: record.ports.len(),
            devices: self.devices(DomId(*id)),
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
        self.members.insert(conn, Member::new(id, None));
        (record.frames_reply(), vec![Arc::clone(&record.memory_file)])
    }

    /// Serves the request of a process to create device connection `new`. Returns whether it was
    /// created.
    pub(crate) fn add_device(&mut self, domain: DomId, scope: Scope, new: ConnId) -> Status {
        if !self.domains.contains_key(&scope.frontend.0) {
            return Status::NoDomain;
        }
        if self.devices(domain) >= MAX_DEVICES {
            return Status::NoResources;
        }
        self.members.insert(new, Member::new(domain, Some(scope)));
        Status::Done
    }

    fn devices(&self, id: DomId) -> usize {
        let device = |member: &&Member| member.domain == id && member.scope.is_some();
        self.members.values().filter(device).count()
    }

    /// Serves a request of a connection.
    pub(crate) fn serve(&mut self, conn: ConnId, request: Request) -> Result<Answer, Violation> {
        Ok(match request {
            Request::Join(_) | Request::Xenstore | Request::Device(_) => return Err(Violation),
            Request::Memory(id) => self.memory(conn, id),
            Request::AllocUnbound(remote) => self.alloc_unbound(conn, remote),
            Request::Bind(remote, port) => self.bind(conn, remote, port),
            Request::Close(port) => self.close(conn, port),
        })
    }

    fn memory(&mut self, conn: ConnId, id: DomId) -> Answer {
        let Some(member) = self.members.get_mut(&conn) else { return no(Status::Denied) };
        if !member.reaches(id) {
            return no(Status::Denied);
        }
        let Some(record) = self.domains.get(&id.0) else { return no(Status::NoDomain) };
        if !record.memory.grants_to(member.domain) {
            return no(Status::NothingGranted);
        }
        let uses = match member.uses.get(&id.0) {
            Some((file, _)) => Arc::clone(file),
            None => match uses_file(id, record.memory.frames) {
                Ok(made) => Arc::clone(&member.uses.entry(id.0).or_insert(made).0),
                Err(_) => return no(Status::NoResources),
            },
        };
        (record.frames_reply(), vec![Arc::clone(&record.memory_file), uses])
    }
}

fn uses_file(id: DomId, frames: Frames) -> io::Result<(Arc<OwnedFd>, Uses)> {
    let file = sealed_memfd(&format!("pvio-{id}-uses"), Uses::file_len(frames))?;
    let uses = Uses::map(&file, frames)?;
    Ok((Arc::new(file), uses))
}

impl Record {
    fn new(id: DomId, config: &DomainConfig, frames: Frames) -> Result<Self, DomainError> {
        let memory_file = sealed_memfd(&format!("pvio-{id}-memory"), frames.len())?;
        Ok(Self {
            name: config.name.clone(),
            memory: Memory { mapped: Mapped::front(&memory_file, frames.low_len())?, frames },
            memory_file: Arc::new(memory_file),
            max_ports: config.max_ports,
            ports: BTreeMap::new(),
            next_port: 1,
            process: None,
            rejoinable: config.rejoinable,
        })
    }

    fn frames_reply(&self) -> Reply {
        let frames = self.memory.frames;
        Reply { status: Status::Done, results: [frames.total(), frames.grant()] }
    }

    /// Returns the next free port after the last one allocated, so that numbers are reused as late
    /// as possible.
    pub(crate) fn free_port(&self) -> Option<Port> {
        if self.ports.len() >= self.max_ports as usize {
            return None;
        }
        let all = (self.next_port..=MAX_PORTS).chain(1..self.next_port);
        all.map(Port).find(|port| !self.ports.contains_key(&port.0))
    }
}

/// Returns the answer to a request that was not carried out.
pub(crate) fn no(status: Status) -> Answer {
    (status.into(), Vec::new())
}
