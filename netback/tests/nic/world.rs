//! A toolstack, a driver domain without threads and a guest, on one xenstore.

use pvio_grant_table::DomId;
use pvio_netback::fault::DropReason;
use pvio_netback::port::memory::{MemoryPort, pair};
use pvio_netback::port::{NetPort, Offload, Packet};
use pvio_netback::session::{
    Begin, QueueServer, SessionConfig, SessionParts, check_record, invalidate_record, record_name,
};
use pvio_netback::vif::{Attach, VifServer};
use pvio_netback::{Queue, Session, SessionSpec, Stats, Vif};
use pvio_netfront::{Hash, Nic};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_sim::kill::Mortal;
use pvio_sim::{LocalDomain, LocalMachine};
use pvio_xenbus::driver::{BackendDriver, Fault, FrontendDriver, HotplugMode, Life};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, Hotplug, create_domain, read_state, write_awaiting, write_hotplug,
    write_state,
};
use pvio_xenbus::handshake::vif::{
    BackOffer, Mac, Negotiated, ToolstackBack, VifRate, create_device,
};
use pvio_xenbus::wire::{Access, Perm};
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Quota, Store};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Duration;

pub const GROUP: [u8; 6] = [1, 0, 0x5e, 1, 2, 3];
pub const OTHER: [u8; 6] = [1, 0, 0x5e, 1, 2, 4];

const BACK: DomId = DomId(1);
const FRONT: DomId = DomId(2);

/// The backend may be killed at each of its calls and stores, by [`run`](pvio_sim::kill::run).
type Platform = Mortal<LocalDomain>;
type Memory = Mortal<HeapMemory>;

/// Served queue, its port, and the other end of the port.
struct Served {
    queue: Queue<Platform, Box<[u8]>, Memory>,
    port: MemoryPort,
    far: MemoryPort,
}

type Table = Rc<RefCell<Vec<Served>>>;
/// Records of sessions, which survive the backend's process.
type Records = Rc<RefCell<BTreeMap<String, Memory>>>;

struct Server {
    platform: Platform,
    queues: u32,
    stats: Vec<Arc<Stats>>,
    table: Table,
    records: Records,
    record_len: Rc<Cell<usize>>,
    /// Record of the session that was started last.
    record: Option<(SessionSpec, Memory)>,
    attached: Rc<Cell<Option<Attach>>>,
}

/// Serves the queues of a session by adding them to the table.
struct Queues {
    table: Table,
    records: Records,
}

/// A session's queues, which are dropped with it.
struct Running(Table);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.borrow_mut().clear();
    }
}

impl Server {
    fn existing(&self, spec: &SessionSpec) -> Result<Memory, Fault> {
        let found = self.records.borrow().get(&record_name(spec.addr)).cloned();
        found.ok_or_else(|| Fault::new("record-missing", "there is none"))
    }
}

impl VifServer for Server {
    type Session = Session<Platform, Memory, Queues>;

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn max_queues(&self) -> u32 {
        self.queues
    }

    fn open(&mut self, _: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        self.attached.set(Some(attach));
        Ok(())
    }

    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault> {
        check_record(self.existing(spec)?, spec)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let record = match begin {
            Begin::Resumed => self.existing(spec)?,
            Begin::New => {
                let len = spec.record_len();
                let memory = Mortal(HeapMemory::pages(len.div_ceil(PAGE_SIZE)));
                self.record_len.set(len);
                self.records.borrow_mut().insert(record_name(spec.addr), memory.clone());
                memory
            }
        };
        self.record = Some((spec.clone(), record.clone()));
        self.stats.resize_with(spec.queues.len().max(self.stats.len()), Arc::default);
        let (table, records) = (Rc::clone(&self.table), Rc::clone(&self.records));
        let (platform, stats) = (self.platform.clone(), self.stats.clone());
        let queues = Queues { table, records };
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

impl QueueServer<Platform, Memory> for Queues {
    type Buf = Box<[u8]>;
    type Running = Running;

    fn begin(&mut self, _: &SessionConfig) -> Result<(), Fault> {
        Ok(())
    }

    fn start(
        &mut self,
        _: usize,
        _: &str,
        mut queue: Queue<Platform, Box<[u8]>, Memory>,
    ) -> Result<Running, Fault> {
        let (mut port, far) = pair(64);
        // The queue's thread may take requests before `start` returns.
        let records = self.records.borrow();
        assert!(records.values().all(|record| record.load_u64(0, Relaxed) == Some(1)), "not valid");
        while queue.poll(&mut port, 64).unwrap().any() {}
        self.table.borrow_mut().push(Served { queue, port, far });
        Ok(Running(Rc::clone(&self.table)))
    }

    fn fault(&mut self, _: &mut Running) -> Option<Fault> {
        None
    }
}

pub struct World {
    pub addr: DeviceAddr,
    pub tool: LocalClient,
    /// Time of the backend's queues.
    pub now: Duration,
    machine: LocalMachine,
    store: Rc<RefCell<Store>>,
    queues: u32,
    table: Table,
    records: Records,
    record_len: Rc<Cell<usize>>,
    attached: Rc<Cell<Option<Attach>>>,
    hotplug_mode: HotplugMode,
    back: Option<BackendDriver<Vif<Server>>>,
    front: FrontendDriver<Nic<LocalDomain>>,
    back_xs: Mortal<LocalClient>,
    front_xs: LocalClient,
}

impl World {
    pub fn new(queues: u32, make: impl FnOnce(Nic<LocalDomain>) -> Nic<LocalDomain>) -> Self {
        let store = Rc::new(RefCell::new(Store::new(Quota::default())));
        let mut tool = LocalClient::connect(&store, DomId::DOM0);
        for id in [BACK, FRONT] {
            store.borrow_mut().introduce(id);
            create_domain(&mut tool, id, "test").unwrap();
        }
        let addr = DeviceAddr::new(BackendKind::Vif, BACK, FRONT, 0);
        let words = ToolstackBack::new(addr, Mac([0, 0x16, 0x3e, 1, 2, 3]));
        create_device(&mut tool, addr, &words).unwrap();
        let machine = LocalMachine::new();
        let nic = make(Nic::new(machine.domain(FRONT)));
        let [back_xs, front_xs] = [BACK, FRONT].map(|id| LocalClient::connect(&store, id));
        let back_xs = Mortal(back_xs);
        Self {
            addr,
            tool,
            now: Duration::from_secs(1),
            machine,
            store,
            queues,
            table: Table::default(),
            records: Records::default(),
            record_len: Rc::default(),
            attached: Rc::default(),
            hotplug_mode: HotplugMode::default(),
            back: None,
            front: FrontendDriver::new(addr, nic),
            back_xs,
            front_xs,
        }
    }

    pub fn nic(&mut self) -> &mut Nic<LocalDomain> {
        self.front.class_mut()
    }

    pub fn back_state(&mut self) -> XenbusState {
        read_state(&mut self.tool, &self.addr.backend_path()).unwrap()
    }

    pub fn front_state(&self) -> XenbusState {
        self.front.state()
    }

    pub fn front_is_closed(&self) -> bool {
        self.front.is_closed()
    }

    fn vif(&self) -> Vif<Server> {
        let (table, records) = (Rc::clone(&self.table), Rc::clone(&self.records));
        let record_len = Rc::clone(&self.record_len);
        let attached = Rc::clone(&self.attached);
        let platform = Mortal(self.machine.domain(BACK));
        let stats = (0..self.queues).map(|_| Arc::default()).collect();
        let (queues, record) = (self.queues, None);
        Vif::new(Server { platform, queues, stats, table, records, record_len, record, attached })
    }

    /// Ends the backend's process immediately, with its xenstore connection.
    fn die(&mut self) {
        self.back = None;
        self.table.borrow_mut().clear();
        self.back_xs = Mortal(LocalClient::connect(&self.store, BACK));
    }

    /// Starts another backend, which makes the frontend reconnect.
    pub fn restart(&mut self) {
        self.die();
        self.back = Some(BackendDriver::restarted(self.addr, self.vif()));
    }

    /// Sets the number of queues that the next backend offers.
    pub fn offer_queues(&mut self, queues: u32) {
        self.queues = queues;
    }

    /// Returns the negotiated features.
    pub fn negotiated(&self) -> Negotiated {
        let back = self.back.as_ref().expect("it was stepped");
        back.class().negotiated().expect("a session").clone()
    }

    /// Starts another backend, which takes over the session.
    pub fn take_over(&mut self) {
        self.die();
        let left = self.back_state();
        let back = BackendDriver::taking_over(self.addr, self.vif(), left);
        self.back = Some(back.with_hotplug_mode(self.hotplug_mode));
    }

    pub fn step_back(&mut self) {
        if self.back.is_none() {
            let back = BackendDriver::new(self.addr, self.vif());
            self.back = Some(back.with_hotplug_mode(self.hotplug_mode));
        }
        let back = self.back.as_mut().expect("made");
        assert_eq!(back.step(&mut self.back_xs).unwrap(), Life::Alive);
    }

    /// Makes the toolstack run a hotplug script for the NIC, as `xl` does.
    pub fn with_script(mut self) -> Self {
        self.hotplug_mode = HotplugMode::Scripts;
        let script = format!("{}/script", self.addr.backend_path());
        self.tool.write(&script, b"/etc/xen/scripts/vif-bridge").unwrap();
        self
    }

    /// Reports that the script has ended.
    pub fn script_is_done(&mut self) {
        write_hotplug(&mut self.tool, &self.addr.backend_path(), &Hotplug::Connected).unwrap();
    }

    /// Returns what attached the port that was opened last.
    pub fn attached(&self) -> Option<Attach> {
        self.attached.take()
    }

    /// Makes the frontend like that of Linux: its request that waits for a backend cannot be
    /// distinguished from a session.
    pub fn show_no_waiting(&mut self) {
        write_awaiting(&mut self.tool, &self.addr.frontend_path(), false).unwrap();
    }

    pub fn step_front(&mut self) {
        assert_eq!(self.front.step(&mut self.front_xs).unwrap(), Life::Alive);
    }

    /// Steps all participants until no work is left.
    pub fn settle(&mut self) {
        for _ in 0..30 {
            self.step_back();
            self.step_front();
            self.settle_rings();
        }
    }

    /// As [`settle`](Self::settle), but without steps of xenstore.
    pub fn settle_rings(&mut self) {
        for _ in 0..3 {
            let nic = self.front.class_mut();
            nic.set_clock(self.now);
            nic.queues().iter_mut().for_each(|queue| queue.publish().unwrap());
            for Served { queue, port, .. } in self.table.borrow_mut().iter_mut() {
                queue.set_clock(self.now);
                while queue.poll(port, 64).unwrap().any() {}
            }
        }
    }

    /// Returns the results of a frame that the backend's first port receives: queue, frame, hash
    /// and headroom.
    pub fn receive(&mut self, frame: &[u8]) -> Vec<(usize, Vec<u8>, Option<Hash>, usize)> {
        {
            let mut table = self.table.borrow_mut();
            let far = &mut table[0].far;
            let mut buf = far.reserve().unwrap();
            buf[..frame.len()].copy_from_slice(frame);
            let (len, offload) = (frame.len(), Offload::default());
            far.send(Packet { buf, start: 0, len, offload }).unwrap();
        }
        self.settle_rings();
        let mut all = Vec::new();
        for (index, queue) in self.front.class_mut().queues().iter_mut().enumerate() {
            let take = |packet: pvio_netfront::Incoming<'_>| {
                (index, packet.frame().to_vec(), packet.hash, packet.headroom())
            };
            while let Some(got) = queue.receive_packet(take).unwrap() {
                all.push(got);
            }
            queue.publish().unwrap();
        }
        self.settle_rings();
        all
    }

    /// Returns the number of bytes that are sent when every queue of the guest sends as much as
    /// possible, at one time.
    pub fn flood(&mut self) -> usize {
        let mut bytes = 0;
        for _ in 0..100 {
            for queue in self.front.class_mut().queues() {
                while queue.send(&[2; 1000], pvio_netfront::Checksum::Unknown).is_ok() {}
            }
            self.settle_rings();
            for Served { far, .. } in self.table.borrow_mut().iter_mut() {
                while let Some(packet) = far.receive() {
                    bytes += packet.len;
                    far.recycle(packet.buf);
                }
            }
        }
        bytes
    }

    /// Returns the number of served queues.
    pub fn served(&self) -> usize {
        self.table.borrow().len()
    }

    /// Returns the number of staged pages that the backend's queues have mapped.
    pub fn staged(&self) -> usize {
        self.table.borrow().iter().map(|served| served.queue.staged()).sum()
    }

    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.table.borrow().iter().map(|served| served.queue.stats().dropped(reason)).sum()
    }

    /// Returns the memory of all records.
    pub fn records(&self) -> Vec<HeapMemory> {
        self.records.borrow().values().map(|memory| memory.0.clone()).collect()
    }

    /// Returns the size in bytes of the record of the newest session.
    pub fn record_len(&self) -> usize {
        self.record_len.get()
    }

    /// Removes all records.
    pub fn forget_records(&mut self) {
        self.records.borrow_mut().clear();
    }

    pub fn start_closing(&mut self) {
        self.front.close(&mut self.front_xs).unwrap();
    }

    pub fn close(&mut self) {
        self.start_closing();
        self.settle();
    }

    /// Writes an offer and a state as the backend, and steps the frontend.
    pub fn says(&mut self, offer: &BackOffer, state: XenbusState) {
        offer.write(&mut self.back_xs, &self.addr.backend_path()).unwrap();
        self.step_front();
        self.says_state(state);
    }

    pub fn says_state(&mut self, state: XenbusState) {
        write_state(&mut self.back_xs, &self.addr.backend_path(), state).unwrap();
        self.step_front();
    }

    /// Removes the frontend's write permission for its directory.
    pub fn take_rights(&mut self) {
        let path = self.addr.frontend_path();
        let mut paths = vec![path.clone()];
        paths.extend(self.tool.directory(&path).unwrap().iter().map(|key| format!("{path}/{key}")));
        for path in paths {
            let perms = [Perm::new(DomId::DOM0, Access::None)];
            self.tool.set_perms(&path, &perms).unwrap();
        }
    }
}

/// Returns a datagram over IPv4 of this flow.
pub fn udp(flow: u8) -> Vec<u8> {
    let mut f: Vec<u8> = (0..90_u8).map(|at| at.wrapping_mul(3).wrapping_add(flow)).collect();
    f[..6].copy_from_slice(&[0, 0x16, 0x3e, 1, 2, 3]);
    f[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 76, 0, 0, 0, 0, 64, 17]);
    f[26..34].copy_from_slice(&[10, 0, 0, flow, 10, 0, 0, 1]);
    f
}

/// Returns a frame without a known protocol, to this address.
pub fn to_group(station: [u8; 6]) -> Vec<u8> {
    let mut f = vec![7; 60];
    f[..6].copy_from_slice(&station);
    f[12..14].copy_from_slice(&[0x88, 0xb5]);
    f
}
