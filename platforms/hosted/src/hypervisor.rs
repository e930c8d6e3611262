use crate::config::{DomainConfig, DomainInfo};
use crate::error::{DomainError, StartError};
use crate::events::signal;
use crate::machine::{ConnId, Machine};
use crate::names::Names;
use crate::pages::lock;
use crate::server::Server;
use crate::statedir::{HYPERVISOR_SOCKET, StateDir, XENSTORE_SOCKET};
use crossbeam_channel::{Receiver, Sender};
use pvio_grant_table::DomId;
use pvio_xenbus::client::Client;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// The hypervisor, embedded in this process: one thread for it and one for xenstore, both asleep
/// unless a domain wants something.
/// Dropping it stops it. The domains are then on their own, as if it had crashed: between those that
/// met already, pages can still be granted and mapped and bound event channels still wake; nothing
/// else can be had.
#[derive(Debug)]
pub struct Hypervisor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    events: Receiver<HypervisorEvent>,
    state_dir: StateDir,
}

/// What became of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HypervisorEvent {
    /// A process is this domain now.
    Joined {
        /// The domain.
        domid: DomId,
    },
    /// The domain was destroyed: its process ended, broke the protocol, or
    /// [`destroy_domain`](Hypervisor::destroy_domain) was called.
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
    events: Sender<HypervisorEvent>,
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
    fn create(&self, config: &DomainConfig) -> Result<DomId, DomainError> {
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
    fn destroy(&self, id: DomId) -> Result<(), DomainError> {
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

impl Hypervisor {
    /// Starts a hypervisor whose sockets lie in `state_dir`, which is made if it is not there.
    ///
    /// # Errors
    /// Any [`StartError`]; [`StartError::Running`] when another is alive in that directory. The
    /// sockets of a dead one are replaced.
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

    /// The directory its sockets lie in.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        self.state_dir.path()
    }

    /// What becomes of domains, in order.
    #[must_use]
    pub fn events(&self) -> &Receiver<HypervisorEvent> {
        &self.events
    }

    /// Makes a domain and its home in xenstore, `/local/domain/<number>`; a process may then
    /// [join](crate::Domain::join) as it.
    ///
    /// # Errors
    /// Any [`DomainError`].
    pub fn create_domain(&self, config: DomainConfig) -> Result<DomId, DomainError> {
        self.shared.create(&config)
    }

    /// Destroys a domain and hangs up on its process, which is not otherwise touched: what it has
    /// mapped of other domains it can still reach, although they may reuse it. End the process
    /// first if it may still be at work; the domain then goes by itself.
    ///
    /// # Errors
    /// [`DomainError::NoDomain`].
    pub fn destroy_domain(&self, id: DomId) -> Result<(), DomainError> {
        self.shared.destroy(id)?;
        signal(&self.shared.wake);
        Ok(())
    }

    /// A connection to xenstore with domain 0's rights, for this process itself. Tools reach the
    /// same store through `xenstore.sock` in the state directory.
    ///
    /// # Errors
    /// The system's, if there is no pair of sockets to be had.
    pub fn xenstore(&self) -> std::io::Result<Client> {
        Client::from_stream(self.shared.names.connect(DomId::DOM0)?)
    }

    /// Every domain, by number.
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
