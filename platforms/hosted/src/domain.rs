//! A domain, from the view of the process that has joined as it.

use crate::connection::Connection;
use crate::error::{JoinError, XenstoreError};
use crate::layout::{EVENTS_LEN, Frames, map_memory};
use crate::mem::Mapped;
use crate::pages::{Grants, OwnMemory};
use crate::peers::{PeerMemory, Peers};
use crate::protocol::{Request, Status};
use crate::statedir;
use pvio_grant_table::{DomId, GrantStatus};
use pvio_xenbus::client::Client;
use rustix::io::Errno;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Domain of this process: its memory, grants and event channels. Cheap to clone. The domain exists
/// until the last clone, mapping and event channel is dropped.
#[derive(Clone, Debug)]
pub struct Domain(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) id: DomId,
    pub(crate) connection: Arc<Connection>,
    pub(crate) own: Arc<OwnMemory>,
    pub(crate) grants: Mutex<Grants>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) events: Arc<Mapped>,
}

impl Domain {
    /// Joins as domain `id` of the hypervisor that runs in `state_dir`. When this process ends, or
    /// drops the domain and everything derived from it, the domain is destroyed.
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
        let asked = connection.call::<2>(Request::Join(id));
        let (reply, fds) = asked.map_err(|_| JoinError::Lost)?;
        let [memory, events] = match (reply.status, fds) {
            (Status::Done, Some(fds)) => fds,
            (Status::NoDomain, _) => return Err(JoinError::NoDomain(id)),
            (Status::Taken, _) => return Err(JoinError::Taken(id)),
            _ => return Err(JoinError::Lost),
        };
        let [total, grant] = reply.results;
        let frames = Frames::from_wire(total, grant).ok_or(JoinError::Lost)?;
        let own = Arc::new(OwnMemory::new(map_memory(memory, frames)?));
        Ok(Self(Arc::new(Inner {
            id,
            connection: Arc::new(connection),
            grants: Mutex::new(Grants::new(frames.entries())),
            peers: Arc::new(Peers::new(id, Arc::clone(&own))),
            own,
            events: Arc::new(Mapped::front(events, EVENTS_LEN)?),
        })))
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
        let asked = self.0.connection.call::<1>(Request::Xenstore);
        match asked.map_err(|_| XenstoreError::Lost)? {
            (_, Some([stream])) => Ok(Client::from_stream(stream.into())?),
            _ => Err(XenstoreError::TooMany),
        }
    }

    #[inline]
    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    /// Returns the memory of another domain.
    #[inline]
    pub(crate) fn peer(&self, domain: DomId) -> Result<Arc<PeerMemory>, GrantStatus> {
        self.0.peers.get(domain, &self.0.connection)
    }
}
