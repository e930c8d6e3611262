use crate::config::{DomainConfig, DomainInfo};
use crate::error::{DomainError, StartError};
use crate::events::signal;
use crate::machine::Machine;
use crate::pages::lock;
use crate::server::Server;
use crate::statedir::{HYPERVISOR_SOCKET, StateDir};
use crossbeam_channel::{Receiver, Sender};
use pvio_grant_table::DomId;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// The hypervisor, embedded in this process: one thread, sleeping unless a domain wants something.
/// Dropping it stops it. The domains are then on their own: what is mapped stays mapped and event
/// channels that are bound still wake, but nothing new can be had.
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

    /// What is to be done once a domain is destroyed.
    pub(crate) fn died(&self, domid: DomId) {
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
        let (sender, events) = crossbeam_channel::unbounded();
        let shared = Arc::new(Shared {
            machine: Mutex::new(Machine::new()),
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

    /// Makes a domain; a process may then [join](crate::Domain::join) as it.
    ///
    /// # Errors
    /// Any [`DomainError`].
    pub fn create_domain(&self, config: DomainConfig) -> Result<DomId, DomainError> {
        lock(&self.shared.machine).create(&config)
    }

    /// Destroys a domain and hangs up on its process, which is not otherwise touched: what it has
    /// mapped of other domains it can still reach, although they may reuse it. End the process
    /// first if it may still be at work; the domain then goes by itself.
    ///
    /// # Errors
    /// [`DomainError::NoDomain`].
    pub fn destroy_domain(&self, id: DomId) -> Result<(), DomainError> {
        lock(&self.shared.machine).destroy(id)?;
        signal(&self.shared.wake);
        self.shared.died(id);
        Ok(())
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
