//! The driver domain: what serves vifs, as the real one does, but for threads and taps.

use crate::wire::CablePort;
use crate::world::{Do, Turn};
use pvio_grant_table::DomId;
use pvio_netback::fault::QueueError;
use pvio_netback::queue::Policy;
use pvio_netback::vif::{Attach, Serve, Session, Vif};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_sim::kill::{Mortal, run};
use pvio_sim::{LocalDomain, Menu, Sim};
use pvio_xenbus::driver::{BackendDriver, Fault, Life};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, backend_root, list_backends, read_state,
};
use pvio_xenbus::handshake::vif::ToolstackBack;
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Store};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

type Memory = Mortal<HeapMemory>;
type Back = pvio_netback::Queue<Mortal<LocalDomain>, Box<[u8]>, Memory>;

/// The in-flight records, which outlive the daemon.
pub type Records = Rc<RefCell<BTreeMap<String, Memory>>>;

thread_local! {
    /// How often a session was found recorded.
    static RESUMED: Cell<u32> = const { Cell::new(0) };
}

/// How often a record was found since last asked.
pub fn take_resumed() -> u32 {
    RESUMED.take()
}

/// What a thread of the real daemon has.
struct Served {
    queue: Back,
    port: CablePort,
    turn: Turn,
}

type Seat = Rc<RefCell<Option<Served>>>;

pub struct Server {
    guest: DomId,
    ports: Rc<BTreeMap<DomId, CablePort>>,
    port: Option<CablePort>,
    seat: Seat,
    crashed: Rc<Cell<bool>>,
    records: Records,
}

pub struct Running {
    seat: Seat,
    crashed: Rc<Cell<bool>>,
}

impl Serve<Mortal<LocalDomain>> for Server {
    type Buf = Box<[u8]>;
    type Running = Running;
    type Record = Memory;

    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<Memory, Fault> {
        let mut records = self.records.borrow_mut();
        if resumed {
            let found = records.get(device).cloned();
            RESUMED.set(RESUMED.get() + u32::from(found.is_some()));
            return found.ok_or_else(|| Fault::new("record-missing", "there is none"));
        }
        let memory = Mortal(HeapMemory::pages(len.div_ceil(PAGE_SIZE)));
        records.insert(device.into(), memory.clone());
        Ok(memory)
    }

    fn remove_record(&mut self, device: &str) {
        self.records.borrow_mut().remove(device);
    }

    fn max_queues(&self) -> u32 {
        1
    }

    fn policy(&self) -> Policy {
        // Half of the guests this way, half that way.
        if self.guest.0.is_multiple_of(2) { Policy::Map } else { Policy::Copy }
    }

    fn open(&mut self, vif: &ToolstackBack, _: Attach) -> Result<(), Fault> {
        self.port = self.ports.get(&vif.frontend_id).cloned();
        Ok(())
    }

    fn begin(&mut self, _: &Session) -> Result<(), Fault> {
        Ok(())
    }

    fn started(&mut self) {}

    fn start(&mut self, _: usize, _: &str, queue: Back) -> Result<Running, Fault> {
        let port = self.port.clone().expect("opened before it is started");
        let served = Served { queue, port, turn: Turn::Poll };
        assert!(self.seat.borrow_mut().replace(served).is_none(), "two sessions at once");
        Ok(Running { seat: Rc::clone(&self.seat), crashed: Rc::clone(&self.crashed) })
    }

    fn stopped(&mut self) {}

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
        self.turn != Turn::Asleep
            || self.queue.channels().any(|c| c.0.is_pending())
            || self.port.is_ready()
    }

    /// One step of a worker's loop.
    fn work(&mut self, careless: bool, sim: &mut Sim) -> Result<(), QueueError> {
        self.turn = match self.turn {
            Turn::Asleep => {
                self.queue.take_events()?;
                Turn::Poll
            }
            Turn::Poll => {
                self.queue.unblock();
                let budget = 1 + sim.below(64) as usize;
                if self.queue.poll(&mut self.port, budget)?.any() {
                    Turn::Poll
                } else {
                    Turn::Check
                }
            }
            Turn::Check if careless || self.queue.may_sleep()? => Turn::Asleep,
            Turn::Check => Turn::Poll,
        };
        Ok(())
    }
}

/// What the daemon can do.
#[derive(Debug)]
pub enum DaemonDo {
    Event,
    Work(usize),
    Spurious(usize),
}

struct Device {
    driver: BackendDriver<Vif<Mortal<LocalDomain>, Server>>,
    seat: Seat,
}

pub struct Daemon {
    domain: LocalDomain,
    xs: LocalClient,
    devices: BTreeMap<DeviceAddr, Device>,
    ports: Rc<BTreeMap<DomId, CablePort>>,
    crashed: Rc<Cell<bool>>,
    records: Records,
    /// Its workers sleep without asking for an event and looking once more.
    careless: bool,
}

const ROOT: &str = "root";

impl Daemon {
    pub fn start(
        domain: LocalDomain,
        store: &Rc<RefCell<Store>>,
        (ports, records): (Rc<BTreeMap<DomId, CablePort>>, Records),
        careless: bool,
    ) -> Self {
        let mut xs = LocalClient::connect(store, domain.id());
        xs.watch(&backend_root(BackendKind::Vif, domain.id()), ROOT).expect("the first watch");
        let (devices, crashed) = (BTreeMap::new(), Rc::default());
        Self { domain, xs, devices, ports, crashed, records, careless }
    }

    pub fn serves(&self, addr: DeviceAddr) -> bool {
        self.devices.contains_key(&addr)
    }

    pub fn holds(&self) -> String {
        let (pages, ports) = (self.domain.pages_mapped(), self.domain.ports_open());
        format!("{pages} pages mapped, {ports} ports open")
    }

    /// The process dies here and now.
    pub fn crash(self) {
        self.crashed.set(true);
    }

    pub fn menu(&mut self, store: &Store, menu: &mut Menu<Do>) {
        if store.has_output(self.xs.conn()) {
            menu.must(100, Do::Daemon(DaemonDo::Event));
        }
        for (i, device) in self.devices.values().enumerate() {
            if device.seat.borrow().as_ref().is_some_and(Served::is_awake) {
                menu.must(200, Do::Daemon(DaemonDo::Work(i)));
            }
            menu.may(2, || Do::Daemon(DaemonDo::Spurious(i)));
        }
    }

    /// Does something, and dies after so many steps of that if it has as many. Whether it lives.
    pub fn act_or_die(&mut self, action: &DaemonDo, after: Option<usize>, sim: &mut Sim) -> bool {
        run(after.unwrap_or(usize::MAX), || self.act(action, sim)).0.is_some()
    }

    fn act(&mut self, action: &DaemonDo, sim: &mut Sim) {
        let nth = |i: usize| self.devices.iter().nth(i).expect("on the menu only if there");
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
            DaemonDo::Work(i) => {
                let mut seat = nth(i).1.seat.borrow_mut();
                let served = seat.as_mut().expect("on the menu only if served");
                served.work(self.careless, sim).expect("an honest frontend");
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
            let seat = Seat::default();
            let server = Server {
                guest: addr.front,
                ports: Rc::clone(&self.ports),
                port: None,
                seat: Rc::clone(&seat),
                crashed: Rc::clone(&self.crashed),
                records: Rc::clone(&self.records),
            };
            let vif = Vif::new(Mortal(self.domain.clone()), server);
            // As the real daemon decides.
            let state = read_state(&mut self.xs, &addr.backend_path()).expect("xenstore");
            let driver = match state {
                XenbusState::Connected => BackendDriver::resuming(addr, vif),
                _ => BackendDriver::restarted(addr, vif),
            };
            self.devices.insert(addr, Device { driver, seat });
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
