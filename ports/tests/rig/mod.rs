//! A driver domain that serves a vif through a tap, and a guest with a TCP/IP stack. Each is a
//! domain of a hosted hypervisor, in threads of this process.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod frames;
pub mod kernel_guest;
pub mod moved;
pub mod namespace;
pub mod stack;

use pvio_event_channel::BackendPlatform;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_netback::vif::VifServer;
use pvio_netback::{Stats, Vif};
use pvio_netfront::Nic;
use pvio_ports::host::{NicConfig, NicServer, NicSettings};
use pvio_ports::settings::RuntimeSettings;
use pvio_xenbus::XenbusState;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendDriver, FrontendClass, FrontendDriver, Life};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, read_error, request_removal};
use pvio_xenbus::handshake::vif::{Mac, ToolstackBack, create_device};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// MAC address of the guest.
pub const GUEST_MAC: Mac = Mac([0, 0x16, 0x3e, 1, 2, 3]);
/// Timeout for any operation.
pub const PATIENCE: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_millis(20);

pub struct Rig {
    pub addr: DeviceAddr,
    pub tools: Client,
    state_dir: PathBuf,
    driver: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    stats: Receiver<Vec<Arc<Stats>>>,
    pub settings: Arc<RuntimeSettings>,
    _hypervisor: Hypervisor,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// Creates a vif with `edit` and `config`, and a driver domain that serves it.
    pub fn new(config: NicConfig, edit: impl FnOnce(&mut ToolstackBack)) -> Self {
        Self::within(config, Arc::default(), edit)
    }

    /// As `new`, in a driver domain with the given shared settings.
    pub fn within(
        config: NicConfig,
        shared: Arc<NicSettings>,
        edit: impl FnOnce(&mut ToolstackBack),
    ) -> Self {
        Self::on(|domain| domain, config, shared, edit)
    }

    /// As `within`, with another platform for the driver domain.
    pub fn on<P>(
        platform: impl FnOnce(Domain) -> P + Send + 'static,
        config: NicConfig,
        shared: Arc<NicSettings>,
        edit: impl FnOnce(&mut ToolstackBack),
    ) -> Self
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
    {
        let make = move |domain| {
            let server = NicServer::new(platform(domain), config, Arc::new(|| ()));
            let server = server.within(shared);
            let settings = Arc::clone(server.settings());
            (server, settings)
        };
        Self::serving(make, edit)
    }

    /// As `new`, with another server and its settings.
    pub fn serving<V: VifServer>(
        make: impl FnOnce(Domain) -> (V, Arc<RuntimeSettings>) + Send + 'static,
        edit: impl FnOnce(&mut ToolstackBack),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let back = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
        let front = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
        let mut tools = hypervisor.xenstore().unwrap();
        let addr = DeviceAddr::new(BackendKind::Vif, back, front, 0);
        let mut words = ToolstackBack::new(addr, GUEST_MAC);
        edit(&mut words);
        create_device(&mut tools, addr, &words).unwrap();

        let stop = Arc::new(AtomicBool::new(false));
        let (tell, stats) = channel();
        let (settings_sender, settings) = channel();
        let state_dir = dir.path().to_owned();
        let (stopped, path) = (Arc::clone(&stop), state_dir.clone());
        let driver = std::thread::spawn(move || {
            let domain = Domain::join(path, back).unwrap();
            let mut xs = domain.xenstore().unwrap();
            let (server, settings) = make(domain);
            settings_sender.send(settings).unwrap();
            let mut driver = BackendDriver::new(addr, Vif::new(server));
            tell.send(driver.class().stats().to_vec()).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                if driver.step(&mut xs).unwrap() == Life::Gone {
                    return;
                }
                xs.wait_event(Some(STEP)).unwrap();
            }
            while driver.shut_down(&mut xs).unwrap().is_pending() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self {
            addr,
            tools,
            state_dir,
            driver: Some(driver),
            stop,
            stats,
            settings: settings.recv().unwrap(),
            _hypervisor: hypervisor,
            _dir: dir,
        }
    }

    /// Returns the counters of the backend's first queue. May be called once.
    pub fn stats(&self) -> Arc<Stats> {
        self.all_stats().swap_remove(0)
    }

    /// Returns the counters of every queue that the backend offers. May be called once.
    pub fn all_stats(&self) -> Vec<Arc<Stats>> {
        self.stats.recv().unwrap()
    }

    /// Returns the guest's domain. It is destroyed when the last clone is dropped.
    pub fn domain(&self) -> Domain {
        Domain::join(&self.state_dir, self.addr.front).unwrap()
    }

    /// Returns a guest that has attached the NIC.
    pub fn guest(&self) -> Guest<Nic<Domain>> {
        let domain = self.domain();
        Guest::attach(&domain, self.addr, Nic::new(domain.clone()))
    }

    /// Waits for the error that the backend reports to the operator.
    pub fn error(&mut self) -> String {
        let path = self.addr.backend_path();
        wait_for(|| read_error(&mut self.tools, &path).unwrap())
    }

    /// Removes the device, and waits until its driver has released it.
    pub fn remove(mut self) {
        request_removal(&mut self.tools, self.addr).unwrap();
        self.driver.take().unwrap().join().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(driver) = self.driver.take() {
            let ended = driver.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the driver domain panicked");
        }
    }
}

/// Frontend with its connection to xenstore.
pub struct Guest<C> {
    pub driver: FrontendDriver<C>,
    pub xs: Client,
    pub domain: Domain,
}

impl<C: FrontendClass> Guest<C> {
    /// Attaches a device and waits until it is connected.
    pub fn attach(domain: &Domain, addr: DeviceAddr, class: C) -> Self {
        let mut guest = Self::start(domain, addr, class);
        guest.until(XenbusState::Connected);
        guest
    }

    /// Creates a device without stepping it.
    pub fn start(domain: &Domain, addr: DeviceAddr, class: C) -> Self {
        let xs = domain.xenstore().unwrap();
        let driver = FrontendDriver::new(addr, class);
        Self { driver, xs, domain: domain.clone() }
    }

    /// Steps the device until it has this state.
    pub fn until(&mut self, state: XenbusState) {
        wait_for(|| {
            self.driver.step(&mut self.xs).unwrap();
            // A NIC's frontend is in state Connected from its request on.
            let connected = state != XenbusState::Connected || self.driver.is_connected();
            if self.driver.state() == state && connected {
                return Some(());
            }
            self.xs.wait_event(Some(STEP)).unwrap();
            None
        });
    }

    /// Closes the device in the regular way.
    pub fn close(&mut self) {
        self.driver.close(&mut self.xs).unwrap();
        self.until(XenbusState::Closed);
    }
}

/// Calls `ask` repeatedly until it returns a value.
///
/// # Panics
/// If there is none within the timeout.
pub fn wait_for<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begin.elapsed() < PATIENCE, "timeout");
        std::thread::sleep(Duration::from_millis(1));
    }
}
