//! A hosted machine with a driver domain and a guest.

use pvio_blkback::{Config, Policy, Stats, Vbd};
use pvio_blkfront::blocking::{BlockingDisk, DiskError};
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_runtime::LogLimit;
use pvio_storage::host::ImageServer;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendDriver, Life};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, read_error};
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack, create_backend, create_device};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::{NamedTempFile, TempDir};

pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Machine {
    pub config: Config,
    pub hypervisor: Hypervisor,
    pub guest: DomId,
    pub driver: DomId,
    _dir: TempDir,
}

impl Machine {
    pub fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let driver = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
        let guest = hypervisor.create_domain(DomainConfig::new("guest").grant_frames(64)).unwrap();
        Self { config, hypervisor, guest, driver, _dir: dir }
    }

    pub fn addr(&self) -> DeviceAddr {
        DeviceAddr::new(BackendKind::Vbd, self.driver, self.guest, 51712)
    }

    pub fn add_disk(&self, image: &Path, mode: Mode) -> DeviceAddr {
        let mut back = ToolstackBack::new(self.addr(), image.to_str().unwrap());
        back.mode = mode;
        self.add(&back)
    }

    pub fn add(&self, back: &ToolstackBack) -> DeviceAddr {
        create_device(&mut self.xenstore(), self.addr(), back).unwrap();
        self.addr()
    }

    pub fn xenstore(&self) -> Client {
        self.hypervisor.xenstore().unwrap()
    }

    /// Recreates the driver domain, whose process has ended, and its disk.
    pub fn rebuild_driver(&self, back: &ToolstackBack) {
        let config = DomainConfig::new("driver").id(self.driver);
        while self.hypervisor.create_domain(config.clone()).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
        create_backend(&mut self.xenstore(), self.addr(), back).unwrap();
    }

    pub fn join(&self, id: DomId) -> Domain {
        Domain::join(self.hypervisor.state_dir(), id).unwrap()
    }

    pub fn serve(&self) -> Driver {
        let domain = self.join(self.driver);
        let addr = self.addr();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let faults = Arc::new(Mutex::default());
        let refused: Arc<Mutex<Vec<_>>> = Arc::clone(&faults);
        let vbd = Vbd::with(ImageServer::new(domain.clone(), Arc::new(|| ())), self.config);
        let stats = Arc::clone(&vbd.stats()[0]);
        let events = vbd.events();
        let thread = std::thread::spawn(move || {
            let mut xs = domain.xenstore().unwrap();
            let mut device = BackendDriver::restarted(addr, vbd);
            let mut told = None;
            while !stopped.load(Ordering::SeqCst) {
                if device.step(&mut xs).unwrap() == Life::Gone {
                    return true;
                }
                // More often than a daemon would.
                if let Err(fault) = device.refresh(&mut xs) {
                    refused.lock().unwrap().push(fault.code.into());
                }
                let why = read_error(&mut xs, &addr.backend_path()).unwrap();
                if why != told {
                    let code = why.as_ref().and_then(|why| why.split([' ', ':']).nth(1));
                    refused.lock().unwrap().extend(code.map(String::from));
                    told = why;
                }
                xs.wait_event(Some(Duration::from_millis(20))).unwrap();
            }
            false
        });
        Driver { stats, events, faults, stop, thread }
    }

    pub fn attach_within(
        &self,
        patience: Duration,
    ) -> Result<BlockingDisk<Domain, Client>, DiskError> {
        let guest = self.join(self.guest);
        let xs = guest.xenstore().unwrap();
        BlockingDisk::attach(guest, xs, self.addr(), patience)
    }

    pub fn attach(&self) -> Result<BlockingDisk<Domain, Client>, DiskError> {
        self.attach_within(PATIENCE)
    }
}

pub struct Driver {
    /// Counters of the first queue.
    pub stats: Arc<Stats>,
    /// Rate-limited log events.
    pub events: [(&'static str, Arc<LogLimit>); 3],
    /// Reason codes of rejected changes by the toolstack.
    pub faults: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    pub thread: JoinHandle<bool>,
}

impl Driver {
    /// Ends without notifying other domains. Returns whether the device was already gone.
    pub fn end(self) -> bool {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// pvio's frontend negotiates persistent grants, so these policies give all three data paths.
pub fn on_every_path(test: fn(Config)) {
    for policy in [Policy::Map, Policy::Copy, Policy::PersistentOrCopy] {
        println!("{policy}");
        test(Config { policy, ..Config::default() });
    }
}

pub fn image(bytes: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let data: Vec<u8> = (0..bytes).map(|i| (i / 512 + i) as u8).collect();
    file.write_all(&data).unwrap();
    file
}
