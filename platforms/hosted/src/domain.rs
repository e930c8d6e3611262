//! A domain, from the view of a process that acts for it.

use crate::connection::Connection;
use crate::error::{JoinError, XenstoreError};
use crate::layout::{Frames, map_memory};
use crate::pages::{Grants, OwnMemory};
use crate::peers::{PeerMemory, Peers};
use crate::protocol::{Request, Status};
use crate::statedir;
use pvio_grant_table::{DomId, GrantStatus};
use pvio_xenbus::client::Client;
use rustix::io::Errno;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Domain of this process: its memory, grants and event channels. Cheap to clone. The connection to
/// the hypervisor ends when the last clone, mapping and event channel is dropped; the domain
/// exists until its last connection ends.
#[derive(Clone, Debug)]
pub struct Domain(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) id: DomId,
    pub(crate) connection: Arc<Connection>,
    /// `None` in a device process, which grants nothing.
    pub(crate) own: Option<Own>,
    pub(crate) peers: Arc<Peers>,
}

/// Memory of a domain and the grants to it.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) memory: Arc<OwnMemory>,
    pub(crate) grants: Mutex<Grants>,
}

impl Domain {
    /// Joins as domain `id` of the hypervisor that runs in `state_dir`. When this process ends, or
    /// drops the domain and everything derived from it, its mappings end and its event channels are
    /// closed. The domain is destroyed then, unless it has device connections or is
    /// [`rejoinable`](crate::DomainConfig::rejoinable). If it is not destroyed, another
    /// process may join. Grants of the first process are ended then, except those in use.
    ///
    /// # Errors
    /// Any [`JoinError`].
    pub fn join(state_dir: impl AsRef<Path>, id: DomId) -> Result<Self, JoinError> {
        let state_dir = state_dir.as_ref();
        let socket = state_dir.join(statedir::HYPERVISOR_SOCKET);
        let (connection, uid) = Connection::open(&socket).map_err(|why| match why {
            Errno::NOENT | Errno::CONNREFUSED => JoinError::NoHypervisor(state_dir.into()),
            why => JoinError::Io(why.into()),
        })?;
        if uid != rustix::process::getuid() {
            return Err(JoinError::OtherUser);
        }
        if !id.is_real() {
            return Err(JoinError::NoDomain(id));
        }
        let asked = connection.call::<1>(&Request::Join(id));
        let (reply, fds) = asked.map_err(|_| JoinError::Lost)?;
        let [memory] = match (reply.status, fds) {
            (Status::Done, Some(fds)) => fds,
            (Status::NoDomain, _) => return Err(JoinError::NoDomain(id)),
            (Status::Taken, _) => return Err(JoinError::Taken(id)),
            _ => return Err(JoinError::Lost),
        };
        let [total, grant] = reply.results;
        let frames = Frames::from_wire(total, grant).ok_or(JoinError::Lost)?;
        let memory = map_memory(memory, frames)?;
        let busy = if memory.was_left() { memory.end_grants() } else { Vec::new() };
        let grants = Mutex::new(Grants::new(frames.entries(), &busy));
        let own = Own { memory: Arc::new(OwnMemory::new(memory, &busy)), grants };
        Ok(Self::new(id, connection, Some(own)))
    }

    /// Makes the domain of a process from its connection.
    pub(crate) fn new(id: DomId, connection: Connection, own: Option<Own>) -> Self {
        let peers = Arc::new(Peers::new(id));
        Self(Arc::new(Inner { id, connection: Arc::new(connection), own, peers }))
    }

    /// Returns the domain id.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.0.id
    }

    /// Opens a connection to xenstore with this domain's permissions. Relative paths are below
    /// `/local/domain/<number>`. Several connections may be open, for example one for each thread.
    ///
    /// # Errors
    /// [`XenstoreError`].
    pub fn xenstore(&self) -> Result<Client, XenstoreError> {
        let asked = self.0.connection.call::<1>(&Request::Xenstore);
        match asked.map_err(|_| XenstoreError::Lost)? {
            (_, Some([stream])) => Ok(Client::from_stream(stream.into())?),
            (reply, None) if reply.status == Status::Denied => Err(XenstoreError::Denied),
            _ => Err(XenstoreError::TooMany),
        }
    }

    #[inline]
    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    #[inline]
    pub(crate) fn own(&self) -> Option<&Own> {
        self.0.own.as_ref()
    }

    /// Returns the memory of another domain.
    #[inline]
    pub(crate) fn peer(&self, domain: DomId) -> Result<Arc<PeerMemory>, GrantStatus> {
        self.0.peers.get(domain, &self.0.connection)
    }
}
