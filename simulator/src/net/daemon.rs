//! The driver domain, which serves vifs as the real one does, but without threads and taps.

use crate::net::actions::{DaemonDo, Do, Flaw};
use crate::net::wire::{CableEnd, CablePort};
use pvio_grant_table::DomId;
use pvio_netback::fault::QueueError;
use pvio_netback::queue::{Policy, Waker};
use pvio_netback::session::{
    Begin, QueueServer, SessionConfig, SessionParts, check_record, invalidate_record, record_name,
};
use pvio_netback::vif::{Attach, VifServer};
use pvio_netback::{Session, SessionSpec, Stats, Vif};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_sim::kill::{Mortal, run};
use pvio_sim::{LocalDomain, Menu, Sim, WaitState};
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendDriver, Fault, Life};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, backend_root, list_backends, read_state,
};
use pvio_xenbus::handshake::vif::{ToolstackBack, VifRate};
use pvio_xenstored::{LocalClient, Store};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

type Memory = Mortal<HeapMemory>;
type Back = pvio_netback::Queue<Mortal<LocalDomain>, Box<[u8]>, Memory>;

/// In-flight records, which survive the daemon.
pub type Records = Rc<RefCell<BTreeMap<String, Memory>>>;

thread_local! {
    /// Number of resumed sessions, and of those with several queues.
    static RESUMED: Cell<[u32; 2]> = const { Cell::new([0; 2]) };
}

/// Returns the number of resumed sessions since the last call, and of those with several queues.
pub fn take_resumed() -> [u32; 2] {
    RESUMED.take()
}

/// State of a thread of the real daemon.
struct Served {
    queue: Back,
    port: CablePort,
    wait: WaitState,
    /// Set by its siblings to wake it.
    woken: Arc<AtomicBool>,
}

/// Slot of a queue, through which the scheduler polls it.
type Seat = Rc<RefCell<Option<Served>>>;
/// Slots of a NIC's queues.
type Seats = Rc<RefCell<Vec<Seat>>>;

pub struct Server {
    platform: Mortal<LocalDomain>,
    guest: DomId,
    cables: Rc<BTreeMap<DomId, CableEnd>>,
    cable: Option<CableEnd>,
    seats: Seats,
    crashed: Rc<Cell<bool>>,
    records: Records,
    flaw: Flaw,
    max_queues: u32,
    stats: Vec<Arc<Stats>>,
    /// Number of times that a record of an earlier process was opened.
    reopened: u32,
    /// Record of the session that was started last.
    record: Option<(SessionSpec, Memory)>,
}

/// Serves the queues of a session in the seats of a NIC.
pub struct Queues {
    cable: CableEnd,
    seats: Seats,
    crashed: Rc<Cell<bool>>,
    flaw: Flaw,
    resumed: bool,
    /// Number of queues of the session.
    queues: usize,
    woken: Vec<Arc<AtomicBool>>,
}

pub struct Running {
    seat: Seat,
    crashed: Rc<Cell<bool>>,
}

/// Exchanges the sections of the first two queues in a vif's record of `len` bytes. The sections of the
/// queues are the record's last ones; the header has the number of queues.
fn swap_queues(record: &Memory, len: usize) {
    /// Size of the two sections of a queue in bytes: 256 entries of 16 bytes after 64 bytes each.
    const SECTIONS: usize = 2 * (64 + 256 * 16);
    let queues = record.load_u64(88, Ordering::Relaxed).expect("inside the record") as usize;
    if queues < 2 {
        return;
    }
    let first = len - queues * SECTIONS;
    for at in (first..first + SECTIONS).step_by(8) {
        let [one, other] = [at, at + SECTIONS].map(|at| record.load_u64(at, Ordering::Relaxed));
        record.0.store_u64(at, other.expect("inside"), Ordering::Relaxed);
        record.0.store_u64(at + SECTIONS, one.expect("inside"), Ordering::Relaxed);
    }
}

impl Server {
    fn open_record(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Memory, Fault> {
        let (device, len) = (record_name(spec.addr), spec.record_len());
        let mut records = self.records.borrow_mut();
        if begin == Begin::Resumed {
            self.reopened += 1;
            let found = records.get(&device).cloned();
            let found = found.ok_or_else(|| Fault::new("record-missing", "there is none"))?;
            if self.flaw == Flaw::SwapsRecords && self.reopened == 1 {
                swap_queues(&found, len);
            }
            return Ok(found);
        }
        self.reopened = 0;
        let memory = Mortal(HeapMemory::pages(len.div_ceil(PAGE_SIZE)));
        records.insert(device, memory.clone());
        Ok(memory)
    }
}

impl VifServer for Server {
    type Session = Session<Mortal<LocalDomain>, Memory, Queues>;

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn max_queues(&self) -> u32 {
        self.max_queues
    }

    fn policy(&self) -> Policy {
        // Half of the guests use each policy.
        if self.guest.0.is_multiple_of(2) { Policy::Map } else { Policy::Copy }
    }

    fn open(&mut self, vif: &ToolstackBack, _: Attach) -> Result<(), Fault> {
        self.cable = self.cables.get(&vif.frontend_id).cloned();
        Ok(())
    }

    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault> {
        check_record(self.open_record(spec, Begin::Resumed)?, spec)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let record = self.open_record(spec, begin)?;
        self.record = Some((spec.clone(), record.clone()));
        self.stats.resize_with(spec.queues.len().max(self.stats.len()), Arc::default);
        let queues = Queues {
            cable: self.cable.clone().expect("opened before it is started"),
            seats: Rc::clone(&self.seats),
            crashed: Rc::clone(&self.crashed),
            flaw: self.flaw,
            resumed: begin == Begin::Resumed,
            queues: 0,
            woken: Vec::new(),
        };
        let (platform, stats) = (self.platform.clone(), self.stats.clone());
        let parts = SessionParts { platform, record, limit: Arc::default(), stats, queues };
        Session::start(spec, begin, parts)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        session.ready()
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        session.fault()
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn end(&mut self, device: DeviceAddr) {
        if let Some((spec, record)) = self.record.take() {
            invalidate_record(record, &spec);
        }
        self.records.borrow_mut().remove(&record_name(device));
    }

    fn set_rate(&mut self, session: &mut Self::Session, rate: Option<VifRate>) {
        session.set_rate(rate);
    }

    fn filter_groups(&mut self, session: &mut Self::Session, chosen: bool) {
        session.filter_groups(chosen);
    }

    fn set_headroom(&mut self, session: &mut Self::Session, bytes: u16) {
        session.set_headroom(bytes);
    }
}

impl QueueServer<Mortal<LocalDomain>, Memory> for Queues {
    type Buf = Box<[u8]>;
    type Running = Running;

    fn wakers(&mut self, queues: usize) -> Result<Vec<Waker>, Fault> {
        self.woken = (0..queues).map(|_| Arc::default()).collect();
        let waker = |woken: &Arc<AtomicBool>| {
            let woken = Arc::clone(woken);
            Arc::new(move || woken.store(true, Ordering::Relaxed)) as Waker
        };
        Ok(self.woken.iter().map(waker).collect())
    }

    fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault> {
        self.queues = session.queues;
        Ok(())
    }

    fn start(&mut self, index: usize, _: &str, queue: Back) -> Result<Running, Fault> {
        let [all, several] = RESUMED.get();
        let [first, second] = [0, 1].map(|number| u32::from(self.resumed && index == number));
        RESUMED.set([all + first, several + second]);
        let port = self.cable.port(index, self.queues);
        let woken = self.woken.get(index).cloned().unwrap_or_default();
        let served = Served { queue, port, wait: WaitState::Polling, woken };
        let forgotten = self.flaw == Flaw::ResumesOneQueue && self.resumed && index > 0;
        let seat = Rc::new(RefCell::new(Some(served).filter(|_| !forgotten)));
        let mut seats = self.seats.borrow_mut();
        seats.retain(|seat| Rc::strong_count(seat) > 1);
        assert_eq!(seats.len(), index, "two sessions at once");
        seats.push(Rc::clone(&seat));
        Ok(Running { seat, crashed: Rc::clone(&self.crashed) })
    }

    fn fault(&mut self, _: &mut Running) -> Option<Fault> {
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(mut served) = self.seat.borrow_mut().take() else { return };
        if !self.crashed.get() {
            served.queue.drop_backlog(&mut served.port);
        }
    }
}

impl Served {
    fn is_awake(&self) -> bool {
        self.wait != WaitState::Asleep
            || self.queue.channels().any(|c| c.0.is_pending())
            || self.port.is_ready()
            || self.woken.load(Ordering::Relaxed)
    }

    /// Executes one step of a worker's loop.
    fn work(&mut self, flaw: Flaw, sim: &mut Sim) -> Result<(), QueueError> {
        self.wait = match self.wait {
            WaitState::Asleep => {
                self.woken.store(false, Ordering::Relaxed);
                self.queue.take_events()?;
                WaitState::Polling
            }
            WaitState::Polling => {
                self.queue.unblock();
                let budget = 1 + sim.below(64) as usize;
                if self.queue.poll(&mut self.port, budget)?.any() {
                    WaitState::Polling
                } else {
                    WaitState::Checking
                }
            }
            WaitState::Checking if flaw == Flaw::NoFinalCheck || !self.queue.final_check()? => {
                WaitState::Asleep
            }
            WaitState::Checking => WaitState::Polling,
        };
        Ok(())
    }
}

struct Device {
    driver: BackendDriver<Vif<Server>>,
    seats: Seats,
}

pub struct Daemon {
    domain: LocalDomain,
    xs: Mortal<LocalClient>,
    devices: BTreeMap<DeviceAddr, Device>,
    cables: Rc<BTreeMap<DomId, CableEnd>>,
    crashed: Rc<Cell<bool>>,
    records: Records,
    flaw: Flaw,
    max_queues: u32,
}

const ROOT: &str = "root";

impl Daemon {
    pub fn start(
        domain: LocalDomain,
        store: &Rc<RefCell<Store>>,
        (cables, records): (Rc<BTreeMap<DomId, CableEnd>>, Records),
        (flaw, max_queues): (Flaw, u32),
    ) -> Self {
        let mut xs = Mortal(LocalClient::connect(store, domain.id()));
        xs.watch(&backend_root(BackendKind::Vif, domain.id()), ROOT).expect("the first watch");
        let (devices, crashed) = (BTreeMap::new(), Rc::default());
        Self { domain, xs, devices, cables, crashed, records, flaw, max_queues }
    }

    pub fn serves(&self, addr: DeviceAddr) -> bool {
        self.devices.contains_key(&addr)
    }

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
                if seat.borrow().as_ref().is_some_and(Served::is_awake) {
                    menu.must(200, Do::Daemon(DaemonDo::Work(i, q)));
                }
            }
            menu.may(2, || Do::Daemon(DaemonDo::Spurious(i)));
        }
    }

    /// Executes an action, and kills the process after `after` steps of it, if it has that many.
    /// Returns whether the process is still alive.
    pub fn act_or_die(&mut self, action: &DaemonDo, after: Option<usize>, sim: &mut Sim) -> bool {
        run(after.unwrap_or(usize::MAX), || self.act(action, sim)).0.is_some()
    }

    fn act(&mut self, action: &DaemonDo, sim: &mut Sim) {
        let nth = |i: usize| {
            self.devices.iter().nth(i).expect("action is available only if the device exists")
        };
        match *action {
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
                let seat = Rc::clone(&nth(i).1.seats.borrow()[q]);
                let mut seat = seat.borrow_mut();
                let served = seat.as_mut().expect("action is available only if served");
                served.work(self.flaw, sim).expect("an honest frontend");
            }
            DaemonDo::Spurious(i) => {
                let addr = *nth(i).0;
                self.step(addr, sim);
            }
        }
    }

    fn look_for_devices(&mut self, sim: &mut Sim) {
        let me = self.domain.id();
        for addr in list_backends(&mut self.xs, BackendKind::Vif, me).expect("xenstore") {
            if self.devices.contains_key(&addr) {
                continue;
            }
            let seats = Seats::default();
            let server = Server {
                platform: Mortal(self.domain.clone()),
                guest: addr.front,
                cables: Rc::clone(&self.cables),
                cable: None,
                seats: Rc::clone(&seats),
                crashed: Rc::clone(&self.crashed),
                records: Rc::clone(&self.records),
                flaw: self.flaw,
                max_queues: self.max_queues,
                stats: (0..self.max_queues).map(|_| Arc::default()).collect(),
                reopened: 0,
                record: None,
            };
            let vif = Vif::new(server);
            // The same decision as in the real daemon.
            let state = read_state(&mut self.xs, &addr.backend_path()).expect("xenstore");
            let driver = BackendDriver::taking_over(addr, vif, state);
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
