//! A machine with one disk and its guest, through frontend, ring and backend, with real threads.
//! Each test program uses a part of this.
#![allow(dead_code)]

use pvio_blkback::engine::{BlockEngine, EngineError, Io};
use pvio_blkback::{Vbd, VbdServer};
use pvio_blkfront::blocking::BlockingDisk;
use pvio_blkfront::{Op, SLOT_BYTES};
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::IoSeg;
use pvio_ring::proto::blkif::Status;
use pvio_ring::shm::HeapMemory;
use pvio_storage::engine::wait::{DiskEngine, WaitEngine};
use pvio_storage::host::ImageServer;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendDriver, Life};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, read_error};
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack, create_device};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// A hypervisor and its two domains.
pub struct Machine {
    hypervisor: Hypervisor,
    guest: DomId,
    driver: DomId,
    _dir: TempDir,
}

impl Machine {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let driver = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
        let guest = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
        Self { hypervisor, guest, driver, _dir: dir }
    }

    fn addr(&self) -> DeviceAddr {
        DeviceAddr::new(BackendKind::Vbd, self.driver, self.guest, 51712)
    }

    /// Attaches the disk that a toolstack names by `params`, `FORMAT:REST`.
    pub fn disk(self, params: &(impl AsRef<[u8]> + ?Sized), mode: Mode) -> Guest {
        self.disk_of(params, mode, |domain| ImageServer::new(domain, Arc::new(|| ())))
    }

    /// Attaches a disk that a server in the driver domain opens and serves.
    pub fn disk_of<S: VbdServer>(
        self,
        params: &(impl AsRef<[u8]> + ?Sized),
        mode: Mode,
        server: impl FnOnce(Domain) -> S + Send + 'static,
    ) -> Guest {
        let addr = self.addr();
        let mut back = ToolstackBack::new(addr, params);
        back.kind = "qdisk".into();
        back.mode = mode;
        let mut xs = self.hypervisor.xenstore().unwrap();
        create_device(&mut xs, addr, &back).unwrap();

        let join = |id| Domain::join(self.hypervisor.state_dir(), id).unwrap();
        let domain = join(self.driver);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let driver = std::thread::spawn(move || {
            let mut xs = domain.xenstore().unwrap();
            let vbd = Vbd::new(server(domain));
            let mut device = BackendDriver::restarted(addr, vbd);
            while !stopped.load(Ordering::SeqCst) && device.step(&mut xs).unwrap() != Life::Gone {
                xs.wait_event(Some(Duration::from_millis(20))).unwrap();
            }
        });
        let guest = join(self.guest);
        let session =
            BlockingDisk::attach(guest.clone(), guest.xenstore().unwrap(), addr, PATIENCE);
        let session = session.unwrap_or_else(|error| {
            let why = read_error(&mut xs, &addr.backend_path());
            stop.store(true, Ordering::SeqCst);
            panic!("{error}; error node of the backend: {why:?}")
        });
        Guest { session: Some(session), stop, driver: Some(driver), _machine: self }
    }
}

/// An operation of a guest.
#[derive(Clone, Debug)]
pub enum Deed {
    /// Writes bytes at a sector.
    Write(u64, Vec<u8>),
    /// Reads a number of sectors at a sector.
    Read(u64, usize),
    Discard(u64, u64),
    /// A secure discard: the old data becomes unrecoverable.
    SecureDiscard(u64, u64),
    Flush,
}

/// The guest's side of its disk.
pub struct Guest {
    session: Option<BlockingDisk<Domain, Client>>,
    stop: Arc<AtomicBool>,
    driver: Option<JoinHandle<()>>,
    _machine: Machine,
}

impl Guest {
    pub fn session(&mut self) -> &mut BlockingDisk<Domain, Client> {
        self.session.as_mut().unwrap()
    }

    /// Executes all of them concurrently, as far as the ring has room. Returns the data of each
    /// read.
    pub fn all(&mut self, deeds: &[Deed]) -> Vec<(Status, Vec<u8>)> {
        let mut found: Vec<Option<(Status, Vec<u8>)>> = deeds.iter().map(|_| None).collect();
        let mut slots = std::collections::HashMap::new();
        let mut next = 0;
        while found.iter().any(Option::is_none) {
            let queue = self.session().queue().unwrap();
            while next < deeds.len() {
                let Some(slot) = queue.reserve() else { break };
                let op = match &deeds[next] {
                    Deed::Write(sector, data) => {
                        assert!(data.len() <= SLOT_BYTES);
                        queue.fill(slot, 0, data).unwrap();
                        Op::Write { sector: *sector, bytes: data.len() }
                    }
                    Deed::Read(sector, count) => Op::Read { sector: *sector, bytes: count * 512 },
                    Deed::Discard(sector, sectors) => {
                        Op::Discard { sector: *sector, sectors: *sectors }
                    }
                    Deed::SecureDiscard(sector, sectors) => {
                        Op::SecureDiscard { sector: *sector, sectors: *sectors }
                    }
                    Deed::Flush => Op::Flush,
                };
                queue.start(slot, op).unwrap();
                slots.insert(slot.index(), next);
                next += 1;
            }
            queue.publish().unwrap();
            let mut over = Vec::new();
            self.session().answers(|slot, _, status| over.push((slot, status))).unwrap();
            for (slot, status) in over {
                let queue = self.session().queue().unwrap();
                let deed = slots.remove(&slot.index()).unwrap();
                let mut data = Vec::new();
                if let Deed::Read(_, count) = deeds[deed] {
                    data.resize(count * 512, 0);
                    queue.fetch(slot, 0, &mut data).unwrap();
                }
                queue.release(slot);
                found[deed] = Some((status, data));
            }
        }
        found.into_iter().map(Option::unwrap).collect()
    }

    /// Executes one operation, which must succeed.
    pub fn one(&mut self, deed: Deed) -> Vec<u8> {
        let [(status, data)] = self.all(&[deed]).try_into().unwrap();
        assert_eq!(status, Status::Okay);
        data
    }

    /// Returns the contents of the whole disk.
    pub fn everything(&mut self) -> Vec<u8> {
        let size = self.session().size() as usize;
        let mut data = vec![0; size];
        self.session().read_at(0, &mut data).unwrap();
        data
    }

    pub fn close(mut self) {
        self.session.take().unwrap().close().unwrap();
        self.stop.store(true, Ordering::SeqCst);
        self.driver.take().unwrap().join().unwrap();
    }
}

impl Drop for Guest {
    /// The image is closed after this.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(driver) = self.driver.take() {
            // If it ended for another reason, it has reported that already.
            let _ = driver.join();
        }
    }
}

/// A small pseudorandom number generator.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Executes a seeded workload on a disk, mirrors it in `model`, and compares both. Discarded
/// sectors may contain anything, so they are written again.
pub fn workload(guest: &mut Guest, model: &mut [u8], seed: u64, rounds: usize, discard: bool) {
    let mut rng = Rng(seed);
    let sectors = (model.len() / 512) as u64;
    for round in 0..rounds {
        // No two operations of a batch touch the same sectors.
        let count = 1 + rng.below(24);
        let part = sectors / count;
        let mut deeds = Vec::new();
        for i in 0..count {
            let len = 1 + rng.below(part.min(88));
            let from = i * part + rng.below(part - len + 1);
            match rng.below(10) {
                0..=5 => {
                    let mut data = vec![0; len as usize * 512];
                    data.iter_mut().for_each(|b| *b = rng.next() as u8);
                    deeds.push(Deed::Write(from, data));
                }
                6 if discard => {
                    let len = 1 + rng.below(part);
                    deeds.push(Deed::Discard(i * part, len));
                }
                _ => deeds.push(Deed::Read(from, len as usize)),
            }
        }
        if round % 7 == 0 {
            deeds.push(Deed::Flush);
        }
        let found = guest.all(&deeds);
        for (deed, (status, data)) in deeds.iter().zip(found) {
            assert_eq!(status, Status::Okay, "round {round}: {}", brief(deed));
            match deed {
                Deed::Write(from, data) => {
                    model[*from as usize * 512..][..data.len()].copy_from_slice(data);
                }
                Deed::Read(from, _) => {
                    let there = &model[*from as usize * 512..][..data.len()];
                    assert!(there == data, "round {round}: {} read other data", brief(deed));
                }
                Deed::Discard(from, len) => {
                    let there = &mut model[*from as usize * 512..][..*len as usize * 512];
                    let mut at = 0;
                    while at < there.len() {
                        let n = (there.len() - at).min(SLOT_BYTES);
                        let found = guest.one(Deed::Read(from + at as u64 / 512, n / 512));
                        there[at..at + n].copy_from_slice(&found);
                        at += n;
                    }
                }
                Deed::SecureDiscard(..) | Deed::Flush => {}
            }
        }
    }
    guest.one(Deed::Flush);
}

fn brief(deed: &Deed) -> String {
    match deed {
        Deed::Write(from, data) => format!("write {from}+{}", data.len() / 512),
        other => format!("{other:?}"),
    }
}

/// Executes one operation with an engine, and nothing else.
pub fn alone(
    engine: &mut DiskEngine<HeapMemory>,
    io: Io,
    segment: Option<IoSeg<HeapMemory>>,
) -> Result<(), EngineError> {
    engine.submit(0, io, &mut segment.into_iter().collect()).unwrap();
    engine.kick();
    let mut result = None;
    loop {
        engine.reap(&mut |_, done, segments| {
            segments.clear();
            result = Some(done);
        });
        if let Some(result) = result {
            return result;
        }
        engine.wait_due(None).unwrap();
    }
}

/// Runs a tool, which must succeed.
pub fn tool(name: &str, args: &[&str]) -> Output {
    let output = Command::new(name).args(args).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(
        output.status.success(),
        "{name} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Returns whether a tool is installed; prints a message otherwise.
pub fn has(name: &str, package: &str) -> bool {
    let there = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()));
    if !there {
        eprintln!("SKIPPED: {name} is not there; install {package}");
    }
    there
}

/// Converts a path for tools.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
