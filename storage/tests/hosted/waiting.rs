//! A thread that steps several disks blocks for none of them: not for an image, a server, a
//! frontend or a worker.

use crate::fuse::can_serve_files;
use crate::machine::{Machine, PATIENCE, image};
use crate::storage::SlowStorage;
use pvio_blkback::{Config, Policy, Vbd};
use pvio_blkfront::Op;
use pvio_blkfront::blocking::{BlockingDisk, DiskError};
use pvio_event_channel::{BackendPlatform, EventChannels, EventError, Port};
use pvio_grant_table::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
use pvio_hosted::Domain;
use pvio_storage::host::ImageServer;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendDriver, Life};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, read_error, read_state, request_removal, write_state,
};
use pvio_xenbus::handshake::vbd::{OWN_KIND, ToolstackBack, create_device};
use pvio_xenbus::{XenbusState, Xenstore};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

/// A driver domain whose devices are stepped on the test's own thread.
struct Daemon<P: BackendPlatform<Channel: AsFd> + Send + 'static> {
    machine: Machine,
    platform: P,
    guest: Domain,
    xs: Client,
    dom0: Client,
    devices: Vec<BackendDriver<Vbd<ImageServer<P>>>>,
}

impl<P: BackendPlatform<Channel: AsFd> + Send + 'static> Daemon<P> {
    fn new(policy: Policy, platform: impl FnOnce(Domain) -> P) -> Self {
        let machine = Machine::new(Config { policy, ..Config::default() });
        let domain = machine.join(machine.driver);
        let (xs, dom0) = (domain.xenstore().unwrap(), machine.xenstore());
        let guest = machine.join(machine.guest);
        Self { machine, platform: platform(domain), guest, xs, dom0, devices: Vec::new() }
    }

    fn add(&mut self, params: &str, options: &str) -> DeviceAddr {
        let index = 51712 + 16 * self.devices.len() as u32;
        let (back, front) = (self.machine.driver, self.machine.guest);
        let addr = DeviceAddr::new(BackendKind::Vbd, back, front, index);
        let mut words = ToolstackBack::new(addr, params);
        words.kind = OWN_KIND.into();
        words.options = Some(options.into()).filter(|text: &Vec<u8>| !text.is_empty());
        create_device(&mut self.dom0, addr, &words).unwrap();
        let server = ImageServer::new(self.platform.clone(), std::sync::Arc::new(|| ()));
        let vbd = Vbd::with(server, self.machine.config);
        self.devices.push(BackendDriver::restarted(addr, vbd));
        addr
    }

    /// Steps every device until a condition holds.
    fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let begin = Instant::now();
        while !is_so(self) {
            assert!(begin.elapsed() < PATIENCE, "timeout: {what}");
            let xs = &mut self.xs;
            self.devices.retain_mut(|device| device.step(xs).unwrap() != Life::Gone);
            self.xs.wait_event(Some(Duration::from_millis(5))).unwrap();
        }
    }

    fn until_state(&mut self, addr: DeviceAddr, state: XenbusState) {
        self.until(&format!("{addr:?} is {state}"), |d| d.state(addr) == state);
    }

    fn state(&mut self, addr: DeviceAddr) -> XenbusState {
        read_state(&mut self.dom0, &addr.backend_path()).unwrap()
    }

    fn error(&mut self, addr: DeviceAddr) -> String {
        read_error(&mut self.dom0, &addr.backend_path()).unwrap().unwrap_or_default()
    }

    /// The guest attaches a disk and reads from it.
    fn attach(
        &self,
        addr: DeviceAddr,
    ) -> JoinHandle<Result<BlockingDisk<Domain, Client>, DiskError>> {
        let guest = self.guest.clone();
        spawn(move || {
            let xs = guest.xenstore().unwrap();
            let mut session = BlockingDisk::attach(guest, xs, addr, PATIENCE)?;
            session.read_at(0, &mut [0; 4096])?;
            Ok(session)
        })
    }

    fn attached(&mut self, addr: DeviceAddr) -> BlockingDisk<Domain, Client> {
        let guest = self.attach(addr);
        self.until("the guest has its disk", |_| guest.is_finished());
        guest.join().unwrap().unwrap()
    }

    fn closed(&mut self, session: BlockingDisk<Domain, Client>) {
        let guest = spawn(move || session.close().unwrap());
        self.until("the guest has closed its disk", |_| guest.is_finished());
        guest.join().unwrap();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn silent_nbd_server_delays_only_its_own_disk() {
    let mut daemon = Daemon::new(Policy::PersistentOrCopy, |domain| domain);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = image(1 << 20);
    let port = silent.local_addr().unwrap().port();
    let slow = daemon.add(&format!("nbd://127.0.0.1:{port}/x"), "");
    let other = daemon.add(text(file.path()), "");
    let session = daemon.attached(other);
    assert_eq!(daemon.state(slow), XenbusState::Initialising, "{}", daemon.error(slow));
    // The server does not only stay silent, but ends.
    drop(silent);
    daemon.until_state(slow, XenbusState::Closed);
    let why = daemon.error(slow);
    assert!(why.contains("nbd-"), "{why}");
    daemon.closed(session);
}

#[test]
fn storage_blocked_in_stat_delays_only_its_own_disk() {
    if !can_serve_files() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let storage = SlowStorage::new(vec![1; 1 << 20]);
    let mounted = storage.mount(dir.path());
    let mut daemon = Daemon::new(Policy::PersistentOrCopy, |domain| domain);
    let slow = daemon.add(text(&dir.path().join("disk")), "");
    let mut session = daemon.attached(slow);
    storage.hold_attributes();
    // If the thread that drives all devices waited for this, nothing would end its wait earlier.
    let (hung, late) = (storage.clone(), channel::<()>());
    let rescue = spawn(move || {
        let rescued = late.1.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
        hung.release_attributes();
        rescued
    });
    daemon.devices[0].check_for_changes(&mut daemon.xs).unwrap();
    daemon.until("storage is queried for its size", |_| storage.holds_attributes());
    let file = image(1 << 20);
    let other = daemon.add(text(file.path()), "");
    let second = daemon.attached(other);
    daemon.devices[0].check_for_changes(&mut daemon.xs).unwrap();
    assert!(storage.holds_attributes(), "storage responded too early");
    storage.set_len(3 << 20);
    drop(late.0);
    assert!(!rescue.join().unwrap(), "other device was delayed");
    daemon.until("guest sees the new size", |_| {
        session.queue().unwrap();
        session.size() == 3 << 20
    });
    daemon.closed(second);
    daemon.closed(session);
    drop(daemon);
    drop(mounted);
}

#[test]
fn busy_image_is_opened_after_its_holder_releases_it() {
    let mut daemon = Daemon::new(Policy::PersistentOrCopy, |domain| domain);
    let file = image(1 << 20);
    let source = daemon.add(text(file.path()), "");
    let session = daemon.attached(source);
    let target = daemon.add(text(file.path()), "");
    let guest = daemon.attach(target);
    daemon.until("second guest requests its disk", |d| {
        read_state(&mut d.dom0, &target.frontend_path()).unwrap() == XenbusState::Initialised
    });
    assert_eq!(daemon.state(target), XenbusState::InitWait);
    let why = daemon.error(target);
    assert!(why.contains("image-busy"), "{why}");
    // The first domain is destroyed.
    request_removal(&mut daemon.dom0, source).unwrap();
    daemon.closed(session);
    daemon.until("second guest has its disk", |_| guest.is_finished());
    let session = guest.join().unwrap().unwrap();
    assert_eq!((daemon.state(target), daemon.error(target)), (XenbusState::Connected, "".into()));
    daemon.closed(session);
}

#[test]
fn busy_image_closes_device_after_busy_timeout() {
    let mut daemon = Daemon::new(Policy::PersistentOrCopy, |domain| domain);
    let file = image(1 << 20);
    let first = daemon.add(text(file.path()), "");
    let session = daemon.attached(first);
    let second = daemon.add(text(file.path()), "busy-timeout=100ms");
    daemon.until_state(second, XenbusState::Closed);
    let why = daemon.error(second);
    assert!(why.contains("image-busy"), "{why}");
    daemon.closed(session);
}

#[test]
fn throttled_requests_are_completed_when_frontend_closes() {
    let mut daemon = Daemon::new(Policy::Copy, |domain| domain);
    let file = image(1 << 20);
    // One operation per second, each taking an hour.
    let addr = daemon.add(text(file.path()), "");
    let mut session = daemon.attached(addr);
    let mut dom0 = daemon.machine.xenstore();
    ToolstackBack::write_options(&mut dom0, addr, "iops=1,latency=3600s").unwrap();
    let xs = &mut daemon.xs;
    daemon.devices[0].refresh(xs).unwrap();
    let stats = daemon.devices[0].class().stats()[0].clone();
    let before = stats.copied_pages.get();
    let queue = session.queue().unwrap();
    let mut writes = 0;
    while let Some(slot) = queue.reserve() {
        queue.fill(slot, 0, &[0xee; 512]).unwrap();
        queue.start(slot, Op::Write { sector: writes, bytes: 512 }).unwrap();
        writes += 1;
    }
    queue.publish().unwrap();
    daemon.until("backend has taken all requests", |_| stats.copied_pages.get() >= before + writes);
    assert_eq!(stats.writes.get(), 0, "no request has completed");
    write_state(&mut dom0, &addr.frontend_path(), XenbusState::Closed).unwrap();
    daemon.until_state(addr, XenbusState::Closed);
    assert_eq!((stats.writes.get(), writes > 8), (writes, true));
    let bytes = std::fs::read(file.path()).unwrap();
    assert!(bytes[..writes as usize * 512].iter().all(|byte| *byte == 0xee));
    // The frontend ends without closing.
    std::mem::forget(session);
}

/// A platform with a bug that panics in its callers.
#[derive(Clone)]
struct Panicky(Domain);

impl GrantMapper for Panicky {
    type Mapping = <Domain as GrantMapper>::Mapping;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus> {
        self.0.map(domain, grefs, access)
    }

    fn map_each(
        &self,
        _: DomId,
        _: &[GrantRef],
        _: Access,
        _: &mut dyn FnMut(usize, Result<Self::Mapping, GrantStatus>),
    ) {
        panic!("injected panic in the worker")
    }
}

impl GrantCopier for Panicky {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        self.0.copy(ops);
    }
}

impl EventChannels for Panicky {
    type Channel = <Domain as EventChannels>::Channel;

    fn alloc_unbound(&self, remote: DomId) -> Result<Self::Channel, EventError> {
        self.0.alloc_unbound(remote)
    }

    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Self::Channel, EventError> {
        self.0.bind_interdomain(remote, port)
    }
}

#[test]
fn panicked_worker_closes_device_with_reason() {
    let mut daemon = Daemon::new(Policy::Map, Panicky);
    let file = image(1 << 20);
    let addr = daemon.add(text(file.path()), "");
    let guest = daemon.attach(addr);
    daemon.until_state(addr, XenbusState::Closed);
    let why = daemon.error(addr);
    assert!(why.contains("worker-panicked"), "{why}");
    daemon.until("guest sees the backend close", |_| guest.is_finished());
    assert!(guest.join().unwrap().is_err());
}
