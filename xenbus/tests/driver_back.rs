//! The backend's driver against a store, with a class that does nothing: what `xl` does around a
//! device, and leaves to the backend. The devices themselves are driven in `platforms/sim`.

mod common;

use common::world::{World, disk};
use pvio_ring::DomId;
use pvio_xenbus::driver::{
    BackendClass, BackendDriver, Ends, Fault, Life, Prepared, Surroundings, hotplug,
};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, Hotplug, find_domain, is_revived, read_error, read_state,
    remove_backend_end, request_removal, revive_backends, write_hotplug, write_state,
};
use pvio_xenbus::wire::{Op, XsErrno};
use pvio_xenbus::{TRANSACTION_RETRIES, WatchEvent, XenbusState, Xenstore, XsError};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use common::world::{BACK, FRONT};

/// Counts what it is asked for.
#[derive(Default, Clone)]
struct Class {
    prepared: Rc<Cell<u32>>,
    connected: Rc<Cell<bool>>,
}

impl BackendClass for Class {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Prepared, Fault> {
        let prepared = hotplug(xs, ends, Some(b"/etc/xen/scripts/block"))?;
        if prepared == Prepared::Yes {
            self.prepared.set(self.prepared.get() + 1);
        }
        Ok(prepared)
    }

    fn offer(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        Ok(xs.write(&format!("{}/offered", ends.back), b"1")?)
    }

    fn connect(&mut self, _: &mut dyn Xenstore, _: &Ends) -> Result<(), Fault> {
        assert_eq!(self.prepared.get(), 1, "connected before it was prepared");
        self.connected.set(true);
        Ok(())
    }

    fn describe(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        Ok(xs.write(&format!("{}/described", ends.back), b"1")?)
    }

    fn disconnect(&mut self) {
        self.connected.set(false);
    }

    fn fault(&mut self) -> Option<Fault> {
        None
    }
}

struct Bench {
    world: World,
    back: String,
    front: String,
    class: Class,
    driver: BackendDriver<Class>,
}

impl Bench {
    fn new(surroundings: Surroundings) -> Self {
        let (world, back, front) = disk();
        let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51712);
        let class = Class::default();
        let driver = BackendDriver::new(addr, class.clone()).within(surroundings);
        Self { world, back, front, class, driver }
    }

    fn step(&mut self) -> Life {
        self.driver.step(&mut self.world.back).unwrap()
    }

    fn state(&mut self) -> XenbusState {
        read_state(&mut self.world.dom0, &self.back).unwrap()
    }

    fn frontend(&mut self, state: XenbusState) {
        write_state(&mut self.world.front, &self.front, state).unwrap();
    }

    fn script_says(&mut self, status: &Hotplug) {
        write_hotplug(&mut self.world.dom0, &self.back, status).unwrap();
    }
}

#[test]
fn with_scripts_the_offer_comes_first_and_nothing_is_served_before_the_script_is_done() {
    let mut b = Bench::new(Surroundings::Scripts);
    assert_eq!(b.step(), Life::Alive);
    assert_eq!(b.state(), XenbusState::InitWait, "xl waits for this before it runs the script");
    b.frontend(XenbusState::Initialised);
    b.step();
    assert_eq!((b.state(), b.class.prepared.get()), (XenbusState::InitWait, 0));

    while b.world.back.poll_event().unwrap().is_some() {}
    b.script_says(&Hotplug::Connected);
    let event = b.world.back.poll_event().unwrap().expect("the script's word is watched for");
    assert_eq!(event.token, b.driver.token());
    b.step();
    assert_eq!((b.state(), b.class.connected.get()), (XenbusState::Connected, true));
}

/// Xenstore in which a guest interferes with as many transactions.
struct Contended<'a>(&'a mut dyn Xenstore, usize);

impl Xenstore for Contended<'_> {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        if op == Op::TransactionEnd && self.1 > 0 {
            self.1 -= 1;
            self.0.request(op, tx_id, &[b"F\0"])?;
            return Err(XsError::Refused { op, path: "".into(), errno: XsErrno::Again });
        }
        self.0.request(op, tx_id, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.0.poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.0.wait_event(timeout)
    }
}

#[test]
fn a_guest_that_interferes_with_every_offer_loses_its_own_device_and_no_other() {
    let mut b = Bench::new(Surroundings::Plain);
    let alive = b.driver.step(&mut Contended(&mut b.world.back, TRANSACTION_RETRIES));
    assert_eq!(alive, Ok(Life::Alive), "the connection to xenstore is as good as before");
    assert_eq!(b.state(), XenbusState::Closed);
    let why = read_error(&mut b.world.dom0, &b.back).unwrap().expect("a reason");
    assert!(why.contains("conflicts"), "{why}");
}

#[test]
fn a_failed_script_closes_the_device_with_its_reason() {
    let mut b = Bench::new(Surroundings::Scripts);
    b.step();
    b.frontend(XenbusState::Initialised);
    b.script_says(&Hotplug::Failed("device is mounted in dom0".into()));
    b.step();
    assert_eq!(b.state(), XenbusState::Closed);
    let why = read_error(&mut b.world.dom0, &b.back).unwrap().expect("a reason");
    assert!(why.contains("hotplug") && why.contains("device is mounted in dom0"), "{why}");
}

#[test]
fn without_scripts_nobody_is_waited_for() {
    for surroundings in [Surroundings::Plain, Surroundings::DriverDomain] {
        let mut b = Bench::new(surroundings);
        b.frontend(XenbusState::Initialised);
        b.step();
        assert_eq!(b.state(), XenbusState::Connected, "{surroundings:?}");
    }
}

#[test]
fn a_device_that_is_gone_is_left_closed_for_the_toolstack_to_see() {
    for surroundings in [Surroundings::Plain, Surroundings::Scripts, Surroundings::DriverDomain] {
        let mut b = Bench::new(surroundings);
        b.script_says(&Hotplug::Connected);
        b.frontend(XenbusState::Initialised);
        b.step();
        request_removal(&mut b.world.dom0, b.driver.addr()).unwrap();
        b.frontend(XenbusState::Closed);
        assert_eq!(b.step(), Life::Gone);
        assert!(!b.class.connected.get());
        assert_eq!(b.state(), XenbusState::Closed, "{surroundings:?}");
    }
}

#[test]
fn a_driver_domain_may_remove_what_is_its_own() {
    let mut b = Bench::new(Surroundings::DriverDomain);
    remove_backend_end(&mut b.world.back, b.driver.addr()).unwrap();
    assert_eq!(b.world.dom0.read_opt(&format!("{}/state", b.back)).unwrap(), None);
}

#[test]
fn kinds_of_backend_have_a_directory_each_and_share_their_class_of_frontends() {
    for kind in BackendKind::ALL {
        let addr = DeviceAddr::new(kind, BACK, FRONT, 7);
        let path = addr.backend_path();
        assert_eq!(DeviceAddr::from_backend_path(&path, BACK), Some((addr, "")));
        assert!(path.contains(&format!("/backend/{}/", kind.as_str())));
        let frontend = format!("/device/{}/7", kind.class().as_str());
        assert!(addr.frontend_path().ends_with(&frontend));
    }
}

#[test]
fn a_session_is_taken_over_without_a_word_in_xenstore() {
    let mut b = Bench::new(Surroundings::Scripts);
    b.script_says(&Hotplug::Connected);
    b.frontend(XenbusState::Initialised);
    b.step();
    b.frontend(XenbusState::Connected);
    b.step();
    // The process dies, and another comes.
    let (addr, class) = (b.driver.addr(), Class::default());
    b.class = class.clone();
    b.driver = BackendDriver::resuming(addr, class).within(Surroundings::Scripts);
    b.world.front.watch(&b.back, "back").unwrap();
    while b.world.front.poll_event().unwrap().is_some() {}
    b.step();
    assert_eq!((b.class.connected.get(), b.driver.state()), (true, XenbusState::Connected));
    assert_eq!(b.world.front.poll_event().unwrap(), None, "the frontend heard of it");
}

#[test]
fn backends_that_went_with_their_domain_are_made_again_from_what_libxl_keeps() {
    let mut b = Bench::new(Surroundings::DriverDomain);
    let (addr, kept) = (b.driver.addr(), "/libxl/5/device/vbd/51712");
    let dom0 = &mut b.world.dom0;
    for key in dom0.directory(&b.back).unwrap() {
        let value = dom0.read_opt(&format!("{}/{key}", b.back)).unwrap().unwrap();
        dom0.write(&format!("{kept}/{key}"), &value).unwrap();
    }
    dom0.write(&format!("{kept}/backend"), b.back.as_bytes()).unwrap();
    assert_eq!(revive_backends(dom0, BACK).unwrap(), [], "it is there");
    b.frontend(XenbusState::Connected);

    b.world.dom0.rm(&b.back).unwrap();
    assert_eq!(revive_backends(&mut b.world.dom0, DomId(9)).unwrap(), [], "another's");
    assert_eq!(revive_backends(&mut b.world.dom0, BACK).unwrap(), [addr]);
    let class = Class::default();
    b.driver = BackendDriver::resuming(addr, class.clone()).within(Surroundings::DriverDomain);
    assert!(is_revived(&mut b.world.dom0, &b.back).unwrap());
    b.step();
    assert!(class.connected.get());
    assert!(!is_revived(&mut b.world.dom0, &b.back).unwrap());
    for told in ["offered", "described"] {
        let path = format!("{}/{told}", b.back);
        assert!(b.world.dom0.read_opt(&path).unwrap().is_some(), "{told} went with the directory");
    }
    assert_eq!(find_domain(&mut b.world.dom0, "nobody").unwrap(), None);
}
