//! The frontend's driver with a store and a class without function: backends that misbehave or
//! disappear. The devices themselves are tested in `simulator/`.

use pvio_ring::DomId;
use pvio_xenbus::driver::{Fault, FrontendClass, FrontendContext, FrontendDriver, Life};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, create_domain, read_error, read_state, remove_device, remove_domain,
    write_state,
};
use pvio_xenbus::handshake::vbd::{ToolstackBack, create_backend, create_device};
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Quota, Store};
use std::cell::RefCell;
use std::rc::Rc;

const BACK: DomId = DomId(1);
const FRONT: DomId = DomId(2);
const OTHER: DomId = DomId(3);

#[derive(Default)]
struct Class {
    connected: bool,
    /// Runs at the next read of the backend's keys, before they turn out to be invalid.
    meanwhile: Option<Box<dyn FnOnce()>>,
}

impl FrontendClass for Class {
    fn prepare(&mut self, _: &mut dyn Xenstore, _: &FrontendContext) -> Result<(), Fault> {
        Ok(())
    }

    fn request(&self, _: &mut dyn Xenstore, _: &FrontendContext) -> Result<(), HandshakeError> {
        Ok(())
    }

    fn connect(&mut self, _: &mut dyn Xenstore, _: &FrontendContext) -> Result<(), Fault> {
        if let Some(happens) = self.meanwhile.take() {
            happens();
            return Err(Fault::new("handshake", "a key is missing"));
        }
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
    back: LocalClient,
    front: LocalClient,
    addr: DeviceAddr,
    driver: FrontendDriver<Class>,
}

impl World {
    /// Returns a connected frontend.
    fn new() -> Self {
        let store = Rc::new(RefCell::new(Store::new(Quota::default())));
        let mut dom0 = LocalClient::connect(&store, DomId::DOM0);
        for id in [BACK, FRONT] {
            store.borrow_mut().introduce(id);
            create_domain(&mut dom0, id, "test").unwrap();
        }
        let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51712);
        create_device(&mut dom0, addr, &ToolstackBack::new(addr, "disk")).unwrap();
        let [back, front] = [BACK, FRONT].map(|id| LocalClient::connect(&store, id));
        let driver = FrontendDriver::new(addr, Class::default());
        let mut world = Self { store, dom0, back, front, addr, driver };
        world.connect();
        world
    }

    fn connect(&mut self) {
        self.step();
        self.back_is(XenbusState::InitWait);
        self.step();
        self.back_is(XenbusState::Connected);
        self.step();
        assert!(self.driver.class().connected);
    }

    fn step(&mut self) -> Life {
        self.driver.step(&mut self.front).unwrap()
    }

    fn back_is(&mut self, state: XenbusState) {
        write_state(&mut self.back, &self.addr.backend_path(), state).unwrap();
    }
}

#[test]
fn frontend_driver_closed_and_loaded_again_connects() {
    let mut w = World::new();
    w.driver.close(&mut w.front).unwrap();
    w.back_is(XenbusState::Closing);
    w.step();
    assert_eq!(w.driver.state(), XenbusState::Closed);
    assert!(!w.driver.is_closed(), "driver closed before the backend released the rings");
    w.back_is(XenbusState::Closed);
    w.step();
    assert!(w.driver.is_closed());
    w.driver = FrontendDriver::new(w.addr, Class::default());
    w.connect();
}

#[test]
fn frontend_driver_of_removed_device_creates_no_nodes() {
    let mut w = World::new();
    remove_device(&mut w.dom0, w.addr).unwrap();
    w.driver = FrontendDriver::new(w.addr, Class::default());
    assert_eq!(w.step(), Life::Gone);
    assert_eq!(w.dom0.read_opt(&w.addr.frontend_path()).unwrap(), None);
}

#[test]
fn frontend_of_destroyed_backend_domain_stays_connected_and_waits() {
    let mut w = World::new();
    w.store.borrow_mut().release(BACK);
    remove_domain(&mut w.dom0, BACK).unwrap();
    assert_eq!((w.step(), w.driver.state()), (Life::Alive, XenbusState::Connected));
}

#[test]
fn backend_removed_while_its_keys_are_read_is_waited_for() {
    let mut w = World::new();
    let mut dom0 = LocalClient::connect(&w.store, DomId::DOM0);
    w.driver.class_mut().meanwhile = Some(Box::new(move || {
        remove_domain(&mut dom0, BACK).unwrap();
    }));
    assert_eq!((w.step(), w.driver.state()), (Life::Alive, XenbusState::Connected));
    assert!(w.driver.class().meanwhile.is_none(), "keys of the backend were read");
    assert_eq!(read_error(&mut w.dom0, &w.addr.frontend_path()).unwrap(), None);
}

#[test]
fn backend_with_invalid_keys_closes_frontend_with_error() {
    let mut w = World::new();
    w.driver.class_mut().meanwhile = Some(Box::new(|| ()));
    w.step();
    assert_eq!(w.driver.state(), XenbusState::Closing);
    assert!(read_error(&mut w.dom0, &w.addr.frontend_path()).unwrap().is_some());
}

#[test]
fn backend_with_malformed_key_disconnects_frontend_with_error() {
    let mut w = World::new();
    let (back, front) = (w.addr.backend_path(), w.addr.frontend_path());
    w.back.write(&format!("{back}/online"), b"nonsense").unwrap();
    w.step();
    assert!(!w.driver.class().connected, "frontend is still connected");
    let told = read_error(&mut w.dom0, &front).unwrap().expect("error node is written");
    assert!(told.contains("handshake"), "{told}");
    w.back_is(XenbusState::Closed);
    w.step();
    assert!(w.driver.is_closed());
}

/// Creates the device's backend in another domain, with the toolstack's directories and the keys
/// for the frontend.
fn moved(w: &mut World) -> (DeviceAddr, LocalClient) {
    w.store.borrow_mut().introduce(OTHER);
    create_domain(&mut w.dom0, OTHER, "other").unwrap();
    let addr = DeviceAddr::new(BackendKind::Vbd, OTHER, FRONT, 51712);
    create_backend(&mut w.dom0, addr, &ToolstackBack::new(addr, "disk")).unwrap();
    let front = w.addr.frontend_path();
    w.dom0.write(&format!("{front}/backend-id"), b"3").unwrap();
    w.dom0.write(&format!("{front}/backend"), addr.backend_path().as_bytes()).unwrap();
    (addr, LocalClient::connect(&w.store, OTHER))
}

#[test]
fn device_moved_to_other_backend_domain_reconnects_there() {
    // The earlier backend's domain is gone, or it continues; the toolstack has reset the state, or
    // not.
    for (gone, anew) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut w = World::new();
        if gone {
            w.store.borrow_mut().release(BACK);
            remove_domain(&mut w.dom0, BACK).unwrap();
            w.step();
        }
        let (addr, mut other) = moved(&mut w);
        let front = w.addr.frontend_path();
        if anew {
            write_state(&mut w.dom0, &front, XenbusState::Initialising).unwrap();
        }
        let event = |w: &mut World| w.front.poll_event().unwrap().map(|event| event.token);
        let heard = std::iter::from_fn(|| event(&mut w)).any(|token| token == front);
        assert!(heard, "frontend got no event");
        assert_eq!((w.step(), w.driver.state()), (Life::Alive, XenbusState::Initialising));
        assert!(!w.driver.class().connected, "frontend is disconnected and keeps its requests");
        assert_eq!(w.driver.backend_path(), Some(&*addr.backend_path()));
        assert_eq!(read_state(&mut w.dom0, &front).unwrap(), XenbusState::Initialising);
        write_state(&mut other, &addr.backend_path(), XenbusState::InitWait).unwrap();
        let heard = std::iter::from_fn(|| event(&mut w)).any(|token| token == front);
        assert!(heard, "the new backend is watched");
        w.step();
        write_state(&mut other, &addr.backend_path(), XenbusState::Connected).unwrap();
        w.step();
        assert!(w.driver.class().connected && w.driver.is_connected());
        if !gone {
            std::iter::from_fn(|| event(&mut w)).for_each(drop);
            w.back_is(XenbusState::Closed);
            assert_eq!((event(&mut w), w.step()), (None, Life::Alive), "event of the old backend");
            assert!(w.driver.is_connected());
        }
    }
}

#[test]
fn closed_frontend_stays_closed_when_device_moves() {
    let mut w = World::new();
    w.driver.close(&mut w.front).unwrap();
    w.back_is(XenbusState::Closed);
    w.step();
    let (addr, mut other) = moved(&mut w);
    write_state(&mut other, &addr.backend_path(), XenbusState::InitWait).unwrap();
    assert_eq!((w.step(), w.driver.state()), (Life::Alive, XenbusState::Closed));
}

#[test]
fn dangling_backend_key_closes_device_and_missing_key_is_waited_for() {
    let mut w = World::new();
    let key = format!("{}/backend", w.addr.frontend_path());
    w.dom0.rm(&key).unwrap();
    assert_eq!((w.step(), w.driver.state()), (Life::Alive, XenbusState::Connected));
    w.dom0.write(&key, b"/local/domain/9/backend/vbd/2/51712").unwrap();
    w.step();
    assert!(w.driver.is_closing() && !w.driver.class().connected);
    assert!(read_error(&mut w.dom0, &w.addr.frontend_path()).unwrap().is_some());
}

#[test]
fn recreated_device_is_connected_again() {
    let mut w = World::new();
    remove_device(&mut w.dom0, w.addr).unwrap();
    create_device(&mut w.dom0, w.addr, &ToolstackBack::new(w.addr, "disk")).unwrap();
    assert_eq!((w.step(), w.driver.state()), (Life::Alive, XenbusState::Connected));
    w.back_is(XenbusState::InitWait);
    w.step();
    w.back_is(XenbusState::Connected);
    w.step();
    assert!(w.driver.class().connected && w.driver.is_connected());
    let state = read_state(&mut w.dom0, &w.addr.frontend_path()).unwrap();
    assert_eq!(state, XenbusState::Connected);
}
