//! Domains, their disks, the toolstack, and the possible faults.

use crate::disk::actions::{DaemonDo, Do, GuestDo, ToolDo};
use crate::disk::choices::{Faults, Kind, QUEUES_OFFERED};
use crate::disk::daemon::{Daemon, Records};
use crate::disk::guest::Guest;
use crate::disk::hostile_back::HostileBack;
use crate::disk::hostile_guest::HostileGuest;
use crate::disk::medium::{Medium, SharedMedium};
use crate::disk::model::Model;
use pvio_blkback::Config;
use pvio_grant_table::DomId;
use pvio_sim::{LocalMachine, Menu, Sim, World, kill};
use pvio_xenbus::XenbusState;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, create_domain, read_error, read_state, remove_device, remove_domain,
    request_removal,
};
use pvio_xenbus::handshake::vbd::{ToolstackBack, create_backend, create_device};
use pvio_xenstored::{LocalClient, Quota, Store};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Id of the driver domain.
pub const DRIVER: DomId = DomId(1);
/// Id of the hostile driver domain.
pub const LIAR: DomId = DomId(2);
/// Id of the first guest.
pub const GUEST: DomId = DomId(10);
const SECTORS: usize = 256;

/// Progress of the toolstack with a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Absent,
    Up,
    Removing,
}

struct Disk {
    kind: Kind,
    addr: DeviceAddr,
    phase: Phase,
    medium: SharedMedium,
    model: Rc<RefCell<Model>>,
    guest: Option<Guest>,
}

/// One driver domain, and guests with one disk each.
pub struct DiskWorld {
    machine: LocalMachine,
    store: Rc<RefCell<Store>>,
    tool: LocalClient,
    media: Rc<BTreeMap<String, SharedMedium>>,
    /// In-flight records of the driver domain.
    records: Records,
    disks: Vec<Disk>,
    daemon: Option<Daemon>,
    hostile_guest: Option<HostileGuest>,
    hostile_back: Option<HostileBack>,
    driver_alive: bool,
    faults: Faults,
    /// Whether no more disks are created.
    ending: bool,
    /// Whether no new work is started.
    calm: bool,
    /// Number of responses that guests checked before they were destroyed.
    checked: u64,
}

impl DiskWorld {
    pub fn new(sim: &mut Sim, disks: &[Kind], faults: Faults) -> Self {
        let store = Rc::new(RefCell::new(Store::new(Quota::default())));
        let machine = LocalMachine::new();
        let mut media = BTreeMap::new();
        let disks: Vec<Disk> = disks
            .iter()
            .enumerate()
            .map(|(i, &kind)| {
                let medium = Medium::new(sim, SECTORS);
                media.insert(format!("disk{i}"), Rc::clone(&medium));
                let front = DomId(GUEST.0 + i as u16);
                let back = if kind == Kind::HostileBack { LIAR } else { DRIVER };
                Disk {
                    kind,
                    addr: DeviceAddr::new(BackendKind::Vbd, back, front, 51712 + 16 * i as u32),
                    phase: Phase::Absent,
                    model: Rc::new(RefCell::new(Model::new(SECTORS as u64))),
                    medium,
                    guest: None,
                }
            })
            .collect();
        let mut world = Self {
            tool: LocalClient::connect(&store, DomId::DOM0),
            machine,
            store,
            media: Rc::new(media),
            records: Records::default(),
            disks,
            daemon: None,
            hostile_guest: None,
            hostile_back: None,
            driver_alive: true,
            faults,
            ending: false,
            calm: false,
            checked: 0,
        };
        world.build(DRIVER);
        if let Some(disk) = world.disks.iter().find(|d| d.kind == Kind::HostileBack) {
            let addr = disk.addr;
            world.build(LIAR);
            let domain = world.machine.domain(LIAR);
            world.hostile_back = Some(HostileBack::start(domain, &world.store, addr));
        }
        for i in 0..world.disks.len() {
            world.build_guest(i);
        }
        world
    }

    /// Removes every disk in the regular way.
    pub fn end(&mut self) {
        self.ending = true;
        for i in 0..self.disks.len() {
            self.tool(i, &ToolDo::Remove);
        }
        if self.hostile_back.take().is_some() {
            self.kill(LIAR);
        }
    }

    /// Submits one more request in every queue of every honest disk.
    pub fn flush_by_every_queue(&mut self, sim: &mut Sim) {
        let honest = self.disks.iter_mut().filter(|disk| disk.kind == Kind::Honest);
        honest.filter_map(|disk| disk.guest.as_mut()).for_each(|g| g.flush_by_every_queue(sim));
    }

    /// # Panics
    /// If a guest's driver holds more memory than a few sessions need.
    pub fn assert_memory_is_bounded(&self) {
        // A ring of two pages, and for each of its slots 24 pages and one for the table.
        let most = 3 * QUEUES_OFFERED * (2 + 64 * (24 + 1));
        for guest in self.disks.iter().filter_map(|d| d.guest.as_ref()) {
            assert!(guest.pages() <= most, "guest {} has {} pages", guest.id(), guest.pages());
        }
    }

    /// Returns the codes in the error nodes of both ends of a disk.
    pub fn errors(&mut self, i: usize) -> Vec<String> {
        let addr = self.disks[i].addr;
        let ends = [addr.backend_path(), addr.frontend_path()];
        let mut told = |end: &String| read_error(&mut self.tool, end).expect("dom0 has permission");
        let code = |text: String| text.split([' ', ':']).nth(1).unwrap_or_default().to_string();
        ends.iter().filter_map(&mut told).map(code).collect()
    }

    /// # Panics
    /// If any resource is left that should have been released.
    pub fn assert_nothing_is_left(&self) {
        let daemon = self.daemon.as_ref().expect("the daemon runs");
        assert_eq!(daemon.holds(), "0 pages mapped, 0 ports open");
        for disk in &self.disks {
            assert!(!daemon.serves(disk.addr));
            if disk.kind == Kind::HostileGuest {
                continue;
            }
            let guest = disk.guest.as_ref().expect("the guest lives");
            assert_eq!(guest.holds(), "0 pages allocated, 0 granted, 0 ports open");
            assert!(!guest.has_driver());
        }
        self.store.borrow().check().expect("xenstore is consistent");
    }

    /// Returns the number of checked responses.
    pub fn checked(&self) -> u64 {
        let alive = self.disks.iter().filter_map(|d| d.guest.as_ref());
        self.checked + alive.map(|g| g.checked).sum::<u64>()
    }

    fn build(&mut self, id: DomId) {
        self.store.borrow_mut().introduce(id);
        create_domain(&mut self.tool, id, "simulated").expect("dom0 has permission");
    }

    fn build_guest(&mut self, i: usize) {
        let id = self.disks[i].addr.front;
        self.build(id);
        let disk = &mut self.disks[i];
        let domain = self.machine.domain(id);
        if disk.kind == Kind::HostileGuest {
            self.hostile_guest = Some(HostileGuest::boot(domain, &self.store, disk.addr));
            return;
        }
        let (model, trusting) = (Rc::clone(&disk.model), disk.kind == Kind::Honest);
        let how = (self.faults.queues.max(1), trusting);
        disk.guest = Some(Guest::boot(domain, &self.store, disk.addr, model, how));
    }

    fn kill(&mut self, id: DomId) {
        self.machine.kill(id);
        self.store.borrow_mut().release(id);
        remove_domain(&mut self.tool, id).expect("dom0 has permission");
    }

    fn kill_guest(&mut self, i: usize) {
        self.kill(self.disks[i].addr.front);
        if self.disks[i].kind == Kind::HostileGuest {
            self.hostile_guest = None;
        }
        if let Some(mut guest) = self.disks[i].guest.take() {
            guest.forget_requests();
            self.checked += guest.checked;
        }
        if self.disks[i].phase == Phase::Up {
            self.tool(i, &ToolDo::Remove);
        }
    }

    fn kill_driver(&mut self) {
        self.kill(DRIVER);
        self.driver_alive = false;
        self.records.borrow_mut().clear();
        if let Some(daemon) = self.daemon.take() {
            daemon.crash();
        }
        for disk in self.disks.iter_mut().filter(|d| d.kind != Kind::HostileBack) {
            disk.medium.borrow_mut().lose_cache();
            disk.model.borrow_mut().cut(disk.guest.as_ref().map_or(0, Guest::sessions));
        }
    }

    fn rebuild_driver(&mut self) {
        self.driver_alive = true;
        self.build(DRIVER);
        for i in 0..self.disks.len() {
            if self.disks[i].phase == Phase::Up && self.disks[i].kind != Kind::HostileBack {
                let (addr, words) = self.words(i);
                create_backend(&mut self.tool, addr, &words).expect("the frontend is there");
            }
        }
    }

    fn start_daemon(&mut self, sim: &mut Sim) {
        let (domain, media) = (self.machine.domain(DRIVER), Rc::clone(&self.media));
        let least = self.faults.queues.max(1) as u32;
        // The next daemon may offer less than the one before, or more.
        let config = Config {
            policy: self.faults.policy,
            max_indirect_segments: sim.pick(&[0, 12, 256]),
            max_ring_page_order: sim.pick(&[0, 4]),
            // Never fewer queues than a guest uses: requests in a missing queue would never
            // complete.
            max_queues: least + sim.below(u64::from(QUEUES_OFFERED as u32 - least) + 1) as u32,
        };
        let flaw = self.faults.flaw;
        let records = self.faults.resume.then(|| Rc::clone(&self.records));
        self.daemon = Some(Daemon::start(domain, &self.store, media, records, flaw, config));
    }

    fn words(&self, i: usize) -> (DeviceAddr, ToolstackBack) {
        let addr = self.disks[i].addr;
        (addr, ToolstackBack::new(addr, &format!("disk{i}")))
    }

    fn tool(&mut self, i: usize, action: &ToolDo) {
        let (addr, words) = self.words(i);
        let done = match action {
            ToolDo::Create => create_device(&mut self.tool, addr, &words),
            ToolDo::Remove => request_removal(&mut self.tool, addr),
            ToolDo::Finish => remove_device(&mut self.tool, addr),
        };
        done.expect("dom0 has permission");
        self.disks[i].phase = match action {
            ToolDo::Create => Phase::Up,
            ToolDo::Remove if self.disks[i].phase == Phase::Absent => Phase::Absent,
            ToolDo::Remove => Phase::Removing,
            ToolDo::Finish => Phase::Absent,
        };
    }

    /// Whether the toolstack can remove the device, as libxl decides it: the backend is closed, or no
    /// longer exists. It does not wait for hostile participants.
    fn is_over(&mut self, i: usize) -> bool {
        let Disk { kind, addr, .. } = self.disks[i];
        if kind != Kind::Honest {
            return true;
        }
        let back = read_state(&mut self.tool, &addr.backend_path()).expect("dom0 has permission");
        matches!(back, XenbusState::Unknown | XenbusState::Closed)
    }

    /// Whether a disk can be created: neither end has state of an earlier one.
    fn is_free(&self, i: usize) -> bool {
        let disk = &self.disks[i];
        let forgotten = self.daemon.as_ref().is_none_or(|d| !d.serves(disk.addr));
        let dropped = disk.guest.as_ref().is_none_or(|g| !g.has_driver());
        let back = if disk.kind == Kind::HostileBack { true } else { self.driver_alive };
        back && self.is_alive(i) && forgotten && dropped
    }

    fn is_alive(&self, i: usize) -> bool {
        match self.disks[i].kind {
            Kind::HostileGuest => self.hostile_guest.is_some(),
            _ => self.disks[i].guest.is_some(),
        }
    }
}

/// Actions that other participants interrupt.
impl DiskWorld {
    /// Adds what a guest, and the toolstack, may do at any time.
    fn menu_of_guest(&mut self, i: usize, menu: &mut Menu<Do>) {
        let (store, often) = (Rc::clone(&self.store), self.faults.often);
        let Disk { phase, kind, .. } = self.disks[i];
        if let Some(guest) = &mut self.disks[i].guest {
            let closing = self.faults.close && kind != Kind::HostileBack;
            guest.menu(&store.borrow(), if closing { often } else { 0 }, menu);
        }
        if self.is_alive(i) && self.faults.kill_guest {
            menu.may(often, || Do::KillGuest(i));
        }
        match (kind, &self.hostile_guest, &self.hostile_back) {
            (Kind::HostileGuest, Some(guest), _) => guest.menu(menu),
            (Kind::HostileBack, _, Some(back)) => back.menu(menu),
            _ => {}
        }
        if phase == Phase::Up && self.faults.remove && kind != Kind::HostileBack {
            menu.may(often, || Do::Tool(i, ToolDo::Remove));
        }
    }

    fn act_daemon(&mut self, action: DaemonDo, sim: &mut Sim) {
        let mut daemon = self.daemon.take().expect("action is available only if it runs");
        let killer = self.faults.crash.then_some(self.faults.often);
        // A step of the handshake is not interrupted: a backend that reads the keys of a frontend while
        // it reconnects sees those of two sessions, and closes the device.
        let whole = !matches!(action, DaemonDo::Work(..));
        let mut inside = sim.handle();
        let peers = || {
            if whole {
                return;
            }
            self.interrupt(&mut inside, |world, menu| {
                (0..world.disks.len()).for_each(|i| world.menu_of_guest(i, menu));
            })
        };
        if kill::interrupted(peers, || daemon.act(action, killer, sim)) {
            self.daemon = Some(daemon);
        } else {
            daemon.crash();
        }
    }

    fn act_guest(&mut self, id: DomId, action: GuestDo, sim: &mut Sim) {
        let i = self.disks.iter().position(|d| d.addr.front == id).expect("it is a guest");
        let mut guest = self.disks[i].guest.take().expect("action is available only if alive");
        let dies = self.faults.kill_guest && sim.one_in(800 / u64::from(self.faults.often));
        let kill_at = if dies { sim.below(60) as usize } else { usize::MAX };
        let mut inside = sim.handle();
        let peers = || {
            self.interrupt(&mut inside, |world, menu| {
                let store = Rc::clone(&world.store);
                if let Some(daemon) = &mut world.daemon {
                    daemon.menu(&store.borrow(), menu);
                }
                (0..world.disks.len())
                    .filter(|j| *j != i)
                    .for_each(|j| world.menu_of_guest(j, menu));
                if let (Kind::HostileBack, Some(back)) = (world.disks[i].kind, &world.hostile_back)
                {
                    back.menu(menu);
                }
            })
        };
        let (done, moments) =
            kill::interrupted(peers, || kill::run(kill_at, || guest.act(action, sim)));
        self.disks[i].guest = Some(guest);
        if done.is_none() {
            sim.note(format_args!("  the guest is killed after {moments} stores and calls"));
            self.kill_guest(i);
        }
    }

    /// Executes, now and then, one of the actions of `list`.
    fn interrupt(&mut self, sim: &mut Sim, list: impl FnOnce(&mut Self, &mut Menu<Do>)) {
        if self.faults.interrupts == 0 || !sim.one_in(self.faults.interrupts) {
            return;
        }
        let mut menu = Menu::new(self.calm);
        list(self, &mut menu);
        if let Some(action) = menu.choose(sim) {
            sim.note(format_args!("  meanwhile {action:?}"));
            self.act(action, sim);
        }
    }
}

impl World for DiskWorld {
    type Action = Do;

    fn menu(&mut self, menu: &mut Menu<Do>) {
        self.calm = menu.is_calm();
        let store = Rc::clone(&self.store);
        let often = self.faults.often;
        match &mut self.daemon {
            Some(daemon) => daemon.menu(&store.borrow(), menu),
            None if self.driver_alive => menu.must(30, Do::StartDaemon),
            None => menu.must(30, Do::RebuildDriver),
        }
        if self.daemon.is_some() && self.faults.crash {
            menu.may(often, || Do::CrashDaemon);
        }
        if self.driver_alive && self.faults.kill_driver {
            menu.may(often, || Do::KillDriver);
        }
        for i in 0..self.disks.len() {
            self.menu_of_guest(i, menu);
            let Disk { phase, .. } = self.disks[i];
            if self.disks[i].medium.borrow().is_late() {
                menu.must(50, Do::Land(i));
            }
            if self.disks[i].medium.borrow().is_dirty() {
                menu.may(50, || Do::WriteBack(i));
            }
            if !self.is_alive(i) && phase == Phase::Absent {
                menu.must(30, Do::RebuildGuest(i));
            }
            match phase {
                Phase::Removing if self.is_over(i) => menu.must(30, Do::Tool(i, ToolDo::Finish)),
                Phase::Absent if !self.ending && self.is_free(i) => {
                    menu.must(30, Do::Tool(i, ToolDo::Create));
                }
                _ => {}
            }
        }
    }

    fn act(&mut self, action: Do, sim: &mut Sim) {
        match action {
            Do::Daemon(action) => self.act_daemon(action, sim),
            Do::Guest(id, action) => self.act_guest(id, action, sim),
            Do::HostileGuest(mischief) => {
                self.hostile_guest.as_mut().expect("alive").act(&mischief, sim);
            }
            Do::HostileBack(malice) => {
                self.hostile_back.as_mut().expect("alive").act(&malice, sim);
            }
            Do::Tool(i, action) => self.tool(i, &action),
            Do::WriteBack(i) => self.disks[i].medium.borrow_mut().write_back_one(),
            Do::Land(i) => self.disks[i].medium.borrow_mut().land_one(),
            Do::CrashDaemon => {
                self.daemon.take().expect("action is available only if it runs").crash()
            }
            Do::StartDaemon => self.start_daemon(sim),
            Do::KillDriver => self.kill_driver(),
            Do::RebuildDriver => self.rebuild_driver(),
            Do::KillGuest(i) => self.kill_guest(i),
            Do::RebuildGuest(i) => self.build_guest(i),
        }
    }

    fn waiting(&self) -> Option<String> {
        self.disks.iter().find_map(|disk| {
            let id = disk.addr.front;
            if disk.kind != Kind::Honest {
                let over = !self.ending || disk.phase == Phase::Absent;
                return (!over).then(|| format!("the disk of guest {id} is not removed"));
            }
            let Some(guest) = &disk.guest else {
                return Some(format!("guest {id} is dead, its disk is {:?}", disk.phase));
            };
            let ready = guest.is_connected();
            guest.waiting().or_else(|| match disk.phase {
                Phase::Up if ready => None,
                Phase::Absent if self.ending => None,
                phase => Some(format!("the disk of guest {id} is {phase:?}, connected: {ready}")),
            })
        })
    }
}
