use crate::config::{DomainConfig, DomainInfo};
use crate::error::{DomainError, StartError};
use crate::events::signal;
use crate::machine::Machine;
use crate::names::Names;
use crate::pages::lock;
use crate::server::Server;
use crate::shared::{HypervisorEvent, Shared};
use crate::statedir::{HYPERVISOR_SOCKET, StateDir, XENSTORE_SOCKET};
use crossbeam_channel::Receiver;
use pvio_grant_table::DomId;
use pvio_xenbus::client::Client;
use rustix::event::{EventfdFlags, eventfd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Hypervisor embedded in this process. It has one thread for itself and one for xenstore; both
/// sleep without requests.
///
/// Dropping it stops it. The effect on the domains is that of a crash of the hypervisor. Domains
/// that have mapped each other's memory can still grant and map pages, and bound event channels
/// still work. Everything else fails.
#[derive(Debug)]
pub struct Hypervisor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    events: Receiver<HypervisorEvent>,
    state_dir: StateDir,
}

impl Hypervisor {
    /// Starts a hypervisor with its sockets in `state_dir`, which is created if it does not exist.
    ///
    /// # Errors
    /// Any [`StartError`]; [`StartError::Running`] if another one runs in that directory. The
    /// sockets of a hypervisor that has ended are replaced.
    pub fn start(state_dir: impl AsRef<Path>) -> Result<Self, StartError> {
        let state_dir = StateDir::take(state_dir.as_ref())?;
        let listener = state_dir.listen(HYPERVISOR_SOCKET)?;
        let failed = |source| StartError::Io { path: state_dir.path().into(), source };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|why| failed(why.into()))?;
        let names = state_dir.socket(XENSTORE_SOCKET)?;
        let names = Names::serve(&names).map_err(failed)?;
        let (sender, events) = crossbeam_channel::unbounded();
        let shared = Arc::new(Shared {
            machine: Mutex::new(Machine::new()),
            names,
            wake,
            stop: AtomicBool::new(false),
            events: sender,
        });
        let server = Server::new(Arc::clone(&shared), listener);
        let thread = std::thread::Builder::new().name("pvio-hypervisor".into());
        let thread = Some(thread.spawn(|| server.run()).map_err(failed)?);
        Ok(Self { shared, thread, events, state_dir })
    }

    /// Returns the directory of its sockets.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        self.state_dir.path()
    }

    /// Returns the events of domains, in order.
    #[must_use]
    pub fn events(&self) -> &Receiver<HypervisorEvent> {
        &self.events
    }

    /// Creates a domain and its xenstore directory, `/local/domain/<number>`. A process may then
    /// [join](crate::Domain::join) as it.
    ///
    /// # Errors
    /// Any [`DomainError`].
    pub fn create_domain(&self, config: DomainConfig) -> Result<DomId, DomainError> {
        self.shared.create(&config)
    }

    /// Destroys a domain and closes the connection of its process. The process keeps access to the
    /// pages of other domains that it has mapped, although those domains may reuse them. So end the
    /// process first if it may still be active; that also destroys the domain.
    ///
    /// # Errors
    /// [`DomainError::NoDomain`].
    pub fn destroy_domain(&self, id: DomId) -> Result<(), DomainError> {
        self.shared.destroy(id)?;
        signal(&self.shared.wake);
        Ok(())
    }

    /// Returns a connection to xenstore with domain 0's permissions, for this process. Tools
    /// connect to the same store with `xenstore.sock` in the state directory.
    ///
    /// # Errors
    /// A system error, if no socket pair can be created.
    pub fn xenstore(&self) -> std::io::Result<Client> {
        Client::from_stream(self.shared.names.connect(DomId::DOM0)?)
    }

    /// Returns all domains, ordered by id.
    #[must_use]
    pub fn domains(&self) -> Vec<DomainInfo> {
        lock(&self.shared.machine).list()
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        signal(&self.shared.wake);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Domain;
    use pvio_event_channel::{
        DevicePlatform, DeviceScope, EventChannel, EventChannels, EventError,
    };
    use rustix::net::{Shutdown, shutdown};
    use std::time::Duration;

    #[test]
    fn ended_connection_is_processed_before_request_of_successor() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let [guest, driver] = ["guest", "driver"].map(|name| {
            let config = DomainConfig::new(name).memory_pages(1);
            Domain::join(dir.path(), hypervisor.create_domain(config).unwrap()).unwrap()
        });
        let frontend = guest.id();
        let scope = DeviceScope { frontend, queues: 1, channels: 1, ports: None };
        let device = || {
            let descriptors = driver.device_descriptors(&scope).unwrap();
            let socket = descriptors.fds[0].try_clone().unwrap();
            (Domain::from_descriptors(descriptors).unwrap(), socket)
        };
        // The connection of the successor is older, so that it is served first.
        let (successor, _socket) = device();
        let (dying, socket) = device();
        let end = guest.alloc_unbound(driver.id()).unwrap();
        let bound = dying.bind_interdomain(frontend, end.port()).unwrap();
        std::thread::scope(|scope| {
            let machine = lock(&hypervisor.shared.machine);
            // The hypervisor's thread receives a request and waits for the lock, until both other
            // connections are ready.
            scope.spawn(|| guest.alloc_unbound(driver.id()).unwrap());
            std::thread::sleep(Duration::from_millis(100));
            shutdown(&socket, Shutdown::Both).unwrap();
            let port = end.port();
            let taken_over = scope.spawn(move || successor.bind_interdomain(frontend, port));
            std::thread::sleep(Duration::from_millis(100));
            drop(machine);
            let taken_over = taken_over.join().unwrap();
            assert_eq!(taken_over.err(), None::<EventError>);
        });
        drop(bound);
    }
}
