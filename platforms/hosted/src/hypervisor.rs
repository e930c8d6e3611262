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
