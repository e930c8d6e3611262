//! The driver domain, which serves disks as the real one does, but without threads.

use crate::choices::Do;
use crate::medium::{SharedMedium, SimEngine};
use pvio_blkback::vbd::{Vbd, VbdServer};
use pvio_blkback::{Buf, Config, Geometry, Progress, Queue, QueueFault, QueueParts};
use pvio_event_channel::{EventChannel, EventError, Port};
use pvio_grant_table::DomId;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_sim::kill::{self, Mortal};
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalMapping;
use pvio_sim::{LocalDomain, Menu, Sim, WaitState};
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
use std::sync::atomic::Ordering::Relaxed;

/// Deliberate defect, to verify that the simulation finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Flaw {
    #[default]
    None,
    /// Sleeps without requesting notifications and without the final check.
    NoFinalCheck,
    /// Publishes responses without notifications.
    NeverNotifies,
    /// Sometimes completes a write without executing it.
    ForgetsWrites,
    /// Completes flushes without executing them.
    ForgetsFlushes,
    /// Resumes the first queue of a session with the record of the second, and vice versa.
    SwapsRecords,
    /// Resumes only the first queue of a session.
    ResumesOneQueue,
}

/// Event channel that can be made to fail.
struct Wire {
    channel: Mortal<LocalChannel>,
    cut: bool,
}

impl EventChannel for Wire {
    fn port(&self) -> Port {
        self.channel.port()
    }

    fn notify(&self) -> Result<(), EventError> {
        if self.cut { Ok(()) } else { self.channel.notify() }
    }

    fn take(&self) -> Result<bool, EventError> {
        self.channel.take()
    }
}

/// The process may be killed at each of its calls and stores.
type Platform = Mortal<LocalDomain>;
/// In-flight records by device, which survive the daemon.
pub type Records = Rc<RefCell<BTreeMap<String, Mortal<HeapMemory>>>>;
type Parts = QueueParts<Platform, Mortal<LocalChannel>, Mortal<HeapMemory>>;

thread_local! {
    /// Number of resumed sessions with several queues.
    static RESUMED: Cell<u32> = const { Cell::new(0) };
}

/// Returns the number of resumed sessions with several queues since the last call.
pub fn take_resumed() -> u32 {
    RESUMED.take()
}

/// State of a thread of the real daemon.
struct Served {
    queue: Queue<Platform, Wire, SimEngine<Buf<Mortal<LocalMapping>>>, Mortal<HeapMemory>>,
    wait: WaitState,
}

/// Slot of a queue, through which the scheduler polls it.
struct Seat {
    name: String,
    served: Option<Served>,
    fault: Option<QueueFault>,
}

type SharedSeat = Rc<RefCell<Seat>>;
/// Slots of a disk's queues.
type Seats = Rc<RefCell<Vec<SharedSeat>>>;

/// Serves one disk: each of its queues has a slot.
pub struct Server {
    media: Rc<BTreeMap<String, SharedMedium>>,
    /// `None` if no session survives the daemon.
    records: Option<Records>,
    medium: Option<SharedMedium>,
    seats: Seats,
    crashed: Rc<Cell<bool>>,
    flaw: Flaw,
    /// Whether the session was started by another process.
    resumed: bool,
    /// The first queue, if its record is to be exchanged with the second's.
    first: Option<(SharedSeat, Parts)>,
    /// Record of the session.
    record: Option<Mortal<HeapMemory>>,
}

/// Running queue.
pub struct Running {
    seat: SharedSeat,
    crashed: Rc<Cell<bool>>,
}

impl Server {
    fn seat(&self, seat: &SharedSeat, parts: Parts) {
        let medium = self.medium.clone().expect("opened before it is started");
        let parts = QueueParts {
            frontend: parts.frontend,
            disk: parts.disk,
            grants: parts.grants,
            data_path: parts.data_path,
            ring: parts.ring,
            channel: Wire { channel: parts.channel, cut: self.flaw == Flaw::NeverNotifies },
            abi: parts.abi,
            max_indirect_segments: parts.max_indirect_segments,
            record: parts.record,
            stats: parts.stats,
        };
        let queue = Queue::new(parts, SimEngine::new(medium, self.flaw));
        seat.borrow_mut().served = Some(Served { queue, wait: WaitState::Polling });
    }
}

impl VbdServer<Platform> for Server {
    type Running = Running;
    type Record = Mortal<HeapMemory>;

    fn record(
        &mut self,
        device: &str,
        len: usize,
        resumed: bool,
    ) -> Result<Mortal<HeapMemory>, Fault> {
        self.resumed = resumed;
        if resumed {
            let records = self.records.as_ref().expect("resume without records").borrow();
            self.record = records.get(device).cloned();
            let found = self.record.clone();
            return found.ok_or_else(|| Fault::new("record-missing", device));
        }
        let memory = Mortal(HeapMemory::pages(len.div_ceil(PAGE_SIZE)));
        if let Some(records) = &self.records {
            records.borrow_mut().insert(device.into(), memory.clone());
        }
        self.record = Some(memory.clone());
        Ok(memory)
    }

    fn remove_record(&mut self, device: &str) {
        if let Some(records) = &self.records {
            records.borrow_mut().remove(device);
        }
    }

    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault> {
        let name = String::from_utf8_lossy(&disk.params);
        let medium = self.media.get(&*name);
        let medium = medium.ok_or_else(|| Fault::new("no-image", name.as_ref()))?;
        // The I/O of a dead process is finished before anything is read.
        medium.borrow_mut().fence();
        self.medium = Some(Rc::clone(medium));
        Ok(medium.borrow().geometry())
    }

    fn start(&mut self, name: &str, mut parts: Parts) -> Result<Running, Fault> {
        // The queue may take requests from here on.
        let valid = self.record.as_ref().and_then(|record| record.load_u64(0, Relaxed));
        assert_eq!(valid, Some(1), "the record of {name} is not valid");
        let seat = Seat { name: name.into(), served: None, fault: None };
        let seat = Rc::new(RefCell::new(seat));
        let number = {
            let mut seats = self.seats.borrow_mut();
            seats.retain(|seat| Rc::strong_count(seat) > 1);
            assert!(seats.iter().all(|seat| seat.borrow().name != name), "two sessions at once");
            seats.push(Rc::clone(&seat));
            seats.len() - 1
        };
        RESUMED.set(RESUMED.get() + u32::from(self.resumed && number == 1));
        match (self.flaw, number) {
            (Flaw::SwapsRecords, 0) if self.resumed => self.first = Some((Rc::clone(&seat), parts)),
            (Flaw::ResumesOneQueue, 1..) if self.resumed => {}
            _ => {
                if let Some((seat, mut first)) = self.first.take() {
                    std::mem::swap(&mut first.record, &mut parts.record);
                    self.seat(&seat, first);
                }
                self.seat(&seat, parts);
            }
        }
        Ok(Running { seat, crashed: Rc::clone(&self.crashed) })
    }

    fn fault(&mut self, running: &mut Running) -> Option<QueueFault> {
        running.seat.borrow_mut().fault.take()
    }
}

impl Drop for Running {
    /// Completes the operations in flight, as the end of the real worker does; unless the process
    /// is killed.
    fn drop(&mut self) {
        let mut seat = self.seat.borrow_mut();
        seat.fault = None;
        let Some(mut served) = seat.served.take() else { return };
        // A failed run ends without cleanup.
        if std::thread::panicking() {
            return;
        }
        if self.crashed.get() {
            return served.queue.engine_mut().crash();
        }
        served.finish();
    }
}

impl Served {
    fn finish(&mut self) {
        let queue = &mut self.queue;
        queue.drain();
        while queue.in_flight() > 0 {
            let engine = queue.engine_mut();
            assert!(
                engine.is_busy() || engine.is_done(),
                "operation was not submitted to the engine"
            );
            if engine.is_busy() {
                engine.complete_one();
            }
            if queue.poll(0).is_err() {
                return self.let_finish();
            }
        }
        let _ = queue.poll(0);
    }

    /// Completes the operations in flight although the frontend cannot be reached any more.
    fn let_finish(&mut self) {
        while self.queue.engine_mut().is_busy() {
            self.queue.engine_mut().complete_one();
        }
    }

    fn is_awake(&mut self) -> bool {
        self.wait != WaitState::Asleep
            || self.queue.channel().channel.0.is_pending()
            || self.queue.engine_mut().is_done()
    }

    /// Executes one step of a worker's loop.
    fn work(&mut self, flaw: Flaw, sim: &mut Sim) -> Result<(), QueueFault> {
        let queue = &mut self.queue;
        self.wait = match self.wait {
            WaitState::Asleep => {
                queue.poll(0)?;
                queue.channel().take()?;
                WaitState::Polling
            }
            WaitState::Polling => match queue.poll(1 + sim.below(32) as u32)? {
                Progress::Some => WaitState::Polling,
                Progress::None => WaitState::Checking,
            },
            WaitState::Checking if flaw == Flaw::NoFinalCheck => WaitState::Asleep,
            WaitState::Checking if queue.final_check()? => WaitState::Polling,
            WaitState::Checking => WaitState::Asleep,
        };
        Ok(())
    }
}

/// Action of the daemon.
#[derive(Debug)]
pub enum DaemonDo {
    /// Process an event of xenstore.
    Event,
    /// A step of a device's worker.
    Work(usize, usize),
    /// A queue's engine completes an operation.
    Complete(usize, usize),
    /// A worker has ended on its own, and its driver is notified.
    Ended(usize),
    /// Read xenstore without an event.
    Spurious(usize),
}

struct Device {
    driver: BackendDriver<Vbd<Platform, Server>>,
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
            Some(often) if sim.below(400) < often.into() => sim.below(60) as usize,
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
                media: Rc::clone(&self.media),
                records: self.records.clone(),
                medium: None,
                seats: Rc::clone(&seats),
                crashed: Rc::clone(&self.crashed),
                flaw: self.flaw,
                resumed: false,
                first: None,
                record: None,
            };
            let vbd = Vbd::with(Mortal(self.domain.clone()), server, self.config);
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
