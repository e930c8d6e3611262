//! Two guests whose NICs are connected by a cable in a driver domain, and a toolstack.

use crate::net::actions::{DaemonDo, Do, Flaw, GuestDo};
use crate::net::daemon::{Daemon, Records};
use crate::net::guest::{Guest, SharedLedger};
use crate::net::wire::{CableEnd, LANES, cable};
use pvio_grant_table::DomId;
use pvio_sim::{LocalMachine, Menu, Sim, World, kill};
use pvio_xenbus::XenbusState;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, create_domain, read_state, remove_device, remove_domain,
    request_removal,
};
use pvio_xenbus::handshake::vif::{Mac, ToolstackBack, create_backend, create_device};
use pvio_xenstored::{LocalClient, Quota, Store};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const DRIVER: DomId = DomId(1);
const GUESTS: [DomId; 2] = [DomId(10), DomId(11)];

/// Enabled faults of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub crash: bool,
    pub kill_driver: bool,
    pub kill_guest: bool,
    pub remove: bool,
    pub close: bool,
    /// Weight of each fault; a worker's step has 200.
    pub often: u32,
    pub flaw: Flaw,
    /// An action of one participant is interrupted by others: at one of this many of its accesses. 0 if
    /// never.
    pub interrupts: u64,
    /// Largest number of queues of a NIC; 0 means 1.
    pub queues: usize,
}

impl Faults {
    pub fn some(sim: &mut Sim) -> Self {
        let queues = 1 + sim.index(LANES);
        let mut coin = || sim.one_in(2);
        Self {
            crash: coin(),
            kill_driver: coin(),
            kill_guest: coin(),
            remove: coin(),
            close: coin(),
            often: sim.pick(&[1, 3, 10]),
            flaw: Flaw::None,
            interrupts: sim.pick(&[0, 0, 8, 32]),
            queues,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Absent,
    Up,
    Removing,
}

struct Nic {
    addr: DeviceAddr,
    phase: Phase,
    guest: Option<Guest>,
}

pub struct NetWorld {
    machine: LocalMachine,
    store: Rc<RefCell<Store>>,
    tool: LocalClient,
    nics: Vec<Nic>,
    ledgers: [SharedLedger; 2],
    ports: Rc<BTreeMap<DomId, CableEnd>>,
    daemon: Option<Daemon>,
    records: Records,
    driver_alive: bool,
    faults: Faults,
    ending: bool,
    /// Whether no new work is started.
    calm: bool,
    /// Number of sessions of each guest's driver.
    sessions: [u32; 2],
}

impl NetWorld {
    pub fn new(faults: Faults) -> Self {
        let store = Rc::new(RefCell::new(Store::new(Quota::default())));
        let nic = |front: DomId| Nic {
            addr: DeviceAddr::new(BackendKind::Vif, DRIVER, front, 0),
            phase: Phase::Absent,
            guest: None,
        };
        let mut world = Self {
            machine: LocalMachine::new(),
            tool: LocalClient::connect(&store, DomId::DOM0),
            store,
            nics: GUESTS.map(nic).into(),
            ledgers: <[SharedLedger; 2]>::default(),
            ports: Rc::new(GUESTS.into_iter().zip(cable()).collect()),
            daemon: None,
            records: Records::default(),
            driver_alive: true,
            faults,
            ending: false,
            calm: false,
            sessions: [0; 2],
        };
        world.build(DRIVER);
        (0..2).for_each(|i| world.build_guest(i));
        world
    }

    /// Returns the number of frames that arrived, in both directions.
    pub fn received(&self) -> u64 {
        self.ledgers.iter().map(|l| l.borrow().received).sum()
    }

    /// # Panics
    /// If a guest's settings are not in force in its backend.
    pub fn assert_all_is_told(&self) {
        self.nics.iter().filter_map(|nic| nic.guest.as_ref()).for_each(Guest::assert_is_told);
    }

    /// Sends one more frame in every queue of every guest.
    pub fn send_by_every_queue(&mut self) {
        let guests = self.nics.iter_mut().filter_map(|nic| nic.guest.as_mut());
        guests.for_each(Guest::send_by_every_queue);
    }

    pub fn end(&mut self) {
        self.ending = true;
        (0..self.nics.len()).for_each(|i| self.remove(i));
    }

    /// # Panics
    /// If any resource is left that should have been released.
    pub fn assert_nothing_is_left(&self) {
        let daemon = self.daemon.as_ref().expect("the daemon runs");
        assert_eq!(daemon.holds(), "0 pages mapped, 0 ports open");
        for nic in &self.nics {
            let guest = nic.guest.as_ref().expect("the guest lives");
            assert_eq!(guest.holds(), "0 pages allocated, 0 granted, 0 ports open");
        }
        self.store.borrow().check().expect("xenstore is consistent");
    }

    fn build(&mut self, id: DomId) {
        self.store.borrow_mut().introduce(id);
        create_domain(&mut self.tool, id, "simulated").expect("dom0 has permission");
    }

    fn build_guest(&mut self, i: usize) {
        let addr = self.nics[i].addr;
        self.build(addr.front);
        let ledgers = [i, 1 - i].map(|l| Rc::clone(&self.ledgers[l]));
        let domain = self.machine.domain(addr.front);
        let queues = self.faults.queues.max(1);
        self.nics[i].guest = Some(Guest::boot(domain, &self.store, addr, ledgers, queues));
    }

    fn kill(&mut self, id: DomId) {
        self.machine.kill(id);
        self.store.borrow_mut().release(id);
        remove_domain(&mut self.tool, id).expect("dom0 has permission");
    }

    /// Permits the loss of frames in flight, since a participant that carried them has ended.
    fn forgive(&self) {
        self.ledgers.iter().for_each(|l| l.borrow_mut().forgive());
    }

    /// Ends the daemon's process. Frames that it had sent and not recorded as sent are sent again.
    fn crash(&mut self) {
        self.daemon.take().expect("action is available only if it runs").crash();
        self.ledgers.iter().for_each(|l| l.borrow_mut().may_repeat());
        self.forgive();
    }

    fn words(&self, i: usize) -> (DeviceAddr, ToolstackBack) {
        let addr = self.nics[i].addr;
        (addr, ToolstackBack::new(addr, Mac([0, 0x16, 0x3e, 0, 0, i as u8])))
    }

    fn remove(&mut self, i: usize) {
        request_removal(&mut self.tool, self.nics[i].addr).expect("dom0 has permission");
        if self.nics[i].phase == Phase::Up {
            self.nics[i].phase = Phase::Removing;
        }
    }

    /// Whether the toolstack can remove the device, as libxl decides it.
    fn is_over(&mut self, addr: DeviceAddr) -> bool {
        let back = read_state(&mut self.tool, &addr.backend_path()).expect("dom0 has permission");
        matches!(back, XenbusState::Unknown | XenbusState::Closed)
    }

    fn is_free(&self, i: usize) -> bool {
        let nic = &self.nics[i];
        let forgotten = self.daemon.as_ref().is_none_or(|d| !d.serves(nic.addr));
        let dropped = nic.guest.as_ref().is_some_and(|g| !g.has_driver());
        self.driver_alive && forgotten && dropped
    }

    fn is_connected(&self) -> bool {
        self.nics.iter().all(|n| n.guest.as_ref().is_some_and(Guest::is_connected))
    }
}

/// Actions that other participants interrupt.
impl NetWorld {
    /// Adds what a guest, and the toolstack, may do at any time.
    fn menu_of_guest(&mut self, i: usize, menu: &mut Menu<Do>) {
        let (store, faults) = (Rc::clone(&self.store), self.faults);
        let often = |fault: bool| if fault { faults.often } else { 0 };
        if let Some(guest) = &mut self.nics[i].guest {
            guest.menu(&store.borrow(), often(faults.close), menu);
            menu.may(often(faults.kill_guest), || Do::KillGuest(i));
        }
        if self.nics[i].phase == Phase::Up {
            menu.may(often(faults.remove), || Do::Remove(i));
        }
    }

    fn kill_guest(&mut self, i: usize) {
        self.kill(self.nics[i].addr.front);
        self.nics[i].guest = None;
        self.remove(i);
    }

    fn act_daemon(&mut self, action: &DaemonDo, sim: &mut Sim) {
        // Sometimes it is killed during an action.
        let dies = self.faults.crash && sim.one_in(400 / u64::from(self.faults.often.max(1)));
        let after = dies.then(|| match sim.below(100) as usize {
            80.. => kill::BEFORE_NOTIFY,
            moment => moment,
        });
        let mut daemon = self.daemon.take().expect("action is available only if it runs");
        // A step of the handshake is not interrupted: a backend that reads the keys of a frontend while
        // it reconnects sees those of two sessions, and closes the device.
        let whole = !matches!(action, DaemonDo::Work(..));
        let mut inside = sim.handle();
        let peers = || {
            if whole {
                return;
            }
            self.interrupt(&mut inside, |world, menu| {
                (0..world.nics.len()).for_each(|i| world.menu_of_guest(i, menu));
            });
        };
        let alive = kill::interrupted(peers, || daemon.act_or_die(action, after, sim));
        self.daemon = Some(daemon);
        if !alive {
            sim.note(format_args!("  the daemon dies in the middle of that"));
            self.crash();
        }
    }

    fn act_guest(&mut self, id: DomId, action: GuestDo, sim: &mut Sim) {
        let i = self.nics.iter().position(|nic| nic.addr.front == id).expect("it is a guest");
        let mut guest = self.nics[i].guest.take().expect("action is available only if alive");
        let often = u64::from(self.faults.often.max(1));
        let dies = self.faults.kill_guest && sim.one_in(800 / often);
        let kill_at = if dies { sim.below(60) as usize } else { usize::MAX };
        let mut inside = sim.handle();
        let peers = || {
            self.interrupt(&mut inside, |world, menu| {
                let store = Rc::clone(&world.store);
                if let Some(daemon) = &mut world.daemon {
                    daemon.menu(&store.borrow(), menu);
                }
                (0..world.nics.len())
                    .filter(|j| *j != i)
                    .for_each(|j| world.menu_of_guest(j, menu));
            });
        };
        let (done, moments) =
            kill::interrupted(peers, || kill::run(kill_at, || guest.act(action, sim)));
        self.nics[i].guest = Some(guest);
        if done.is_none() {
            sim.note(format_args!("  the guest is killed after {moments} stores and calls"));
            self.kill_guest(i);
        }
    }

    /// Permits the loss of frames if a session has ended, and perhaps another one started, inside of an
    /// action. The guest whose action is interrupted is not there.
    fn notice_lost_sessions(&mut self) {
        let mut lost = false;
        for (guest, seen) in self.nics.iter().zip(&mut self.sessions) {
            let Some(guest) = &guest.guest else { continue };
            lost |= !guest.is_connected() || *seen != guest.sessions();
            *seen = guest.sessions();
        }
        if lost {
            self.forgive();
        }
    }

    /// Executes, now and then, one of the actions of `list`.
    fn interrupt(&mut self, sim: &mut Sim, list: impl FnOnce(&mut Self, &mut Menu<Do>)) {
        if self.faults.interrupts == 0 || !sim.one_in(self.faults.interrupts) {
            return;
        }
        self.notice_lost_sessions();
        let mut menu = Menu::new(self.calm);
        list(self, &mut menu);
        if let Some(action) = menu.choose(sim) {
            sim.note(format_args!("  meanwhile {action:?}"));
            self.act(action, sim);
        }
    }
}

impl World for NetWorld {
    type Action = Do;

    fn menu(&mut self, menu: &mut Menu<Do>) {
        self.calm = menu.is_calm();
        self.notice_lost_sessions();
        if !self.is_connected() {
            self.forgive();
        }
        let (store, faults) = (Rc::clone(&self.store), self.faults);
        let often = |fault: bool| if fault { faults.often } else { 0 };
        if self.daemon.is_some() {
            menu.may(often(faults.crash), || Do::CrashDaemon);
        }
        if self.driver_alive {
            menu.may(often(faults.kill_driver), || Do::KillDriver);
        }
        for i in 0..self.nics.len() {
            let (addr, phase) = (self.nics[i].addr, self.nics[i].phase);
            self.menu_of_guest(i, menu);
            if self.nics[i].guest.is_none() && phase == Phase::Absent {
                menu.must(30, Do::RebuildGuest(i));
            }
            match phase {
                Phase::Removing if self.is_over(addr) => menu.must(30, Do::Finish(i)),
                Phase::Absent if !self.ending && self.is_free(i) => menu.must(30, Do::Create(i)),
                _ => {}
            }
        }
        // After the guests, whose steps may create work for it.
        match &mut self.daemon {
            Some(daemon) => daemon.menu(&store.borrow(), menu),
            None if self.driver_alive => menu.must(30, Do::StartDaemon),
            None => menu.must(30, Do::RebuildDriver),
        }
    }

    fn act(&mut self, action: Do, sim: &mut Sim) {
        match action {
            Do::Daemon(action) => self.act_daemon(&action, sim),
            Do::Guest(id, action) => self.act_guest(id, action, sim),
            Do::CrashDaemon => {
                self.crash();
            }
            Do::StartDaemon => {
                let domain = self.machine.domain(DRIVER);
                let lasting = (Rc::clone(&self.ports), Rc::clone(&self.records));
                // The next daemon may offer fewer queues than the one before, or more.
                let how = (self.faults.flaw, 1 + sim.index(LANES) as u32);
                self.daemon = Some(Daemon::start(domain, &self.store, lasting, how));
            }
            Do::KillDriver => {
                self.kill(DRIVER);
                self.driver_alive = false;
                self.records.borrow_mut().clear();
                if let Some(daemon) = self.daemon.take() {
                    daemon.crash();
                }
                self.forgive();
            }
            Do::RebuildDriver => {
                self.driver_alive = true;
                self.build(DRIVER);
                for i in 0..self.nics.len() {
                    let (addr, words) = self.words(i);
                    if self.nics[i].phase == Phase::Up {
                        create_backend(&mut self.tool, addr, &words).expect("dom0 has permission");
                    }
                }
            }
            Do::KillGuest(i) => self.kill_guest(i),
            Do::RebuildGuest(i) => self.build_guest(i),
            Do::Create(i) => {
                let (addr, words) = self.words(i);
                create_device(&mut self.tool, addr, &words).expect("dom0 has permission");
                self.nics[i].phase = Phase::Up;
            }
            Do::Remove(i) => self.remove(i),
            Do::Finish(i) => {
                remove_device(&mut self.tool, self.nics[i].addr).expect("dom0 has permission");
                self.nics[i].phase = Phase::Absent;
            }
        }
    }

    fn waiting(&self) -> Option<String> {
        let late = |nic: &Nic| {
            let id = nic.addr.front;
            let Some(guest) = &nic.guest else { return Some(format!("guest {id} is dead")) };
            match nic.phase {
                Phase::Up if guest.is_connected() => None,
                Phase::Absent if self.ending => None,
                phase => Some(format!("the NIC of guest {id} is {phase:?}, and not connected")),
            }
        };
        let flying = self.ledgers.each_ref().map(|l| l.borrow().flying());
        let frames = (flying != [[0; LANES]; 2]).then(|| format!("frames in transit: {flying:?}"));
        self.nics.iter().find_map(late).or(frames.filter(|_| self.is_connected()))
    }
}
