//! A guest with one disk, and a workload whose every response is checked.

use crate::disk::actions::{Do, GuestDo};
use crate::disk::medium::SECTOR;
use crate::disk::model::{Model, Pending, content};
use pvio_blkfront::{BackendFault, Disk, Op, Queue, RequestedFeatures, Shape, SlotId, StartError};
use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_ring::proto::blkif::Status;
use pvio_sim::kill::Mortal;
use pvio_sim::{LocalDomain, Menu, Sim, WaitState};
use pvio_xenbus::driver::{Fault, FrontendDriver, Life};
use pvio_xenbus::handshake::common::{DeviceAddr, DeviceClass, frontend_root, list_frontends};
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Store};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Outstanding request.
struct Request {
    op: Op,
    pending: Pending,
}

/// Response: the slot, its request, its status, and the session in which it arrived.
type Answer = (SlotId, Request, Status, u32);

/// Guest, which may have died, with its model of the disk.
pub struct Guest {
    pub addr: DeviceAddr,
    domain: LocalDomain,
    xs: Mortal<LocalClient>,
    driver: Option<FrontendDriver<Disk<Mortal<LocalDomain>>>>,
    model: Rc<RefCell<Model>>,
    /// Whether the backend is expected to follow the protocol; data is compared only then.
    trusting: bool,
    /// Largest number of queues that it requests.
    queues: usize,
    session: u32,
    lanes: Vec<Lane>,
    closing: bool,
    pub checked: u64,
}

/// Requests of one queue.
struct Lane {
    wait: WaitState,
    /// Prepared requests, not submitted.
    held: Vec<(SlotId, Request)>,
    flying: BTreeMap<usize, Request>,
    /// Completed requests, not checked.
    answered: Vec<Answer>,
    unpublished: bool,
}

impl Lane {
    fn new() -> Self {
        let (held, flying, answered) = (Vec::new(), BTreeMap::new(), Vec::new());
        Self { wait: WaitState::Asleep, held, flying, answered, unpublished: false }
    }
}

const BUS: &str = "bus";

impl Guest {
    pub fn boot(
        domain: LocalDomain,
        store: &Rc<RefCell<Store>>,
        addr: DeviceAddr,
        model: Rc<RefCell<Model>>,
        (queues, trusting): (usize, bool),
    ) -> Self {
        let mut xs = Mortal(LocalClient::connect(store, domain.id()));
        xs.watch(&frontend_root(DeviceClass::Vbd, domain.id()), BUS).expect("the first watch");
        model.borrow_mut().new_frontend();
        Self {
            addr,
            domain,
            xs,
            driver: None,
            model,
            trusting,
            queues,
            session: 0,
            lanes: Vec::new(),
            closing: false,
            checked: 0,
        }
    }

    pub fn id(&self) -> DomId {
        self.domain.id()
    }

    pub fn has_driver(&self) -> bool {
        self.driver.is_some()
    }

    /// Returns how often its disk was connected.
    pub fn sessions(&self) -> u32 {
        self.driver.as_ref().map_or(0, |d| d.class().sessions())
    }

    pub fn is_connected(&self) -> bool {
        self.driver.as_ref().is_some_and(|d| d.class().is_connected())
    }

    /// Returns the number of allocated pages.
    pub fn pages(&self) -> usize {
        self.domain.pages_allocated()
    }

    /// Describes what it waits for.
    pub fn waiting(&self) -> Option<String> {
        let (me, flying) = (self.id(), self.lanes.iter().map(|lane| lane.flying.len()));
        let flying: Vec<usize> = flying.collect();
        match &self.driver {
            Some(_) if flying.iter().any(|flying| *flying > 0) => {
                Some(format!("guest {me} waits for responses, by queue: {flying:?}"))
            }
            Some(_) if self.closing => Some(format!("guest {me} waits for its disk to close")),
            _ => None,
        }
    }

    /// Describes the resources that are held or shared.
    pub fn holds(&self) -> String {
        let d = &self.domain;
        let (pages, grants, ports) = (d.pages_allocated(), d.pages_granted(), d.ports_open());
        format!("{pages} pages allocated, {grants} granted, {ports} ports open")
    }

    /// Abandons all requests: the domain is destroyed, and no response will be taken.
    pub fn forget_requests(&mut self) {
        let mut model = self.model.borrow_mut();
        for lane in &mut self.lanes {
            let held = lane.held.drain(..).map(|(_, r)| r);
            let flying = std::mem::take(&mut lane.flying).into_values();
            let answered = lane.answered.drain(..).map(|(_, r, ..)| r);
            held.chain(flying).chain(answered).for_each(|r| model.abandon(r.pending));
        }
    }

    pub fn menu(&mut self, store: &Store, often: u32, menu: &mut Menu<Do>) {
        let me = self.domain.id();
        if store.has_output(self.xs.0.conn()) {
            menu.must(100, Do::Guest(me, GuestDo::Event));
        }
        let Some(driver) = &mut self.driver else { return };
        menu.may(2, || Do::Guest(me, GuestDo::Spurious));
        if self.closing {
            if driver.is_closed() {
                menu.must(50, Do::Guest(me, GuestDo::Reload));
            }
        } else if driver.state() != XenbusState::Closed {
            menu.may(often, || Do::Guest(me, GuestDo::Close));
        }
        let sessions = driver.class().sessions();
        if !driver.class().is_connected() {
            return;
        }
        if self.session != sessions {
            self.session = sessions;
            let lanes = &mut self.lanes;
            lanes.iter_mut().for_each(|l| (l.wait, l.unpublished) = (WaitState::Asleep, false));
            lanes.resize_with(driver.class().queues().max(lanes.len()), Lane::new);
        }
        for (q, lane) in self.lanes.iter().enumerate() {
            let Some(queue) = driver.class_mut().queue_at(q) else { continue };
            if lane.wait != WaitState::Asleep || queue.channel().0.is_pending() {
                menu.must(200, Do::Guest(me, GuestDo::Work(q)));
            }
            if lane.unpublished {
                menu.must(100, Do::Guest(me, GuestDo::Publish(q)));
            }
            if !lane.held.is_empty() {
                menu.must(100, Do::Guest(me, GuestDo::Begin(q)));
            }
            if !lane.answered.is_empty() {
                menu.must(200, Do::Guest(me, GuestDo::Check(q)));
            }
            if !self.closing {
                menu.may(150, || Do::Guest(me, GuestDo::Issue(q)));
                menu.may(5, || Do::Guest(me, GuestDo::Knock(q)));
            }
        }
    }

    pub fn act(&mut self, action: GuestDo, sim: &mut Sim) {
        match action {
            GuestDo::Event => self.event(sim),
            GuestDo::Spurious => self.step(sim),
            GuestDo::Work(q) => {
                if let Err(fault) = self.work(q) {
                    self.give_up(&fault, sim);
                }
            }
            GuestDo::Issue(q) => self.issue(q, sim),
            GuestDo::Begin(q) => {
                let lane = &mut self.lanes[q];
                let (slot, request) = lane.held.swap_remove(sim.index(lane.held.len()));
                lane.unpublished = true;
                self.begin(q, slot, request);
            }
            GuestDo::Publish(q) => self.publish(q, sim),
            GuestDo::Check(q) => {
                let answered = &mut self.lanes[q].answered;
                let answer = answered.swap_remove(sim.index(answered.len()));
                self.check(q, answer);
            }
            GuestDo::Close => {
                let driver =
                    self.driver.as_mut().expect("action is available only if the device exists");
                driver.close(&mut self.xs).expect("xenstore");
                self.closing = true;
            }
            GuestDo::Reload => {
                self.drop_driver();
                self.new_driver(sim);
            }
            GuestDo::Knock(q) => {
                self.queue(q).0.channel().notify().expect("the domain is alive");
            }
        }
    }

    fn queue(&mut self, q: usize) -> (&mut Queue<Mortal<LocalDomain>>, &mut Lane) {
        let driver = self.driver.as_mut().expect("action is available only if the device exists");
        let queue = driver.class_mut().queue_at(q).expect("action is available only if connected");
        (queue, &mut self.lanes[q])
    }

    /// Submits a request in each connected queue: all of them must be completed.
    pub fn flush_by_every_queue(&mut self, sim: &mut Sim) {
        for q in 0..self.lanes.len() {
            let driver = self.driver.as_mut().filter(|driver| driver.class().is_connected());
            let queue = driver.and_then(|driver| driver.class_mut().queue_at(q));
            let Some(slot) = queue.and_then(|queue| queue.reserve()) else { continue };
            let pending = self.model.borrow_mut().begin_flush();
            self.begin(q, slot, Request { op: Op::Flush, pending });
            self.publish(q, sim);
        }
    }

    fn event(&mut self, sim: &mut Sim) {
        let Some(event) = self.xs.poll_event().expect("xenstore") else { return };
        if event.token != BUS {
            if self.driver.as_ref().is_some_and(|d| d.token() == event.token) {
                self.step(sim);
            }
            return;
        }
        if self.driver.is_some() {
            return self.step(sim);
        }
        let me = self.id();
        let there = list_frontends(&mut self.xs, DeviceClass::Vbd, me).expect("xenstore");
        if there.contains(&self.addr.index) {
            self.new_driver(sim);
        }
    }

    fn new_driver(&mut self, sim: &mut Sim) {
        // Sizes above the minimum are used if the backend offers them.
        let shape = Shape { ring_pages: sim.pick(&[1, 1, 2]), pages_per_slot: sim.pick(&[11, 24]) };
        let queues = 1 + sim.index(self.queues);
        let disk = Disk::with(
            Mortal(self.domain.clone()),
            RequestedFeatures { shape, queues, ..RequestedFeatures::default() },
        );
        self.driver = Some(FrontendDriver::new(self.addr, disk));
        self.step(sim);
    }

    fn drop_driver(&mut self) {
        self.forget_requests();
        self.driver = None;
        self.lanes.clear();
        (self.closing, self.session) = (false, 0);
        self.model.borrow_mut().new_frontend();
    }

    fn step(&mut self, sim: &mut Sim) {
        let Some(driver) = &mut self.driver else { return };
        let life = driver.step(&mut self.xs);
        sim.note(format_args!("  frontend {}: {life:?}, {}", self.domain.id(), driver.state()));
        if life.expect("a frontend's step needs nothing but xenstore") == Life::Gone {
            return self.drop_driver();
        }
        if driver.state() == XenbusState::Closed {
            // No response will arrive; the model treats the requests as abandoned.
            self.forget_requests();
        }
    }

    fn give_up(&mut self, fault: &BackendFault, sim: &mut Sim) {
        assert!(!self.trusting, "fault of an honest backend: {fault}");
        sim.note(format_args!("  frontend {} gives up: {}", self.id(), fault.code()));
        let driver = self.driver.as_mut().expect("it has just found the fault");
        driver.fail(&mut self.xs, &Fault::of(fault.code(), fault)).expect("xenstore");
        self.forget_requests();
    }

    fn work(&mut self, q: usize) -> Result<(), BackendFault> {
        let session = self.session;
        let (queue, lane) = self.queue(q);
        lane.wait = match lane.wait {
            WaitState::Asleep => {
                queue.channel().take()?;
                WaitState::Polling
            }
            WaitState::Polling => {
                let (flying, answered) = (&mut lane.flying, &mut lane.answered);
                let count = queue.poll(|slot, op, status| {
                    let request = flying.remove(&slot.index());
                    let request =
                        request.expect("response without a request or duplicate response");
                    assert_eq!(request.op, op, "response has another operation");
                    answered.push((slot, request, status, session));
                })?;
                if count > 0 { WaitState::Polling } else { WaitState::Checking }
            }
            WaitState::Checking if queue.final_check()? => WaitState::Polling,
            WaitState::Checking => WaitState::Asleep,
        };
        Ok(())
    }

    fn issue(&mut self, q: usize, sim: &mut Sim) {
        let driver = self.driver.as_mut().expect("action is available only if the device exists");
        let disk = driver.class_mut();
        let served = disk.served().expect("known once connected");
        let (sectors, unit) = (served.sectors.min(256), u64::from(served.sector_size) / 512);
        let queue = disk.queue_at(q).expect("action is available only if connected");
        let lane = &mut self.lanes[q];
        for _ in 0..1 + sim.below(8) {
            let Some(slot) = queue.reserve() else { break };
            let most = (queue.slot_bytes() / SECTOR) as u64 / unit;
            let count = unit * if sim.one_in(3) { 1 + sim.below(most) } else { 1 + sim.below(3) };
            let bytes = count as usize * SECTOR;
            if count > sectors || bytes > queue.slot_bytes() {
                // The backend advertised an invalid size.
                assert!(!self.trusting);
                queue.release(slot);
                break;
            }
            let sector = unit * sim.below((sectors - count) / unit + 1);
            let range = sector..sector + count;
            let mut model = self.model.borrow_mut();
            let request = match sim.below(10) {
                0 => Some(Request { op: Op::Flush, pending: model.begin_flush() }),
                1 if model.may_write(&range) => Some(Request {
                    op: Op::Discard { sector, sectors: count },
                    pending: model.begin_discard(range),
                }),
                2..=5 if model.may_write(&range) => {
                    let (pending, number) = model.begin_write(range.clone());
                    let data: Vec<u8> = range.flat_map(|s| content(number, s)).collect();
                    queue.fill(slot, 0, &data).expect("it fits");
                    Some(Request { op: Op::Write { sector, bytes }, pending })
                }
                6.. if model.may_read(&range) => {
                    // Data found there later must have come from the disk.
                    queue.fill(slot, 0, &vec![0xa5; bytes]).expect("it fits");
                    Some(Request {
                        op: Op::Read { sector, bytes },
                        pending: model.begin_read(range),
                    })
                }
                _ => None,
            };
            match request {
                None => queue.release(slot),
                Some(request) if sim.one_in(4) => lane.held.push((slot, request)),
                Some(request) => {
                    queue.start(slot, request.op).expect("whole sectors in a reserved slot");
                    lane.flying.insert(slot.index(), request);
                    lane.unpublished = true;
                }
            }
        }
        if lane.unpublished && !sim.one_in(3) {
            self.publish(q, sim);
        }
    }

    fn begin(&mut self, q: usize, slot: SlotId, request: Request) {
        let (queue, lane) = self.queue(q);
        match queue.start(slot, request.op) {
            Ok(()) => {}
            // The disk has become smaller in the meantime.
            Err(StartError::OutOfRange { .. }) => {
                queue.release(slot);
                return self.model.borrow_mut().abandon(request.pending);
            }
            Err(error) => panic!("the slot was reserved, whatever came between: {error}"),
        }
        let before = lane.flying.insert(slot.index(), request);
        assert!(before.is_none(), "one slot for two requests");
    }

    fn publish(&mut self, q: usize, sim: &mut Sim) {
        let (queue, lane) = self.queue(q);
        lane.unpublished = false;
        if let Err(fault) = queue.publish() {
            self.give_up(&fault, sim);
        }
    }

    fn check(&mut self, q: usize, (slot, request, status, session): Answer) {
        let (queue, _) = self.queue(q);
        let mut data = Vec::new();
        if let Op::Read { bytes, .. } = request.op {
            data.resize(bytes, 0);
            queue.fetch(slot, 0, &mut data).expect("it fits");
        }
        queue.release(slot);
        self.checked += 1;
        if !self.trusting {
            return self.model.borrow_mut().abandon(request.pending);
        }
        assert_ne!(status, Status::NotSupported, "it was offered");
        self.model.borrow_mut().end(request.pending, status == Status::Okay, session, &data);
    }
}
