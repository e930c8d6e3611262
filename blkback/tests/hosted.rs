//! The whole path with real threads, files and xenstore: handshake, data, close, re-attach, and a
//! driver domain that dies.
#![cfg(feature = "std")]

use pvio_blkback::host::ImageServer;
use pvio_blkback::{Config, DataPath, Policy, Stats, Vbd};
use pvio_blkfront::session::{DiskError, Session};
use pvio_blkfront::{Op, SLOT_BYTES};
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendDriver, Life};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, read_error, request_removal};
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack, create_device};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::{NamedTempFile, TempDir};

const PATIENCE: Duration = Duration::from_secs(20);

struct Machine {
    config: Config,
    hypervisor: Hypervisor,
    guest: DomId,
    driver: DomId,
    _dir: TempDir,
}

impl Machine {
    fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let driver = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
        let guest = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
        Self { config, hypervisor, guest, driver, _dir: dir }
    }

    fn addr(&self) -> DeviceAddr {
        DeviceAddr::new(BackendKind::Vbd, self.driver, self.guest, 51712)
    }

    fn add_disk(&self, image: &Path, mode: Mode) -> DeviceAddr {
        let mut back = ToolstackBack::new(self.addr(), image.to_str().unwrap());
        back.mode = mode;
        create_device(&mut self.xenstore(), self.addr(), &back).unwrap();
        self.addr()
    }

    fn xenstore(&self) -> Client {
        self.hypervisor.xenstore().unwrap()
    }

    fn join(&self, id: DomId) -> Domain {
        Domain::join(self.hypervisor.state_dir(), id).unwrap()
    }

    fn serve(&self) -> Driver {
        let domain = self.join(self.driver);
        let addr = self.addr();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let vbd = Vbd::with(domain.clone(), ImageServer::new(Arc::new(|| ())), self.config);
        let stats = Arc::clone(&vbd.stats()[0]);
        let thread = std::thread::spawn(move || {
            let mut xs = domain.xenstore().unwrap();
            let mut device = BackendDriver::restarted(addr, vbd);
            while !stopped.load(Ordering::SeqCst) {
                if device.step(&mut xs).unwrap() == Life::Gone {
                    return true;
                }
                xs.wait_event(Some(Duration::from_millis(20))).unwrap();
            }
            false
        });
        Driver { stats, stop, thread }
    }

    fn attach_within(&self, patience: Duration) -> Result<Session<Domain, Client>, DiskError> {
        let guest = self.join(self.guest);
        let xs = guest.xenstore().unwrap();
        Session::attach(guest, xs, self.addr(), patience)
    }

    fn attach(&self) -> Result<Session<Domain, Client>, DiskError> {
        self.attach_within(PATIENCE)
    }
}

struct Driver {
    stats: Arc<Stats>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<bool>,
}

impl Driver {
    /// Ends without a word to anybody; whether the device was gone already.
    fn end(self) -> bool {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// Our frontend agrees to persistent grants, so these are all three data paths.
fn on_every_path(test: fn(Config)) {
    for policy in [Policy::Map, Policy::Copy, Policy::PersistentOrCopy] {
        println!("{policy}");
        test(Config { policy, ..Config::default() });
    }
}

fn image(bytes: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let data: Vec<u8> = (0..bytes).map(|i| (i / 512 + i) as u8).collect();
    file.write_all(&data).unwrap();
    file
}

fn write(session: &mut Session<Domain, Client>, sector: u64, data: &[u8]) {
    for (op, fill) in [(Op::Write { sector, bytes: data.len() }, true), (Op::Flush, false)] {
        let queue = session.queue().unwrap();
        let slot = queue.reserve().unwrap();
        if fill {
            queue.fill(slot, 0, data).unwrap();
        }
        queue.start(slot, op).unwrap();
        queue.publish().unwrap();
        let mut answers = 0;
        while answers == 0 {
            answers += session.answers(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
        }
        session.queue().unwrap().release(slot);
    }
}

#[test]
fn data_is_read_and_written_through_the_whole_path_and_the_device_closes() {
    on_every_path(whole_path);
}

fn whole_path(config: Config) {
    let machine = Machine::new(config);
    let file = image(4 << 20);
    let addr = machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    assert_eq!(session.size(), 4 << 20);

    let mut got = vec![0; 3 << 20];
    session.read_at(512, &mut got).unwrap();
    assert!(got == std::fs::read(file.path()).unwrap()[512..512 + (3 << 20)]);

    write(&mut session, 100, &[0x5a; SLOT_BYTES]);
    let mut there = vec![0; SLOT_BYTES];
    file.as_file().read_exact_at(&mut there, 100 * 512).unwrap();
    assert!(there.iter().all(|b| *b == 0x5a), "a flushed write is in the file");

    assert!(matches!(session.read_at(4 << 20, &mut [0; 512]), Err(DiskError::OutOfRange(..))));
    session.close().unwrap();
    let stats = &driver.stats;
    let counts =
        [&stats.mapped_pages, &stats.reused_pages, &stats.copied_pages].map(|c| c.get() > 0);
    let expected = match config.policy.path(true) {
        DataPath::Map => [true, false, false],
        DataPath::Copy => [false, false, true],
        DataPath::Persistent => [true, true, false],
    };
    assert_eq!(counts, expected, "mapped, reused, copied");
    request_removal(&mut machine.xenstore(), addr).unwrap();
    assert!(driver.thread.join().unwrap(), "closed on both sides, the backend is gone");
}

#[test]
fn a_read_waits_for_requests_that_were_given_up_on() {
    on_every_path(given_up);
}

fn given_up(config: Config) {
    let machine = Machine::new(config);
    let file = image(4 << 20);
    machine.add_disk(file.path(), Mode::ReadOnly);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    // Every slot is in flight, and nobody asks for the answers.
    let queue = session.queue().unwrap();
    while let Some(slot) = queue.reserve() {
        queue.start(slot, Op::Read { sector: 0, bytes: 4096 }).unwrap();
    }
    queue.publish().unwrap();
    let mut got = vec![0; 2 << 20];
    session.read_at(0, &mut got).unwrap();
    assert!(got == std::fs::read(file.path()).unwrap()[..2 << 20]);
    session.close().unwrap();
    driver.end();
}

#[test]
fn a_frontend_attaches_again_after_it_closed() {
    on_every_path(attach_again);
}

fn attach_again(config: Config) {
    let machine = Machine::new(config);
    let file = image(1 << 20);
    machine.add_disk(file.path(), Mode::ReadOnly);
    let driver = machine.serve();
    let guest = machine.join(machine.guest);
    for _ in 0..3 {
        let xs = guest.xenstore().unwrap();
        let mut session = Session::attach(guest.clone(), xs, machine.addr(), PATIENCE).unwrap();
        session.read_at(0, &mut [0; 4096]).unwrap();
        assert!(session.device().served().unwrap().info.read_only);
        session.close().unwrap();
    }
    driver.end();
}

#[test]
fn what_is_unanswered_when_the_driver_domain_dies_is_done_by_the_next() {
    on_every_path(next_driver);
}

fn next_driver(config: Config) {
    let machine = Machine::new(config);
    let file = image(1 << 20);
    let addr = machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    write(&mut session, 0, &[1; 512]);

    // Its process is gone, and with it its home in xenstore; another comes by the same number.
    driver.end();
    let queue = session.queue().unwrap();
    let slot = queue.reserve().unwrap();
    queue.fill(slot, 0, &[2; 512]).unwrap();
    queue.start(slot, Op::Write { sector: 8, bytes: 512 }).unwrap();
    queue.publish().unwrap();
    let config = DomainConfig::new("driver").id(machine.driver);
    while machine.hypervisor.create_domain(config.clone()).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let back = ToolstackBack::new(addr, file.path().to_str().unwrap());
    pvio_xenbus::handshake::vbd::create_backend(&mut machine.xenstore(), addr, &back).unwrap();
    let driver = machine.serve();

    let mut answers = 0;
    while answers == 0 {
        let answered = session.answers(|_, _, status| assert_eq!(status, Status::Okay));
        answers += answered.unwrap_or_else(|error| {
            let why = read_error(&mut machine.xenstore(), &addr.backend_path());
            panic!("{error}; the backend says {why:?}")
        });
    }
    let mut there = [0; 512];
    file.as_file().read_exact_at(&mut there, 4096).unwrap();
    assert_eq!(there, [2; 512]);
    assert_eq!(session.device().sessions(), 2);
    session.close().unwrap();
    driver.end();
}

#[test]
fn a_missing_image_is_told_to_the_operator_in_words() {
    let machine = Machine::new(Config::default());
    let addr = machine.add_disk(Path::new("/nowhere/disk.img"), Mode::ReadWrite);
    let driver = machine.serve();
    let error = machine.attach_within(Duration::from_millis(500)).err().expect("no disk is there");
    assert!(error.to_string().contains("its state is Closed"), "{error}");
    let mut xs = machine.xenstore();
    let why = read_error(&mut xs, &addr.backend_path()).unwrap().expect("a reason");
    assert!(why.contains("/nowhere/disk.img does not exist"), "{why}");
    driver.end();
}
