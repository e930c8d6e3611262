//! The hypervisor's xenstore: one directory for each domain, which exists as long as the domain.

use crate::pages::lock;
use pvio_grant_table::DomId;
use pvio_xenbus::client::Client;
use pvio_xenbus::wire::{Access, Perm};
use pvio_xenbus::{Xenstore, XsError, transaction};
use pvio_xenstored::server::{Server, ServerHandle};
use pvio_xenstored::{Quota, Store};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

/// Limit of connections of one domain: each of its disks has one.
const MAX_CONNECTIONS: usize = 4096;
/// Quota of a domain: larger than on Xen, for as many disks as its grant table has entries for.
const QUOTA: Quota = Quota { nodes: 65_536, watches: 16_384, memory: 64 << 20, ..Quota::XEN };

/// The store, served by a separate thread.
#[derive(Debug)]
pub(crate) struct Names {
    server: ServerHandle,
    control: Mutex<Client>,
}

impl Names {
    /// Creates and serves a store. Tools connect as domain 0 by the socket at `path`.
    pub(crate) fn serve(path: &Path) -> io::Result<Self> {
        let server = Server::new(Store::new(QUOTA)).domain_connections(MAX_CONNECTIONS);
        let server = server.listen(path)?.spawn()?;
        let control = Mutex::new(server.connect_local(DomId::DOM0)?);
        Ok(Self { server, control })
    }

    /// Creates a domain's directory, as a toolstack of Xen does: the directory and `device` belong
    /// to domain 0 and are readable for the domain; `data` and `error` belong to the domain.
    pub(crate) fn add(&self, id: DomId, name: &str) -> Result<(), XsError> {
        let dom0 = Perm::new(DomId::DOM0, Access::None);
        let readable = [dom0, Perm::new(id, Access::Read)];
        let own = [Perm::new(id, Access::None)];
        let home = home(id);
        transaction(&mut *lock(&self.control), |xs| -> Result<(), XsError> {
            xs.mkdir(&home)?;
            xs.set_perms(&home, &readable)?;
            // Nodes below inherit its permissions.
            xs.write(&format!("{home}/name"), name.as_bytes())?;
            xs.write(&format!("{home}/domid"), id.to_string().as_bytes())?;
            xs.mkdir(&format!("{home}/device"))?;
            for writable in ["data", "error"] {
                let path = format!("{home}/{writable}");
                xs.mkdir(&path)?;
                xs.set_perms(&path, &own)?;
            }
            Ok(())
        })?;
        self.server.introduce(id).map_err(|_| XsError::Closed).map(drop)
    }

    /// Removes a domain's directory and all that it owns, closes its connections, and fires the
    /// `@releaseDomain` watches.
    pub(crate) fn remove(&self, id: DomId) -> Result<(), XsError> {
        lock(&self.control).rm(&home(id))?;
        self.server.release(id).map_err(|_| XsError::Closed).map(drop)
    }

    /// Returns a new connection with a domain's permissions.
    pub(crate) fn connect(&self, id: DomId) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.server.add_domain_connection(id, theirs)?;
        Ok(ours)
    }
}

fn home(id: DomId) -> String {
    format!("/local/domain/{id}")
}
