//! A guest with a NIC that sends and receives numbered frames.

use crate::net::actions::{Do, GuestDo};
use crate::net::wire::{LANES, LEAST, Ledger};
use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_netfront::{Checksum, GroupError, Hearing, Incoming, Nic, Queue, SendError};
use pvio_sim::kill::Mortal;
use pvio_sim::{LocalDomain, Menu, Sim, WaitState};
use pvio_xenbus::driver::{FrontendDriver, Life};
use pvio_xenbus::handshake::common::{DeviceAddr, DeviceClass, frontend_root, list_frontends};
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Store};
use std::cell::RefCell;
use std::rc::Rc;

pub type SharedLedger = Rc<RefCell<Ledger>>;

pub struct Guest {
    addr: DeviceAddr,
    domain: LocalDomain,
    xs: Mortal<LocalClient>,
    driver: Option<FrontendDriver<Nic<Mortal<LocalDomain>>>>,
    wait: WaitState,
    /// Largest number of queues that it requests.
    queues: usize,
    session: u32,
    unpublished: bool,
    closing: bool,
    sends: SharedLedger,
    receives: SharedLedger,
}

const BUS: &str = "bus";
/// Headroom values that it requests, in bytes.
const ROOMS: [u16; 3] = [0, 256, 2048];

impl Guest {
    pub fn boot(
        domain: LocalDomain,
        store: &Rc<RefCell<Store>>,
        addr: DeviceAddr,
        [sends, receives]: [SharedLedger; 2],
        queues: usize,
    ) -> Self {
        let mut xs = Mortal(LocalClient::connect(store, domain.id()));
        xs.watch(&frontend_root(DeviceClass::Vif, domain.id()), BUS).expect("the first watch");
        let (wait, session) = (WaitState::Asleep, 0);
        let (driver, unpublished, closing) = (None, false, false);
        Self {
            addr,
            domain,
            xs,
            driver,
            wait,
            queues,
            session,
            unpublished,
            closing,
            sends,
            receives,
        }
    }

    pub fn id(&self) -> DomId {
        self.domain.id()
    }

    pub fn has_driver(&self) -> bool {
        self.driver.is_some()
    }

    /// Returns how often its NIC was connected.
    pub fn sessions(&self) -> u32 {
        self.driver.as_ref().map_or(0, |d| d.class().sessions())
    }

    pub fn is_connected(&self) -> bool {
        !self.closing && self.driver.as_ref().is_some_and(|d| d.class().is_connected())
    }

    pub fn holds(&self) -> String {
        let d = &self.domain;
        let (pages, grants, ports) = (d.pages_allocated(), d.pages_granted(), d.ports_open());
        format!("{pages} pages allocated, {grants} granted, {ports} ports open")
    }

    pub fn menu(&mut self, store: &Store, close: u32, menu: &mut Menu<Do>) {
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
            menu.may(close, || Do::Guest(me, GuestDo::Close));
        }
        let sessions = driver.class().sessions();
        if driver.class().has_news() {
            menu.must(50, Do::Guest(me, GuestDo::Tell));
        }
        if driver.class().is_connected() && !self.closing {
            menu.may(10, || Do::Guest(me, GuestDo::Change));
        }
        // Access to the queues also advances outstanding requests for settings.
        let nic = driver.class_mut();
        if nic.queue().is_none() {
            return;
        }
        if self.session != sessions {
            (self.session, self.wait, self.unpublished) = (sessions, WaitState::Asleep, false);
        }
        if self.wait != WaitState::Asleep || nic.channels().any(|channel| channel.0.is_pending()) {
            menu.must(200, Do::Guest(me, GuestDo::Work));
        }
        if self.unpublished {
            menu.must(100, Do::Guest(me, GuestDo::Publish));
        }
        if !self.closing {
            menu.may(150, || Do::Guest(me, GuestDo::Send));
        }
    }

    pub fn act(&mut self, action: GuestDo, sim: &mut Sim) {
        match action {
            GuestDo::Event => self.event(sim),
            GuestDo::Spurious => self.step(sim),
            GuestDo::Work => self.work(sim),
            GuestDo::Send => self.send(sim),
            GuestDo::Publish => self.publish(),
            GuestDo::Change => self.change(sim),
            GuestDo::Tell => self.step(sim),
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
        }
    }

    fn event(&mut self, sim: &mut Sim) {
        let Some(event) = self.xs.poll_event().expect("xenstore") else { return };
        if self.driver.is_some() {
            return self.step(sim);
        }
        let me = self.id();
        let there = list_frontends(&mut self.xs, DeviceClass::Vif, me).expect("xenstore");
        if event.token == BUS && there.contains(&self.addr.index) {
            self.new_driver(sim);
        }
    }

    fn new_driver(&mut self, sim: &mut Sim) {
        let nic =
            Nic::new(Mortal(self.domain.clone())).choosing_groups().with_headroom(sim.pick(&ROOMS));
        let nic = nic.with_queues(1 + sim.index(self.queues) as u32);
        self.driver = Some(FrontendDriver::new(self.addr, nic));
        self.step(sim);
    }

    fn drop_driver(&mut self) {
        self.driver = None;
        (self.closing, self.unpublished, self.session) = (false, false, 0);
    }

    fn step(&mut self, sim: &mut Sim) {
        let Some(driver) = &mut self.driver else { return };
        let life = driver.step(&mut self.xs);
        sim.note(format_args!("  frontend {}: {life:?}, {}", self.domain.id(), driver.state()));
        if life.expect("a frontend's step needs nothing but xenstore") == Life::Gone {
            self.drop_driver();
        }
    }

    fn queues(&mut self) -> &mut [Queue<Mortal<LocalDomain>>] {
        let driver = self.driver.as_mut().expect("action is available only if the device exists");
        driver.class_mut().queues()
    }

    fn work(&mut self, sim: &mut Sim) {
        let receives = Rc::clone(&self.receives);
        let wait = self.wait;
        let nic = self
            .driver
            .as_mut()
            .expect("action is available only if the device exists")
            .class_mut();
        let next = match wait {
            WaitState::Asleep => {
                nic.channels().for_each(|channel| assert!(channel.take().is_ok()));
                WaitState::Polling
            }
            WaitState::Polling => {
                let queues = nic.queues();
                let (count, mut busy) = (queues.len(), false);
                for (number, queue) in queues.iter_mut().enumerate() {
                    let mut left = 1 + sim.below(32);
                    let take = |packet: Incoming<'_>| {
                        assert!(ROOMS.map(usize::from).contains(&packet.headroom()));
                        receives.borrow_mut().received(packet.frame(), number, count);
                    };
                    while left > 0
                        && queue.receive_packet(take).expect("an honest backend").is_some()
                    {
                        left -= 1;
                    }
                    queue.publish().expect("an honest backend");
                    busy |= left == 0;
                }
                if busy { WaitState::Polling } else { WaitState::Checking }
            }
            WaitState::Checking if nic.final_check().expect("an honest backend") => {
                WaitState::Polling
            }
            WaitState::Checking => WaitState::Asleep,
        };
        self.wait = next;
    }

    fn send(&mut self, sim: &mut Sim) {
        for _ in 0..1 + sim.below(8) {
            let most = if sim.one_in(10) { 65_535 } else { 2000 };
            let len = LEAST + sim.below((most - LEAST) as u64 + 1) as usize;
            let queues = self.queues().len();
            if !self.send_one(sim.index(queues), len) {
                break;
            }
        }
        if self.unpublished && !sim.one_in(3) {
            self.publish();
        }
    }

    /// Sends a frame. Returns whether there was space for it.
    fn send_one(&mut self, lane: usize, len: usize) -> bool {
        let sends = Rc::clone(&self.sends);
        if !sends.borrow().has_room(len) {
            return false;
        }
        let frame = sends.borrow().frame(lane, len);
        match self.queues()[lane].send(&frame, Checksum::Unknown) {
            Ok(()) => sends.borrow_mut().sent(lane, len),
            Err(SendError::Full) => {
                // It has to request a notification before it sleeps again.
                self.wait = WaitState::Checking;
                return false;
            }
            Err(error) => panic!("a frame of {len} bytes is not sent: {error}"),
        }
        self.unpublished = true;
        true
    }

    /// Sends a frame in every queue.
    pub fn send_by_every_queue(&mut self) {
        for lane in 0..LANES {
            if self.is_connected() && lane < self.queues().len() {
                assert!(self.send_one(lane, LEAST), "frame was not sent");
                self.publish();
            }
        }
    }

    fn change(&mut self, sim: &mut Sim) {
        let driver = self.driver.as_mut().expect("action is available only if the device exists");
        let nic = driver.class_mut();
        let group = [1, 0, 0x5e, 0, 0, sim.below(70) as u8];
        match sim.below(8) {
            0..2 => nic.ask_headroom(sim.pick(&ROOMS)),
            2 => nic.filter_groups(sim.one_in(2)),
            3..6 => match nic.join(group) {
                Ok(()) | Err(GroupError::Full) => {}
                Err(error) => panic!("{error}"),
            },
            6 => drop(nic.leave(group)),
            _ => nic.unstage(),
        }
    }

    /// # Panics
    /// If a setting was not sent to a connected backend, or is not in force.
    pub fn assert_is_told(&self) {
        if !self.is_connected() {
            return;
        }
        let driver = self.driver.as_ref().expect("it is connected");
        let nic = driver.class();
        assert_eq!((nic.has_news(), nic.fault()), (false, None));
        assert!(nic.is_settled() && nic.groups().are_sent());
        assert_ne!(nic.hearing(), Hearing::Overflowed);
        assert!(ROOMS.contains(&nic.headroom_given()));
        assert_eq!(driver.state(), XenbusState::Connected);
    }

    fn publish(&mut self) {
        self.unpublished = false;
        for queue in self.queues() {
            queue.publish().expect("an honest backend");
        }
    }
}
