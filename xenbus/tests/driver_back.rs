//! The backend's driver with a store and a class without function: the interaction with `xl`. The
//! devices themselves are tested in `simulator/`.

mod common;
#[path = "driver_back/lost.rs"]
mod lost;
#[path = "driver_back/taking_over.rs"]
mod taking_over;

use common::{World, disk};
use pvio_ring::DomId;
use pvio_xenbus::driver::{
    BackendClass, BackendContext, BackendDriver, Fault, HotplugMode, Life, MOST_TRANSITIONS,
    Prepared, hotplug,
};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, Hotplug, find_domain, is_revived, read_error, read_state,
    remove_backend, request_removal, revive_backends, write_hotplug, write_state,
};
use pvio_xenbus::wire::{Op, XsErrno};
use pvio_xenbus::{TRANSACTION_RETRIES, WatchEvent, XenbusState, Xenstore, XsError};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use common::{BACK, FRONT};

/// Counts the calls of its methods.
#[derive(Default, Clone)]
struct Class {
    prepared: Rc<Cell<u32>>,
    connected: Rc<Cell<bool>>,
    /// The operations that are pending.
    slow: Rc<RefCell<Vec<&'static str>>>,
    /// Result of `prepare`, instead of the script's status.
    says: Rc<RefCell<Option<Result<Prepared, Fault>>>>,
    /// The frontend's request changes at each read.
    flips: Rc<Cell<bool>>,
    superseded: Rc<Cell<u32>>,
    released: Rc<Cell<bool>>,
    /// The reason why an earlier session cannot be resumed.
    unresumable: Rc<Cell<Option<&'static str>>>,
    forgotten: Rc<Cell<bool>>,
    /// The next call of `fault` returns a fault.
    fails: Rc<Cell<bool>>,
}

impl Class {
    fn poll(&self, what: &'static str) -> Poll<()> {
        if self.slow.borrow().contains(&what) { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl BackendClass for Class {
    fn prepare(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<Prepared, Fault> {
        let said = self.says.borrow().clone();
        let script = || hotplug(xs, context, Some(b"/etc/xen/scripts/block"));
        let prepared = said.unwrap_or_else(script)?;
        if prepared == Prepared::Yes {
            self.prepared.set(self.prepared.get() + 1);
        }
        Ok(prepared)
    }

    fn offer(&self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), HandshakeError> {
        Ok(xs.write(&format!("{}/offered", context.back), b"1")?)
    }

    fn forget_session(&mut self, _: &BackendContext) {
        self.forgotten.set(true);
    }

    fn resumable(&mut self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<(), Fault> {
        assert!(!self.forgotten.get(), "session was forgotten twice");
        self.unresumable.get().map_or(Ok(()), |code| Err(Fault::new(code, "injected failure")))
    }

    fn connect(&mut self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<Poll<()>, Fault> {
        assert_eq!(self.prepared.get(), 1, "connect before prepare");
        self.connected.set(true);
        Ok(self.poll("connect"))
    }

    fn is_superseded(&mut self, _: &mut dyn Xenstore, _: &BackendContext) -> bool {
        self.superseded.set(self.superseded.get() + u32::from(self.flips.get()));
        self.flips.get()
    }

    fn describe(
        &self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        Ok(xs.write(&format!("{}/described", context.back), b"1")?)
    }

    fn disconnect(&mut self) -> Poll<()> {
        let outcome = self.poll("disconnect");
        self.connected.set(self.connected.get() && outcome.is_pending());
        outcome
    }

    fn release(&mut self) -> Poll<()> {
        assert!(!self.connected.get(), "release while connected");
        let outcome = self.poll("release");
        self.released.set(outcome.is_ready());
        outcome
    }

    fn fault(&mut self) -> Option<Fault> {
        self.fails.take().then(|| Fault::new("test", "injected serving fault"))
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
    fn new(hotplug_mode: HotplugMode) -> Self {
        let (world, back, front) = disk();
        let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51712);
        let class = Class::default();
        let driver = BackendDriver::new(addr, class.clone()).with_hotplug_mode(hotplug_mode);
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

    fn connected() -> Self {
        let mut b = Self::new(HotplugMode::Plain);
        b.frontend(XenbusState::Initialised);
        b.step();
        b.frontend(XenbusState::Connected);
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected));
        b
    }

    /// The process dies and another replaces it, which can or cannot resume a session.
    fn succeed(&mut self, unresumable: Option<&'static str>) {
        let (addr, class, left) = (self.driver.addr(), Class::default(), self.state());
        class.unresumable.set(unresumable);
        self.class = class.clone();
        self.driver = BackendDriver::taking_over(addr, class, left);
    }

    fn has(&mut self, key: &str) -> bool {
        self.world.dom0.read_opt(&format!("{}/{key}", self.back)).unwrap().is_some()
    }

    fn slow(&mut self, what: &[&'static str]) {
        *self.class.slow.borrow_mut() = what.to_vec();
    }

    fn script_says(&mut self, status: &Hotplug) {
        write_hotplug(&mut self.world.dom0, &self.back, status).unwrap();
    }
}

#[test]
fn backend_with_hotplug_script_offers_first_and_connects_after_script() {
    let mut b = Bench::new(HotplugMode::Scripts);
    assert_eq!(b.step(), Life::Alive);
    assert_eq!(b.state(), XenbusState::InitWait, "state before the hotplug script runs");
    b.frontend(XenbusState::Initialised);
    b.step();
    assert_eq!((b.state(), b.class.prepared.get()), (XenbusState::InitWait, 0));

    while b.world.back.poll_event().unwrap().is_some() {}
    b.script_says(&Hotplug::Connected);
    let event = b.world.back.poll_event().unwrap().expect("hotplug-status is watched");
    assert_eq!(event.token, b.driver.token());
    b.step();
    assert_eq!((b.state(), b.class.connected.get()), (XenbusState::Connected, true));
}

/// Xenstore in which a guest interferes with this number of transactions.
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
fn offer_with_endless_conflicts_closes_only_its_device() {
    let mut b = Bench::new(HotplugMode::Plain);
    let alive = b.driver.step(&mut Contended(&mut b.world.back, TRANSACTION_RETRIES));
    assert_eq!(alive, Ok(Life::Alive), "xenstore connection is still usable");
    assert_eq!(b.state(), XenbusState::Closed);
    let why = read_error(&mut b.world.dom0, &b.back).unwrap().expect("a reason");
    assert!(why.contains("a conflict at every attempt"), "{why}");
}

#[test]
fn failed_hotplug_script_closes_device_with_its_reason() {
    let mut b = Bench::new(HotplugMode::Scripts);
    b.step();
    b.frontend(XenbusState::Initialised);
    b.script_says(&Hotplug::Failed("device is mounted in dom0".into()));
    b.step();
    assert_eq!(b.state(), XenbusState::Closed);
    let why = read_error(&mut b.world.dom0, &b.back).unwrap().expect("a reason");
    assert!(why.contains("hotplug") && why.contains("device is mounted in dom0"), "{why}");
}

#[test]
fn backend_without_hotplug_script_connects_immediately() {
    for hotplug_mode in [HotplugMode::Plain, HotplugMode::DriverDomain] {
        let mut b = Bench::new(hotplug_mode);
        b.frontend(XenbusState::Initialised);
        b.step();
        assert_eq!(b.state(), XenbusState::Connected, "{hotplug_mode:?}");
    }
}

#[test]
fn removed_device_is_left_in_closed_state_for_toolstack() {
    for hotplug_mode in [HotplugMode::Plain, HotplugMode::Scripts, HotplugMode::DriverDomain] {
        let mut b = Bench::new(hotplug_mode);
        b.script_says(&Hotplug::Connected);
        b.frontend(XenbusState::Initialised);
        b.step();
        request_removal(&mut b.world.dom0, b.driver.addr()).unwrap();
        b.frontend(XenbusState::Closed);
        assert_eq!(b.step(), Life::Gone);
        assert!(!b.class.connected.get());
        assert_eq!(b.state(), XenbusState::Closed, "{hotplug_mode:?}");
    }
}

#[test]
fn removal_of_closed_device_leaves_it_closed() {
    let mut b = Bench::new(HotplugMode::Plain);
    b.frontend(XenbusState::Initialised);
    b.step();
    b.frontend(XenbusState::Closed);
    b.step();
    assert_eq!(b.state(), XenbusState::Closed);
    request_removal(&mut b.world.dom0, b.driver.addr()).unwrap();
    assert_eq!(b.step(), Life::Gone);
    // The toolstack waits for this state.
    assert_eq!(b.state(), XenbusState::Closed);
}

#[test]
fn driver_domain_removes_its_own_backend_directory() {
    let mut b = Bench::new(HotplugMode::DriverDomain);
    remove_backend(&mut b.world.back, b.driver.addr()).unwrap();
    assert_eq!(b.world.dom0.read_opt(&format!("{}/state", b.back)).unwrap(), None);
}

#[test]
fn backend_kinds_have_own_directories_and_share_frontend_class() {
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
fn session_taken_over_writes_no_xenstore_state() {
    let mut b = Bench::new(HotplugMode::Scripts);
    b.script_says(&Hotplug::Connected);
    b.frontend(XenbusState::Initialised);
    b.step();
    b.frontend(XenbusState::Connected);
    b.step();
    // The process dies and another replaces it.
    let (addr, class) = (b.driver.addr(), Class::default());
    b.class = class.clone();
    b.driver = BackendDriver::resuming(addr, class).with_hotplug_mode(HotplugMode::Scripts);
    b.world.front.watch(&b.back, "back").unwrap();
    while b.world.front.poll_event().unwrap().is_some() {}
    b.step();
    assert_eq!((b.class.connected.get(), b.driver.state()), (true, XenbusState::Connected));
    assert_eq!(b.world.front.poll_event().unwrap(), None, "frontend got an event of the takeover");
}

#[test]
fn backends_of_restarted_driver_domain_are_recreated_from_libxl_keys() {
    let mut b = Bench::new(HotplugMode::DriverDomain);
    let (addr, kept) = (b.driver.addr(), "/libxl/5/device/vbd/51712");
    let dom0 = &mut b.world.dom0;
    for key in dom0.directory(&b.back).unwrap() {
        let value = dom0.read_opt(&format!("{}/{key}", b.back)).unwrap().unwrap();
        dom0.write(&format!("{kept}/{key}"), &value).unwrap();
    }
    dom0.write(&format!("{kept}/backend"), b.back.as_bytes()).unwrap();
    assert_eq!(revive_backends(dom0, BACK).unwrap(), [], "backend exists");
    b.frontend(XenbusState::Connected);

    b.world.dom0.rm(&b.back).unwrap();
    assert_eq!(revive_backends(&mut b.world.dom0, DomId(9)).unwrap(), [], "another's");
    assert_eq!(revive_backends(&mut b.world.dom0, BACK).unwrap(), [addr]);
    let class = Class::default();
    b.driver =
        BackendDriver::resuming(addr, class.clone()).with_hotplug_mode(HotplugMode::DriverDomain);
    assert!(is_revived(&mut b.world.dom0, &b.back).unwrap());
    b.step();
    assert!(class.connected.get());
    assert!(!is_revived(&mut b.world.dom0, &b.back).unwrap());
    for told in ["offered", "described"] {
        let path = format!("{}/{told}", b.back);
        assert!(
            b.world.dom0.read_opt(&path).unwrap().is_some(),
            "{told} was removed with the directory"
        );
    }
    assert_eq!(find_domain(&mut b.world.dom0, "nobody").unwrap(), None);
}

#[test]
fn closed_state_is_written_only_after_class_has_disconnected() {
    let mut b = Bench::connected();
    b.slow(&["disconnect"]);
    b.frontend(XenbusState::Closed);
    for _ in 0..3 {
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Closing));
        assert!(b.class.connected.get());
    }
    b.slow(&[]);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Closed));
    // The frontend reconnected before the class had stopped: the offer is written only afterwards.
    let mut b = Bench::connected();
    b.slow(&["disconnect"]);
    b.frontend(XenbusState::Closed);
    b.step();
    b.frontend(XenbusState::Connected);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Closing));
    b.slow(&[]);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected));
    assert!(b.class.connected.get(), "state is Connected but the class is not");
}

#[test]
fn restarted_frontend_sees_init_wait_only_after_old_session_ended() {
    let mut b = Bench::connected();
    b.slow(&["disconnect"]);
    b.frontend(XenbusState::Initialising);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected));
    b.slow(&[]);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait));
}

#[test]
fn frontend_that_closes_during_connect_is_disconnected() {
    let mut b = Bench::new(HotplugMode::Plain);
    b.slow(&["connect"]);
    b.frontend(XenbusState::Initialised);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait));
    assert!(b.class.connected.get());
    b.frontend(XenbusState::Closed);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Closed));
    assert!(!b.class.connected.get());
    b.slow(&["connect"]);
    b.frontend(XenbusState::Initialising);
    b.step();
    b.frontend(XenbusState::Initialised);
    b.step();
    b.slow(&[]);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected));
}

#[test]
fn offer_waits_for_preparation_unless_it_continues_after_offer() {
    let mut b = Bench::new(HotplugMode::Plain);
    *b.class.says.borrow_mut() = Some(Ok(Prepared::Pending));
    b.frontend(XenbusState::Initialised);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Initialising));
    *b.class.says.borrow_mut() = Some(Ok(Prepared::AfterOffer));
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait));
    assert!(!b.class.connected.get());
    *b.class.says.borrow_mut() = Some(Ok(Prepared::Yes));
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected));

    // The failure is known before a frontend submits a request.
    let mut b = Bench::new(HotplugMode::Plain);
    *b.class.says.borrow_mut() = Some(Ok(Prepared::AfterOffer));
    b.step();
    *b.class.says.borrow_mut() = Some(Err(Fault::new("image-busy", "in use")));
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Closed));
    let why = read_error(&mut b.world.dom0, &b.back).unwrap();
    assert!(why.is_some_and(|why| why.contains("image-busy")));
}

#[test]
fn removal_and_shutdown_wait_until_class_is_released() {
    let mut b = Bench::connected();
    request_removal(&mut b.world.dom0, b.driver.addr()).unwrap();
    b.frontend(XenbusState::Closed);
    b.slow(&["release"]);
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Closed));
    b.slow(&[]);
    assert_eq!(b.step(), Life::Gone);
    assert!(b.class.released.get());

    let mut b = Bench::connected();
    b.slow(&["disconnect", "release"]);
    assert_eq!(b.driver.shut_down(&mut b.world.back).unwrap(), Poll::Pending);
    assert!(b.class.connected.get());
    b.slow(&["release"]);
    assert_eq!(b.driver.shut_down(&mut b.world.back).unwrap(), Poll::Pending);
    assert_eq!(b.state(), XenbusState::Connected);
    b.slow(&[]);
    assert_eq!(b.driver.shut_down(&mut b.world.back).unwrap(), Poll::Ready(()));
    assert_eq!((b.state(), b.class.released.get()), (XenbusState::Closed, true));
}

#[test]
fn endless_frontend_transitions_are_bounded_per_step() {
    let mut b = Bench::connected();
    b.class.flips.set(true);
    for _ in 0..3 {
        let before = (b.class.superseded.get(), b.driver.transitions());
        assert_eq!(b.step(), Life::More);
        assert!(b.class.superseded.get() - before.0 <= MOST_TRANSITIONS);
        assert!(b.driver.transitions() - before.1 <= u64::from(MOST_TRANSITIONS));
    }
    b.class.flips.set(false);
    while b.step() == Life::More {}
    assert_eq!(b.state(), XenbusState::Connected);
}
