//! The driver domain, which serves disks as the real one does, but without threads.

use crate::disk::actions::{DaemonDo, Do, Flaw};
use crate::disk::medium::SharedMedium;
use crate::disk::queues::{Platform, Queues, Seats, SharedSeat};
use pvio_blkback::engine::FlushState;
use pvio_blkback::session::{self, record_name};
use pvio_blkback::vbd::{Vbd, VbdServer};
use pvio_blkback::{Begin, Config, Geometry, Session, SessionIdentity, SessionParts, SessionSpec};
use pvio_grant_table::DomId;
use pvio_grant_table::policy::MappingBudget;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_sim::kill::{self, Mortal};
use pvio_sim::{LocalDomain, Menu, Sim};
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendDriver, Fault, Life};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, backend_root, list_backends, read_state,
};
use pvio_xenbus::handshake::vbd::ToolstackBack;
use pvio_xenstored::{LocalClient, Store};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

/// In-flight records by device, which survive the daemon.
pub type Records = Rc<RefCell<BTreeMap<String, Mortal<HeapMemory>>>>;

/// Serves one disk.
pub struct Server {
    domain: Platform,
    media: Rc<BTreeMap<String, SharedMedium>>,
    /// `None` if no session survives the daemon.
    records: Option<Records>,
    medium: Option<SharedMedium>,
    /// Whether a flush of the open disk has failed.
    flushes: Arc<FlushState>,
    seats: Seats,
    crashed: Rc<Cell<bool>>,
    flaw: Flaw,
    /// Record of the session.
    record: Option<Mortal<HeapMemory>>,
}

impl Server {
    /// Returns the memory of a session's in-flight record.
    fn record(
        &mut self,
        identity: &SessionIdentity,
        begin: Begin,
    ) -> Result<Mortal<HeapMemory>, Fault> {
        let device = record_name(identity.addr);
        let memory = match begin {
            Begin::Again => self.record.clone().expect("continued before it was started"),
            Begin::Resumed => {
                let records = self.records.as_ref().expect("resume without records").borrow();
                let found = records.get(&device).cloned();
                found.ok_or_else(|| Fault::new("record-missing", device))?
            }
            Begin::New => {
                self.medium.as_ref().expect("opened before").borrow_mut().begin_session();
                let len = identity.record_len()?;
                let memory = Mortal(HeapMemory::pages(len.div_ceil(PAGE_SIZE)));
                if let Some(records) = &self.records {
                    records.borrow_mut().insert(device, memory.clone());
                }
                memory
            }
        };
        self.record = Some(memory.clone());
        Ok(memory)
    }
}

impl VbdServer for Server {
    type Session = Session<Platform, Mortal<HeapMemory>, Queues>;

    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault> {
        let name = String::from_utf8_lossy(&disk.params);
        let medium = self.media.get(&*name);
        let medium = medium.ok_or_else(|| Fault::new("no-image", name.as_ref()))?;
        // The I/O of a dead process is finished before anything is read.
        if !pvio_ring::planted!(StorageFence) {
            medium.borrow_mut().fence();
        }
        self.medium = Some(Rc::clone(medium));
        self.flushes = Arc::default();
        Ok(medium.borrow().geometry())
    }

    fn resumable(&mut self, session: &SessionIdentity) -> Result<(), Fault> {
        let record = self.record(session, Begin::Resumed)?;
        session::maps_requests(session, record).map(drop)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let record = self.record(&spec.identity, begin)?;
        let queues = Queues {
            medium: self.medium.clone().expect("opened before it is started"),
            seats: Rc::clone(&self.seats),
            crashed: Rc::clone(&self.crashed),
            flaw: self.flaw,
            resumed: begin == Begin::Resumed,
            first: None,
            record: record.clone(),
        };
        let parts = SessionParts {
            platform: self.domain.clone(),
            record,
            flush_state: Arc::clone(&self.flushes),
            mapping_budget: MappingBudget::unlimited(),
            stats: Vec::new(),
            queues,
        };
        Session::start(spec, begin, parts)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        session.ready()
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        session.fault()
    }

    fn resize(&mut self, session: &mut Self::Session, sectors: u64) {
        session.resize(sectors);
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn end(&mut self, device: DeviceAddr) {
        if let Some(record) = self.record.take() {
            session::invalidate(&record);
        }
        if let Some(records) = &self.records {
            records.borrow_mut().remove(&record_name(device));
        }
    }
}

struct Device {
    driver: BackendDriver<Vbd<Server>>,
    seats: Seats,
}

/// Daemon of a driver domain.
pub struct Daemon {
    domain: LocalDomain,
    xs: Mortal<LocalClient>,
    devices: BTreeMap<DeviceAddr, Device>,
    media: Rc<BTreeMap<String, SharedMedium>>,
    records: Option<Records>,
    crashed: Rc<Cell<bool>>,
    flaw: Flaw,
    config: Config,
}

const ROOT: &str = "root";

impl Daemon {
    pub fn start(
        domain: LocalDomain,
        store: &Rc<RefCell<Store>>,
        media: Rc<BTreeMap<String, SharedMedium>>,
        records: Option<Records>,
        flaw: Flaw,
        config: Config,
    ) -> Self {
        let mut xs = Mortal(LocalClient::connect(store, domain.id()));
        let root = backend_root(BackendKind::Vbd, domain.id());
        xs.watch(&root, ROOT).expect("the first watch of a domain");
        let (devices, crashed) = (BTreeMap::new(), Rc::default());
        Self { domain, xs, devices, media, records, crashed, flaw, config }
    }

    pub fn id(&self) -> DomId {
        self.domain.id()
    }

    pub fn serves(&self, addr: DeviceAddr) -> bool {
        self.devices.contains_key(&addr)
    }

    /// Describes the resources that are still held.
    pub fn holds(&self) -> String {
        let (pages, ports) = (self.domain.pages_mapped(), self.domain.ports_open());
        format!("{pages} pages mapped, {ports} ports open")
    }

    /// Ends the process immediately.
    pub fn crash(self) {
        self.crashed.set(true);
    }

    pub fn menu(&mut self, store: &Store, menu: &mut Menu<Do>) {
        if store.has_output(self.xs.0.conn()) {
            menu.must(100, Do::Daemon(DaemonDo::Event));
        }
        for (i, device) in self.devices.values().enumerate() {
            for (q, seat) in device.seats.borrow().iter().enumerate() {
                let mut seat = seat.borrow_mut();
                if seat.fault.is_some() {
                    menu.must(100, Do::Daemon(DaemonDo::Ended(i)));
                }
                let Some(served) = &mut seat.served else { continue };
                if served.is_awake() {
                    menu.must(200, Do::Daemon(DaemonDo::Work(i, q)));
                }
                if served.queue.engine_mut().is_busy() {
                    menu.must(150, Do::Daemon(DaemonDo::Complete(i, q)));
                }
            }
            menu.may(2, || Do::Daemon(DaemonDo::Spurious(i)));
        }
    }

    /// Executes an action. Returns whether the process is still alive: with a `killer`, it may be
    /// killed in any of its calls and stores, with a probability that increases with that value.
    pub fn act(&mut self, action: DaemonDo, killer: Option<u32>, sim: &mut Sim) -> bool {
        let kill_at = match killer {
            Some(often) if sim.below(400) < often.into() => match sim.below(80) as usize {
                60.. => kill::BEFORE_NOTIFY,
                moment => moment,
            },
            _ => usize::MAX,
        };
        let (outcome, moments) = kill::run(kill_at, || self.work(action, sim));
        if outcome.is_none() {
            sim.note(format_args!("  the daemon is killed after {moments} stores and calls"));
        }
        outcome.is_some()
    }

    fn work(&mut self, action: DaemonDo, sim: &mut Sim) {
        match action {
            DaemonDo::Event => match self.xs.poll_event().expect("xenstore") {
                Some(event) if event.token == ROOT => self.look_for_devices(sim),
                Some(event) => {
                    let device = self.devices.iter().find(|(_, d)| d.driver.token() == event.token);
                    if let Some(addr) = device.map(|(addr, _)| *addr) {
                        self.step(addr, sim);
                    }
                }
                None => {}
            },
            DaemonDo::Work(i, q) => {
                let seat = self.seat(i, q);
                let mut seat = seat.borrow_mut();
                let served = seat.served.as_mut().expect("action is available only if served");
                if let Err(fault) = served.work(self.flaw, sim) {
                    sim.note(format_args!("queue fails: {}", fault.code()));
                    served.let_finish();
                    (seat.served, seat.fault) = (None, Some(fault));
                }
            }
            DaemonDo::Complete(i, q) => {
                let seat = self.seat(i, q);
                let mut seat = seat.borrow_mut();
                let served = seat.served.as_mut().expect("action is available only if served");
                served.queue.engine_mut().complete_one();
            }
            DaemonDo::Ended(i) | DaemonDo::Spurious(i) => {
                let addr = *self.device(i).0;
                self.step(addr, sim);
            }
        }
    }

    fn device(&self, i: usize) -> (&DeviceAddr, &Device) {
        self.devices.iter().nth(i).expect("action is available only if the device exists")
    }

    fn seat(&self, i: usize, q: usize) -> SharedSeat {
        Rc::clone(&self.device(i).1.seats.borrow()[q])
    }

    fn look_for_devices(&mut self, sim: &mut Sim) {
        let me = self.id();
        let found = list_backends(&mut self.xs, BackendKind::Vbd, me).expect("xenstore");
        for addr in found {
            if self.devices.contains_key(&addr) {
                continue;
            }
            let seats = Seats::default();
            let server = Server {
                domain: Mortal(self.domain.clone()),
                media: Rc::clone(&self.media),
                records: self.records.clone(),
                medium: None,
                flushes: Arc::default(),
                seats: Rc::clone(&seats),
                crashed: Rc::clone(&self.crashed),
                flaw: self.flaw,
                record: None,
            };
            let vbd = Vbd::with(server, self.config);
            let left = read_state(&mut self.xs, &addr.backend_path()).expect("xenstore");
            // Without records, it is not known whether an earlier process served the frontend; for
            // a frontend that has not started, that makes no difference.
            let driver = match self.records {
                Some(_) => BackendDriver::taking_over(addr, vbd, left),
                None => BackendDriver::restarted(addr, vbd),
            };
            self.devices.insert(addr, Device { driver, seats });
            self.step(addr, sim);
        }
    }

    fn step(&mut self, addr: DeviceAddr, sim: &mut Sim) {
        let Some(device) = self.devices.get_mut(&addr) else { return };
        let life = device.driver.step(&mut self.xs);
        sim.note(format_args!("  backend {}: {life:?}, {}", addr.front, device.driver.state()));
        if life.expect("a backend's step needs nothing but xenstore") == Life::Gone {
            self.devices.remove(&addr);
        }
    }
}
