//! Tests of what makes the driver domain step or poll its devices.

use super::disk::DiskServer;
use super::wakeups::WokenDevices;
use super::{Options, new_driver};
use crate::descriptors::Descriptors;
use crate::driver::devices::Devices;
use crate::served::{DeviceStatus, ReportStatus, Served};
use crate::stop::Wakeup;
use pvio_blkback::Vbd;
use pvio_blkfront::blocking::BlockingDisk;
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_storage::host::ImageServer;
use pvio_storage::image::DiskOptions;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendClass, BackendContext, BackendDriver, Fault, Prepared};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, read_error, read_state, request_removal, write_state,
};
use pvio_xenbus::handshake::vbd::{ToolstackBack, change_media, create_device};
use pvio_xenbus::{XenbusState, Xenstore};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

/// Number of file descriptors of each disk.
const EACH: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves disks as [`super::run`] does, until it is stopped.
fn serve(
    domain: Domain,
    stop: Arc<AtomicBool>,
    descriptors: Descriptors,
) -> std::thread::JoinHandle<()> {
    spawn(move || {
        let mut xs = domain.xenstore().unwrap();
        let (id, options) = (domain.id(), Options::default());
        let woken = WokenDevices::new(&Wakeup::new().unwrap());
        let wakes = woken.clone();
        let mut disks = Devices::new(vec![BackendKind::Vbd], id, None, move |addr, state| {
            let server = ImageServer::new(domain.clone(), wakes.of(addr));
            let server = DiskServer::new(server, None, DiskOptions::default());
            new_driver(&options, addr, state, Vbd::with(server, options.disks))
        })
        .with_descriptors(&descriptors, EACH)
        .with_polling();
        disks.watch(&mut xs).unwrap();
        while !stop.load(Ordering::SeqCst) {
            disks.check_for_changes(&mut xs).unwrap();
            if let Some(event) = xs.wait_event(Some(Duration::from_millis(20))).unwrap() {
                disks.event(&event);
            }
            woken.take().into_iter().for_each(|addr| disks.wake(addr));
            disks.step_pending(&mut xs).unwrap();
        }
        while disks.shut_down(&mut xs).unwrap().is_pending() {
            sleep(Duration::from_millis(1));
        }
    })
}

fn becomes(session: &mut BlockingDisk<Domain, Client>, size: u64) {
    let begin = Instant::now();
    while session.size() != size {
        assert!(
            begin.elapsed() < PATIENCE,
            "size stays {} bytes instead of {size}",
            session.size()
        );
        session.queue().unwrap();
        sleep(Duration::from_millis(10));
    }
}

/// A running driver domain, and its guest's only disk, of 1 MiB and removable.
struct Machine {
    addr: DeviceAddr,
    image: tempfile::NamedTempFile,
    dom0: Client,
    stop: Arc<AtomicBool>,
    served: std::thread::JoinHandle<()>,
    _hypervisor: (Hypervisor, tempfile::TempDir),
}

impl Machine {
    fn with_disk() -> (Self, BlockingDisk<Domain, Client>) {
        Self::with_descriptors(Descriptors::default())
    }

    fn with_descriptors(descriptors: Descriptors) -> (Self, BlockingDisk<Domain, Client>) {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let driver = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
        let guest = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
        let join = |id: DomId| Domain::join(hypervisor.state_dir(), id).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let served = serve(join(driver), Arc::clone(&stop), descriptors);
        let addr = DeviceAddr::new(BackendKind::Vbd, driver, guest, 51712);
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let mut back = ToolstackBack::new(addr, image.path().to_str().unwrap());
        back.removable = true;
        let mut dom0 = hypervisor.xenstore().unwrap();
        create_device(&mut dom0, addr, &back).unwrap();
        let domain = join(guest);
        let xs = domain.xenstore().unwrap();
        let session = BlockingDisk::attach(domain, xs, addr, PATIENCE).unwrap();
        (Self { addr, image, dom0, stop, served, _hypervisor: (hypervisor, dir) }, session)
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.served.join().unwrap();
    }
}

#[test]
fn grown_image_and_changed_media_reach_guest() {
    let (mut machine, mut session) = Machine::with_disk();
    let dom0 = &mut machine.dom0;
    let addr = machine.addr;
    let image = &machine.image;
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(5 << 20).unwrap();
    assert_eq!(session.size(), 1 << 20);

    // Only the file's size shows the change; there is no event.
    image.as_file().set_len(2 << 20).unwrap();
    becomes(&mut session, 2 << 20);
    change_media(dom0, addr, other.path().to_str().unwrap()).unwrap();
    becomes(&mut session, 5 << 20);
    change_media(dom0, addr, "").unwrap();
    becomes(&mut session, 0);
    session.close().unwrap();
    machine.end();
}

#[test]
fn guest_that_keeps_removed_disk_is_reported_and_waited_for() {
    let (mut machine, session) = Machine::with_disk();
    let (addr, dom0) = (machine.addr, &mut machine.dom0);
    let back = addr.backend_path();
    request_removal(dom0, addr).unwrap();
    let begin = Instant::now();
    let why = loop {
        assert!(begin.elapsed() < PATIENCE, "error node was not written");
        if let Some(why) = read_error(dom0, &back).unwrap() {
            break why;
        }
        sleep(Duration::from_millis(50));
    };
    assert!(why.contains("frontend-keeps-device") && why.contains("by force"), "{why}");
    assert!(begin.elapsed() >= super::devices::CLOSING_TIMEOUT);
    assert_eq!(read_state(dom0, &back).unwrap(), XenbusState::Closing);
    session.close().unwrap();
    let begin = Instant::now();
    while read_state(dom0, &back).unwrap() != XenbusState::Closed {
        assert!(begin.elapsed() < PATIENCE, "device was not closed");
        sleep(Duration::from_millis(10));
    }
    machine.end();
}

#[test]
fn disk_beyond_descriptor_limit_is_rejected_and_others_are_served() {
    // Enough descriptors for the process and one disk.
    let (mut machine, mut session) = Machine::with_descriptors(Descriptors::with_limit(64 + EACH));
    let (addr, dom0) = (machine.addr, &mut machine.dom0);
    let second = DeviceAddr { index: 51728, ..addr };
    let back = ToolstackBack::new(second, machine.image.path().to_str().unwrap());
    create_device(dom0, second, &back).unwrap();
    let begin = Instant::now();
    while read_state(dom0, &second.backend_path()).unwrap() != XenbusState::Closed {
        assert!(begin.elapsed() < PATIENCE, "device was not rejected");
        sleep(Duration::from_millis(10));
    }
    let why = read_error(dom0, &second.backend_path()).unwrap().unwrap();
    assert!(why.contains("file-descriptors") && why.contains("100 of 100"), "{why}");
    let mut sector = [0; 512];
    session.read_at(0, &mut sector).unwrap();
    session.close().unwrap();
    machine.end();
}

/// A device that counts its sessions. Unless `settles` is set, each check finds its session
/// superseded.
struct Restless {
    sessions: Rc<Cell<u64>>,
    settles: bool,
}

impl BackendClass for Restless {
    fn prepare(&mut self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<Prepared, Fault> {
        Ok(Prepared::Yes)
    }

    fn offer(&self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<(), HandshakeError> {
        Ok(())
    }

    fn connect(&mut self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<Poll<()>, Fault> {
        self.sessions.set(self.sessions.get() + 1);
        Ok(Poll::Ready(()))
    }

    fn describe(&self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<(), HandshakeError> {
        Ok(())
    }

    fn is_superseded(&mut self, _: &mut dyn Xenstore, _: &BackendContext) -> bool {
        !self.settles
    }

    fn check_for_changes(
        &mut self,
        _: &mut dyn Xenstore,
        _: &BackendContext,
    ) -> Result<(), HandshakeError> {
        Err(HandshakeError::Unwritable("injected handshake error"))
    }

    fn disconnect(&mut self) -> Poll<()> {
        Poll::Ready(())
    }

    fn fault(&mut self) -> Option<Fault> {
        None
    }
}

impl ReportStatus for Restless {
    fn status(&self) -> DeviceStatus {
        DeviceStatus::default()
    }
}

#[test]
fn guest_with_endless_transitions_exhausts_only_its_own_budget() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = Hypervisor::start(dir.path()).unwrap();
    let guests = ["one", "other"];
    let guests = guests.map(|name| hypervisor.create_domain(DomainConfig::new(name)).unwrap());
    let mut xs = hypervisor.xenstore().unwrap();
    let counts = [Rc::new(Cell::new(0)), Rc::new(Cell::new(0))];
    let shared = counts.clone();
    let create = move |addr: DeviceAddr, _| {
        let settles = addr.front == guests[1];
        let sessions = Rc::clone(&shared[usize::from(settles)]);
        BackendDriver::new(addr, Restless { sessions, settles })
    };
    let mut devices = Devices::new(vec![BackendKind::Vbd], DomId::DOM0, None, create);
    devices.watch(&mut xs).unwrap();
    let mut add = |front| {
        let addr = DeviceAddr::new(BackendKind::Vbd, DomId::DOM0, front, 51712);
        create_device(&mut xs, addr, &ToolstackBack::new(addr, "")).unwrap();
        write_state(&mut xs, &addr.frontend_path(), XenbusState::Initialised).unwrap();
    };
    guests.into_iter().for_each(&mut add);
    let mut turns = 0;
    // Each turn is short, and together they end when the budget is spent.
    while turns < 1000 && devices.next_step().is_none_or(|next| next <= Instant::now()) {
        while let Some(event) = xs.poll_event().unwrap() {
            devices.event(&event);
        }
        devices.step_pending(&mut xs).unwrap();
        turns += 1;
    }
    let [restless, calm] = counts.map(|count| count.get());
    assert!(turns < 1000, "{restless} sessions without an end");
    assert_eq!(calm, 1);
    assert!((1..100).contains(&restless), "{restless} sessions");
}

#[test]
fn size_change_that_cannot_be_announced_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = Hypervisor::start(dir.path()).unwrap();
    let guest = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
    let mut xs = hypervisor.xenstore().unwrap();
    let create = |addr: DeviceAddr, _| {
        BackendDriver::new(addr, Restless { sessions: Rc::default(), settles: true })
    };
    let served = Served::default();
    let mut devices = Devices::new(vec![BackendKind::Vbd], DomId::DOM0, None, create);
    devices = devices.with_polling().published_in(&served);
    devices.watch(&mut xs).unwrap();
    let addr = DeviceAddr::new(BackendKind::Vbd, DomId::DOM0, guest, 51712);
    create_device(&mut xs, addr, &ToolstackBack::new(addr, "")).unwrap();
    let begin = Instant::now();
    let mut unannounced = 0;
    while unannounced == 0 {
        assert!(begin.elapsed() < PATIENCE, "{:?}", served.counters());
        while let Some(event) = xs.poll_event().unwrap() {
            devices.event(&event);
        }
        devices.step_pending(&mut xs).unwrap();
        devices.check_for_changes(&mut xs).unwrap();
        let counters = served.counters();
        unannounced = counters.first().map_or(0, |device| {
            device["events"]["untold-changes"].as_u64().expect("counter is in the statistics")
        });
        sleep(Duration::from_millis(10));
    }
}
