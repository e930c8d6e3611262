//! Frontends with other projects' backends: models of their reaction to each state, with events
//! that are delayed, merged, or delivered between any two requests of the frontend.

mod models;

use models::{Backend, Model, RING};
use pvio_ring::DomId;
use pvio_xenbus::driver::{Fault, FrontendClass, FrontendContext, FrontendDriver, Life};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, DeviceClass, FrontendAddr, create_domain, read_error, read_state,
    write_state,
};
use pvio_xenbus::handshake::{vbd, vif};
use pvio_xenbus::wire::{Access, Op, Perm};
use pvio_xenbus::{WatchEvent, XenbusState as S, Xenstore, XsError};
use pvio_xenstored::{LocalClient, Quota, Store};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

const BACK: DomId = DomId(1);
const FRONT: DomId = DomId(2);

#[derive(Default)]
struct Class {
    connected: bool,
    back_id: Option<DomId>,
}

impl FrontendClass for Class {
    fn prepare(&mut self, _: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault> {
        self.back_id = Some(context.back_id);
        Ok(())
    }

    fn request(
        &self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        Ok(xs.write(&format!("{}/{RING}", context.front), b"8")?)
    }

    fn connect(&mut self, _: &mut dyn Xenstore, _: &FrontendContext) -> Result<(), Fault> {
        self.connected = true;
        Ok(())
    }

    fn disconnect(&mut self) {
        self.connected = false;
    }

    fn release(&mut self) {}
}

struct World {
    store: Rc<RefCell<Store>>,
    dom0: LocalClient,
    addr: DeviceAddr,
    /// The backend's path, which does not follow from its kind here.
    back: String,
}

impl World {
    fn new(model: Model, class: DeviceClass) -> Self {
        let store = Rc::new(RefCell::new(Store::new(Quota::default())));
        let mut dom0 = LocalClient::connect(&store, DomId::DOM0);
        for id in [BACK, FRONT] {
            store.borrow_mut().introduce(id);
            create_domain(&mut dom0, id, "test").unwrap();
        }
        let kind = if class == DeviceClass::Vbd { BackendKind::Vbd } else { BackendKind::Vif };
        let addr = DeviceAddr::new(kind, BACK, FRONT, 3);
        match class {
            DeviceClass::Vbd => {
                vbd::create_device(&mut dom0, addr, &vbd::ToolstackBack::new(addr, "disk"))
            }
            DeviceClass::Vif => {
                let mac = "00:16:3e:01:02:03".parse().unwrap();
                vif::create_device(&mut dom0, addr, &vif::ToolstackBack::new(addr, mac))
            }
        }
        .unwrap();
        let mut world = Self { store, dom0, addr, back: addr.backend_path() };
        match model {
            Model::QemuBlock => world.of_kind("qdisk"),
            Model::QemuNic => world.of_kind("qnic"),
            _ => {}
        }
        world
    }

    /// Changes the backend's kind, to one that pvio does not know.
    fn of_kind(&mut self, kind: &str) {
        self.back = format!("/local/domain/{BACK}/backend/{kind}/{FRONT}/3");
        let perms = [Perm::new(BACK, Access::None), Perm::new(FRONT, Access::Read)];
        for key in ["", "/online", "/state"] {
            let path = format!("{}{key}", self.back);
            self.dom0.write(&path, b"1").unwrap();
            self.dom0.set_perms(&path, &perms).unwrap();
        }
        self.dom0.rm(&self.addr.backend_path()).unwrap();
        let key = format!("{}/backend", self.addr.frontend_path());
        self.dom0.write(&key, self.back.as_bytes()).unwrap();
    }

    fn client(&self, domain: DomId) -> LocalClient {
        LocalClient::connect(&self.store, domain)
    }

    fn front_is(&mut self, state: S) {
        write_state(&mut self.dom0, &self.addr.frontend_path(), state).unwrap();
    }
}

/// A frontend's connection: between two requests, the backend may handle an event.
struct Between {
    xs: LocalClient,
    backend: Rc<RefCell<Backend>>,
    /// One bit of the seed decides each time.
    seed: u64,
}

impl Between {
    fn chance(&mut self) -> bool {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.seed >> 62 == 0
    }
}

impl Xenstore for Between {
    fn request(&mut self, op: Op, tx: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        if tx == 0 && self.chance() {
            self.backend.borrow_mut().event();
        }
        self.xs.request(op, tx, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.xs.poll_event()
    }

    fn wait_event(&mut self, time: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.xs.wait_event(time)
    }
}

/// Delivers events to both sides, in an order given by the seed, until neither has any.
fn settle(driver: &mut FrontendDriver<Class>, xs: &mut Between) {
    driver.step(xs).unwrap();
    for turn in 0.. {
        let backend = Rc::clone(&xs.backend);
        let mut busy = false;
        if xs.chance() {
            busy |= backend.borrow_mut().event();
        }
        if xs.poll_event().unwrap().is_some() {
            driver.step(xs).unwrap();
            busy = true;
        }
        if !busy && !backend.borrow_mut().event() {
            return;
        }
        assert!(turn < 200, "driver does not settle");
    }
}

const ALL: [(Model, DeviceClass); 6] = [
    (Model::LinuxBlkback, DeviceClass::Vbd),
    (Model::QemuBlock, DeviceClass::Vbd),
    (Model::Pvio, DeviceClass::Vbd),
    (Model::LinuxNetback, DeviceClass::Vif),
    (Model::QemuNic, DeviceClass::Vif),
    (Model::Pvio, DeviceClass::Vif),
];

fn connects(world: &mut World, backend: Backend, seed: u64) {
    let model = backend.model();
    let xs = world.client(FRONT);
    let mut xs = Between { xs, backend: Rc::new(RefCell::new(backend)), seed };
    let mut driver = FrontendDriver::new(world.addr, Class::default());
    settle(&mut driver, &mut xs);
    let states = [world.addr.frontend_path(), world.back.clone()]
        .map(|end| read_state(&mut world.dom0, &end).unwrap());
    assert_eq!(states, [S::Connected; 2], "{model:?}, seed {seed}");
    assert!(driver.is_connected() && driver.class().connected, "{model:?}, seed {seed}");
    assert_eq!(driver.class().back_id, Some(BACK));
}

#[test]
fn frontend_connects_to_every_modelled_backend() {
    for (model, class) in ALL {
        for seed in 0..40 {
            let mut world = World::new(model, class);
            let backend = Backend::start(model, world.client(BACK), world.addr, &world.back);
            connects(&mut world, backend, seed);
        }
    }
}

#[test]
fn frontend_started_after_one_died_in_any_state_connects() {
    use S::{Closed, Closing, Connected, Initialised, Initialising};
    for (model, class) in ALL {
        for found in [Initialising, Initialised, Connected, Closing, Closed] {
            for seed in 0..40 {
                // With a session, and without one.
                for with_session in [true, false] {
                    let mut world = World::new(model, class);
                    let ring = format!("{}/{RING}", world.addr.frontend_path());
                    world.dom0.write(&ring, b"4000").unwrap();
                    world.front_is(if with_session { Connected } else { found });
                    let xs = world.client(BACK);
                    let backend = match with_session {
                        true => Backend::connected(model, xs, world.addr, &world.back),
                        false => Backend::start(model, xs, world.addr, &world.back),
                    };
                    world.front_is(found);
                    connects(&mut world, backend, seed);
                }
            }
        }
    }
}

#[test]
fn frontend_started_on_offline_device_closes() {
    for (model, class) in ALL {
        let mut world = World::new(model, class);
        world.dom0.write(&format!("{}/{RING}", world.addr.frontend_path()), b"8").unwrap();
        world.front_is(S::Connected);
        let backend = Backend::connected(model, world.client(BACK), world.addr, &world.back);
        world.dom0.write(&format!("{}/online", world.back), b"0").unwrap();
        let backend = Rc::new(RefCell::new(backend));
        let mut xs = Between { xs: world.client(FRONT), backend, seed: 1 };
        let mut driver = FrontendDriver::new(world.addr, Class::default());
        settle(&mut driver, &mut xs);
        assert_eq!(driver.state(), S::Closed, "{model:?}");
        assert!(driver.is_closed());
    }
}

#[test]
fn backend_is_found_by_backend_key_without_handle_or_known_kind() {
    let mut world = World::new(Model::QemuNic, DeviceClass::Vif);
    world.dom0.rm(&format!("{}/handle", world.addr.frontend_path())).unwrap();
    let front = world.addr.frontend_path();
    let told = vif::ToolstackFront::read(&mut world.dom0, &front).unwrap();
    assert_eq!((told.handle, told.backend), (3, world.back.clone()));
    for kind in ["vbd3", "9pfs-like_kind", "x"] {
        let mut world = World::new(Model::LinuxBlkback, DeviceClass::Vbd);
        world.of_kind(kind);
        let xs = world.client(BACK);
        let backend = Backend::start(Model::LinuxBlkback, xs, world.addr, &world.back);
        connects(&mut world, backend, 7);
    }
}

#[test]
fn invalid_backend_key_closes_device_with_error() {
    let long = format!("/local/domain/{BACK}/{}", "a".repeat(2900));
    let bad: [(&str, &str); 9] = [
        ("backend", "backend/vbd/2/3"),
        ("backend", "/local/domain/3/backend/vbd/2/3"),
        ("backend", "/local/domain/1"),
        ("backend", "/local/domain/1/"),
        ("backend", "/local/domain/1/backend//3"),
        ("backend", "/local/domain/1/backend/a b"),
        ("backend", &long),
        ("backend-id", "65536"),
        ("backend-id", "-1"),
    ];
    let keys = ["backend", "backend-id"].map(|key| (key, None));
    for (key, value) in bad.map(|(key, value)| (key, Some(value))).into_iter().chain(keys) {
        let mut world = World::new(Model::LinuxBlkback, DeviceClass::Vbd);
        let front = world.addr.frontend_path();
        match value {
            Some(value) => world.dom0.write(&format!("{front}/{key}"), value.as_bytes()).unwrap(),
            None => world.dom0.rm(&format!("{front}/{key}")).unwrap(),
        }
        let mut xs = world.client(FRONT);
        let addr = FrontendAddr::new(DeviceClass::Vbd, FRONT, 3);
        let mut driver = FrontendDriver::new(addr, Class::default());
        for _ in 0..2 {
            assert_eq!(driver.step(&mut xs).unwrap(), Life::Alive);
            assert!(driver.is_closed(), "{key} {value:?}");
            assert_eq!(read_state(&mut xs, &front).unwrap(), S::Closed);
        }
        let told = read_error(&mut world.dom0, &front).unwrap().expect("error node is written");
        assert!(told.contains(key), "{told}");
        world.dom0.rm(&front).unwrap();
        assert_eq!(driver.step(&mut xs).unwrap(), Life::Gone);
    }
}

#[test]
fn restarted_backend_connects_waiting_nic_and_restarts_connected_one() {
    let mut world = World::new(Model::Pvio, DeviceClass::Vif);
    let front = world.addr.frontend_path();
    let backend = |world: &World| Backend::restarted(world.client(BACK), world.addr, &world.back);
    let mut dead = Backend::start(Model::Pvio, world.client(BACK), world.addr, &world.back);
    let mut xs = world.client(FRONT);
    let mut driver = FrontendDriver::new(world.addr, Class::default());
    driver.step(&mut xs).unwrap();
    assert_eq!(read_state(&mut world.dom0, &front).unwrap(), S::Connected);
    assert!(!driver.is_connected() && !driver.class().connected);
    // The backend dies before it has handled that. Its successor accepts the request.
    assert_eq!(dead.state(), S::InitWait);
    drop(dead);
    dead = backend(&world);
    assert_eq!(dead.state(), S::Connected);
    driver.step(&mut xs).unwrap();
    assert!(driver.is_connected() && driver.class().connected);
    // It dies again: now there is a session, which the frontend has to end.
    drop(dead);
    let mut third = backend(&world);
    assert_eq!(third.state(), S::InitWait);
    driver.step(&mut xs).unwrap();
    assert!(!driver.is_connected());
    while third.event() {}
    assert_eq!(third.state(), S::Connected);
    driver.step(&mut xs).unwrap();
    assert!(driver.is_connected() && driver.class().connected);
}
