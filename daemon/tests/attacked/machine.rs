//! A hosted machine whose supervisor is a thread of this program.

use crate::process::{ARGUMENT, COMMAND, GIVEN, HELPER_DEATHS, OUTCOME};
use pvio_blkfront::Op;
use pvio_blkfront::blocking::BlockingDisk;
use pvio_daemon::driver::{self, Isolation, Options, XenstoreLink};
use pvio_daemon::process::child::Program;
use pvio_daemon::process::confine::Confinement;
use pvio_daemon::process::found::FoundProcesses;
use pvio_daemon::process::hub::Hub;
use pvio_daemon::process::registry::Registry;
use pvio_daemon::process::supervised::Environment;
use pvio_daemon::served::Served;
use pvio_daemon::stop::{Stop, Wakeup};
use pvio_daemon::upgrade::progress::Upgrade;
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, read_error};
use pvio_xenbus::handshake::vbd::{ToolstackBack, create_device};
use rustix::process::{Pid, Signal, getpid, kill_process};
use serde_json::Value;
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};
use tempfile::{NamedTempFile, TempDir};

const PATIENCE: Duration = Duration::from_secs(60);
const DISK: u32 = 51_712;
const BYTES: u64 = 1 << 20;

/// What came of an attempt.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// The call returned: 0 or an error number.
    Outcome(i32),
    /// The process ended, as the supervisor logged it.
    Ended(String),
}

/// The supervisor's log, which is also written to standard error.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<String>>);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().push_str(&String::from_utf8_lossy(line));
        io::stderr().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
        log
    })
}

/// A supervisor, and a guest with disks of 1 MiB.
pub struct Machine {
    addrs: Vec<DeviceAddr>,
    images: Vec<NamedTempFile>,
    hypervisor: Hypervisor,
    dir: TempDir,
    served: Served,
    connection: Connection,
    supervisor: JoinHandle<()>,
    guest: Domain,
}

/// The supervisor's connection to xenstore.
#[derive(Clone)]
struct Connection(Arc<Mutex<(Option<UnixStream>, bool)>>, PathBuf);

impl Connection {
    fn connect(&self) -> io::Result<Client> {
        let Self(state, path) = self;
        let mut state = state.lock().unwrap();
        if state.1 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let stream = UnixStream::connect(path)?;
        state.0 = Some(stream.try_clone()?);
        Client::from_stream(stream)
    }

    /// Ends the connection, and refuses others for some time.
    fn lose(&self, time: Duration) -> JoinHandle<()> {
        let state = Arc::clone(&self.0);
        // The supervisor may not have connected again since the last time.
        let stream = loop {
            let mut now = state.lock().unwrap();
            if let Some(stream) = now.0.take() {
                now.1 = true;
                break stream;
            }
            drop(now);
            sleep(Duration::from_millis(5));
        };
        stream.shutdown(Shutdown::Both).unwrap();
        spawn(move || {
            sleep(time);
            state.lock().unwrap().1 = false;
        })
    }
}

impl Machine {
    pub fn start(disks: u32) -> Self {
        Self::start_with(disks, 0)
    }

    /// Starts a machine; the first image helpers die.
    pub fn start_with(disks: u32, helper_deaths: u32) -> Self {
        Self::start_as(disks, helper_deaths, |image, _| image.as_os_str().as_bytes().to_owned())
    }

    /// Starts a machine; `define` returns the definition of a disk from its image and a directory.
    pub fn start_as(
        disks: u32,
        helper_deaths: u32,
        define: impl Fn(&Path, &Path) -> Vec<u8>,
    ) -> Self {
        log();
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path().join("state")).unwrap();
        let driver = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
        let guest = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
        let join = |id: DomId| Domain::join(hypervisor.state_dir(), id).unwrap();
        fs::write(dir.path().join("supervisor"), getpid().as_raw_nonzero().to_string()).unwrap();
        fs::write(dir.path().join(HELPER_DEATHS), helper_deaths.to_string()).unwrap();
        let mut dom0 = hypervisor.xenstore().unwrap();
        let addr = |n| DeviceAddr::new(BackendKind::Vbd, driver, guest, DISK + 16 * n);
        let addrs: Vec<DeviceAddr> = (0..disks).map(addr).collect();
        let mut images = Vec::new();
        for addr in &addrs {
            let device = device(*addr);
            fs::write(dir.path().join(format!("{device}.{COMMAND}")), "").unwrap();
            fs::write(dir.path().join(format!("{device}.{OUTCOME}")), "").unwrap();
            let image = NamedTempFile::new().unwrap();
            image.as_file().set_len(BYTES).unwrap();
            let back = ToolstackBack::new(*addr, &define(image.path(), dir.path()));
            create_device(&mut dom0, *addr, &back).unwrap();
            images.push(image);
        }
        let served = Served::default();
        let socket = hypervisor.state_dir().join("xenstore.sock");
        let connection = Connection(Arc::default(), socket);
        let supervisor = supervise(join(driver), &dir, served.clone(), connection.clone());
        let guest = join(guest);
        Self { addrs, images, hypervisor, dir, served, connection, supervisor, guest }
    }

    pub fn helper_deaths_left(&self) -> u32 {
        fs::read_to_string(self.dir.path().join(HELPER_DEATHS)).unwrap().parse().unwrap()
    }

    pub fn attach(&self, disk: usize) -> Disk {
        let xs = self.guest.xenstore().unwrap();
        let addr = self.addrs[disk];
        let session = BlockingDisk::attach(self.guest.clone(), xs, addr, PATIENCE).unwrap();
        assert_eq!(session.size(), self.images[disk].as_file().metadata().unwrap().len());
        Disk { session, turn: 0 }
    }

    /// Lets hostile code in the process of a disk execute an attempt. Does `work` while it waits.
    pub fn attempt(&self, disk: usize, name: &str, mut work: impl FnMut()) -> Seen {
        let device = device(self.addrs[disk]);
        let before = self.process(disk);
        let outcome = self.path(&device, OUTCOME);
        fs::write(&outcome, "").unwrap();
        let logged = log().0.lock().unwrap().len();
        fs::write(self.path(&device, COMMAND), format!("{}{name}\n", char::from(GIVEN))).unwrap();
        let begin = Instant::now();
        loop {
            let text = fs::read_to_string(&outcome).unwrap();
            if let Some(line) = text.strip_suffix('\n') {
                assert_eq!(self.process(disk), before, "{name}: the process lives");
                return Seen::Outcome(line.parse().unwrap());
            }
            if self.pid(disk).is_none_or(|pid| pid != before) {
                let log = log().0.lock().unwrap()[logged..].to_owned();
                let how = log.lines().find_map(|line| line.split_once("how=\"")?.1.split_once('"'));
                return Seen::Ended(how.expect("the end is logged").0.to_owned());
            }
            assert!(begin.elapsed() < PATIENCE, "{name}: nothing happened");
            work();
            sleep(Duration::from_millis(2));
        }
    }

    fn path(&self, device: &str, suffix: &str) -> PathBuf {
        self.dir.path().join(format!("{device}.{suffix}"))
    }

    /// Kills the process of a disk, and waits for its successor.
    pub fn kill_process(&self, disk: usize) {
        let before = self.kill(disk);
        let begin = Instant::now();
        while self.process(disk) == before {
            assert!(begin.elapsed() < PATIENCE, "the process was not replaced");
            sleep(Duration::from_millis(2));
        }
    }

    /// Kills the process of a disk, and returns its number.
    pub fn kill(&self, disk: usize) -> u32 {
        let pid = self.process(disk);
        kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
        pid
    }

    fn entry(&self, disk: usize) -> Option<Value> {
        let path = self.addrs[disk].backend_path();
        self.served.confinement().into_iter().find(|entry| entry["path"] == path.as_str())
    }

    fn pid(&self, disk: usize) -> Option<u32> {
        self.entry(disk)?["pid"].as_u64().and_then(|pid| pid.try_into().ok())
    }

    /// Returns the process of a disk; waits for it.
    fn process(&self, disk: usize) -> u32 {
        let begin = Instant::now();
        loop {
            if let Some(pid) = self.pid(disk) {
                return pid;
            }
            assert!(begin.elapsed() < PATIENCE, "there is no process");
            sleep(Duration::from_millis(2));
        }
    }

    pub fn replaced(&self, disk: usize) -> u64 {
        self.entry(disk).unwrap()["replaced"].as_u64().unwrap()
    }

    /// Waits until a device has an error, and returns it.
    pub fn error_of(&self, disk: usize) -> String {
        let mut dom0 = self.hypervisor.xenstore().unwrap();
        let begin = Instant::now();
        loop {
            if let Some(why) = read_error(&mut dom0, &self.addrs[disk].backend_path()).unwrap() {
                return why;
            }
            assert!(begin.elapsed() < PATIENCE, "the device has no error");
            sleep(Duration::from_millis(20));
        }
    }

    /// Ends the supervisor's connection to xenstore for some time.
    pub fn lose_xenstore(&self, time: Duration) -> JoinHandle<()> {
        self.connection.lose(time)
    }

    /// Stops the supervisor, which ends its processes.
    pub fn end(self) {
        kill_process(getpid(), Signal::TERM).unwrap();
        self.supervisor.join().unwrap();
    }
}

fn device(addr: DeviceAddr) -> String {
    pvio_blkback::session::record_name(addr)
}

fn supervise(
    domain: Domain,
    dir: &TempDir,
    served: Served,
    connection: Connection,
) -> JoinHandle<()> {
    let records = driver::records(&dir.path().join("inflight")).unwrap();
    let args = [ARGUMENT.into(), dir.path().into()];
    let environment = Environment {
        hub: Hub::new().unwrap(),
        registry: Registry::open(&dir.path().join("devices")).unwrap(),
        program: Program { path: "/proc/self/exe".into(), args: args.into() },
        platform: "hosted",
        records: Some(records.clone()),
        confinement: Confinement {
            user: Some(pvio_confinement::User { uid: 65_534, gid: 65_534 }),
            ..Confinement::default()
        },
        found: FoundProcesses::default(),
        upgrade: Upgrade::default(),
    };
    let isolation = Isolation::Process(environment);
    let options = Options { records: Some(records), isolation, ..Options::default() };
    let wakeup = Wakeup::new().unwrap();
    let stop = Stop::on_signal(wakeup.clone()).unwrap();
    spawn(move || {
        let first = connection.connect().unwrap();
        let mut xs = XenstoreLink::reconnecting(first, || connection.connect());
        let me = (&domain, domain.id());
        driver::run(me, &mut xs, &options, &served, (&stop, &wakeup), || ()).unwrap();
    })
}

/// A disk of the guest.
pub struct Disk {
    session: BlockingDisk<Domain, Client>,
    turn: u64,
}

impl Disk {
    /// Writes, and reads what was written.
    pub fn verify(&mut self) {
        self.turn += 1;
        let pattern = self.turn.to_le_bytes().repeat(512);
        let offset = self.turn * 4096 % BYTES;
        let queue = self.session.queue().unwrap();
        let slot = queue.reserve().unwrap();
        let _ = queue.fill(slot, 0, &pattern);
        let op = Op::Write { sector: offset / 512, bytes: pattern.len() };
        assert!(queue.start(slot, op).is_ok() && queue.publish().is_ok());
        let mut is_done = false;
        while !is_done {
            let answered = self.session.answers(|answered, op, status| {
                assert_eq!(status, Status::Okay, "{op:?}");
                is_done |= answered == slot;
            });
            answered.unwrap();
        }
        self.session.queue().unwrap().release(slot);
        let mut read = vec![0; pattern.len()];
        self.session.read_at(offset, &mut read).unwrap();
        assert_eq!(read, pattern);
    }

    pub fn close(self) {
        self.session.close().unwrap();
    }
}
