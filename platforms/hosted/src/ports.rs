//! Ports of domains: requests to open, bind and close them.

use crate::ends::{ChannelState, End};
use crate::layout::{EndIndex, MAX_PORTS};
use crate::machine::{Answer, ConnId, Machine, Member, Record, no};
use crate::protocol::{Reply, Status};
use pvio_event_channel::Port;
use pvio_grant_table::DomId;
use std::sync::Arc;

impl Machine {
    pub(crate) fn alloc_unbound(&mut self, conn: ConnId, remote: DomId) -> Answer {
        let Some(member) = self.members.get(&conn) else { return no(Status::Denied) };
        if member.scope.is_some() {
            return no(Status::Denied);
        }
        let user = member.domain;
        if !self.domains.contains_key(&remote.0) {
            return no(Status::NoDomain);
        }
        let Some(record) = self.domains.get_mut(&user.0) else { return no(Status::NoDomain) };
        let Some(port) = record.free_port() else { return no(Status::NoPorts) };
        let Ok(channel) = ChannelState::new(&format!("pvio-{user}-channel")) else {
            return no(Status::NoResources);
        };
        let end = End {
            remote: Some(remote),
            owner: conn,
            bound_to: None,
            index: EndIndex::First,
            channel: Arc::new(channel),
        };
        record.open(port, end)
    }

    pub(crate) fn bind(&mut self, conn: ConnId, remote: DomId, port: Port) -> Answer {
        let Some(member) = self.members.get(&conn) else { return no(Status::Denied) };
        let user = member.domain;
        if !member.reaches(remote) || member.scope.as_ref().is_some_and(|s| !s.permits(port)) {
            return no(Status::BadPort);
        }
        if self.out_of_channels(conn, member) {
            return no(Status::NoPorts);
        }
        let Some(record) = self.domains.get(&remote.0) else { return no(Status::NoDomain) };
        let theirs = record.ports.get(&port.0);
        let Some(theirs) = theirs.filter(|end| end.bound_to.is_none() && end.remote == Some(user))
        else {
            return no(Status::BadPort);
        };
        let end = End {
            remote: Some(remote),
            owner: conn,
            bound_to: Some(port),
            index: theirs.index.peer(),
            channel: Arc::clone(&theirs.channel),
        };
        let Some(record) = self.domains.get_mut(&user.0) else { return no(Status::NoDomain) };
        let Some(own_port) = record.free_port() else { return no(Status::NoPorts) };
        let answer = record.open(own_port, end);
        if let Some(end) = record.ports.get(&own_port.0) {
            end.set_bound(true);
            // The peer may have sent an event before, which was lost with an earlier process.
            end.raise();
        }
        let theirs = self.domains.get_mut(&remote.0).and_then(|r| r.ports.get_mut(&port.0));
        if let Some(theirs) = theirs {
            theirs.bound_to = Some(own_port);
        }
        answer
    }

    /// Whether a device connection has as many open ports as it may have.
    fn out_of_channels(&self, conn: ConnId, member: &Member) -> bool {
        let Some(scope) = &member.scope else { return false };
        let Some(record) = self.domains.get(&member.domain.0) else { return true };
        let open = record.ports.values().filter(|end| end.owner == conn).count();
        open >= usize::try_from(scope.channels).unwrap_or(usize::MAX)
    }

    pub(crate) fn close(&mut self, conn: ConnId, port: Port) -> Answer {
        let user = self.members.get(&conn).map(|member| member.domain);
        let record = user.and_then(|user| self.domains.get_mut(&user.0));
        let Some(record) = record else { return no(Status::NoDomain) };
        match record.ports.remove(&port.0) {
            Some(end) if end.owner == conn => {
                self.unbind(&end);
                (Status::Done.into(), Vec::new())
            }
            Some(foreign) => {
                record.ports.insert(port.0, foreign);
                no(Status::BadPort)
            }
            None => no(Status::BadPort),
        }
    }

    /// Closes all ports of a domain that a connection opened.
    pub(crate) fn close_all(&mut self, domain: DomId, conn: ConnId) {
        let Some(record) = self.domains.get_mut(&domain.0) else { return };
        let closed: Vec<_> = record.ports.extract_if(.., |_, end| end.owner == conn).collect();
        for (_, end) in closed {
            self.unbind(&end);
        }
    }

    /// Makes the peer's end of a closed end available for binding again.
    pub(crate) fn unbind(&mut self, gone: &End) {
        gone.set_bound(false);
        let (Some(port), Some(remote)) = (gone.bound_to, gone.remote) else { return };
        let Some(record) = self.domains.get_mut(&remote.0) else { return };
        if let Some(end) = record.ports.get_mut(&port.0) {
            end.bound_to = None;
        }
    }
}

impl Record {
    /// Assigns an end to `port`.
    fn open(&mut self, port: Port, end: End) -> Answer {
        self.next_port = port.0 % MAX_PORTS + 1;
        let files = end.files();
        let results = [port.0, end.index.to_wire()];
        self.ports.insert(port.0, end);
        (Reply { status: Status::Done, results }, files)
    }
}
