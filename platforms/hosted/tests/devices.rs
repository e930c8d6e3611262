//! Device processes: several processes act for one domain, each for one device.

mod support;

use libtest_mimic::{Arguments, Trial};
use pvio_event_channel::{
    DeviceDescriptors, DevicePlatform, DeviceScope, EventChannel, EventChannels, EventError, Port,
};
use pvio_grant_table::{Access, Busy, DomId, GrantError, GrantMapper, GrantStatus, Granter};
use pvio_hosted::{Domain, DomainConfig, HypervisorEvent};
use pvio_ring::shm::Region;
use pvio_xenbus::Xenstore;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::time::Instant;
use support::process::{Process, serve};
use support::{Host, LOST};

fn main() {
    if serve() {
        return;
    }
    let tests: [(&str, fn()); 14] = [
        ("device_process_serves_only_its_frontend", device_process_serves_only_its_frontend),
        (
            "killed_device_process_leaves_other_devices_running",
            killed_device_process_leaves_other_devices_running,
        ),
        (
            "successor_maps_grants_and_binds_port_of_killed_process",
            successor_maps_grants_and_binds_port_of_killed_process,
        ),
        (
            "successor_with_earlier_connection_takes_over",
            successor_with_earlier_connection_takes_over,
        ),
        (
            "grant_of_two_device_processes_is_busy_until_both_end",
            grant_of_two_device_processes_is_busy_until_both_end,
        ),
        ("process_killed_during_map_leaves_no_use", process_killed_during_map_leaves_no_use),
        ("no_wakeup_is_lost_with_device_process", no_wakeup_is_lost_with_device_process),
        ("confined_device_process_opens_nothing", confined_device_process_opens_nothing),
        ("device_survives_replacement_of_supervisor", device_survives_replacement_of_supervisor),
        (
            "rejoinable_domain_exists_until_it_is_destroyed",
            rejoinable_domain_exists_until_it_is_destroyed,
        ),
        ("joining_again_ends_unused_grants", joining_again_ends_unused_grants),
        ("ports_and_channels_of_device_are_limited", ports_and_channels_of_device_are_limited),
        (
            "device_does_not_reach_new_domain_with_frontends_number",
            device_does_not_reach_new_domain_with_frontends_number,
        ),
        ("device_connection_is_denied_other_requests", device_connection_is_denied_other_requests),
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    libtest_mimic::run(&Arguments::from_args(), tests.map(trial).into()).exit();
}

fn scope(frontend: DomId) -> DeviceScope {
    DeviceScope { frontend, queues: 1, channels: 4, ports: None }
}

fn device(supervisor: &Domain, frontend: DomId) -> Process {
    Process::device(supervisor.device_descriptors(&scope(frontend)).unwrap())
}

/// Guest in its own process, with a granted page and a port for the driver domain.
struct Guest {
    process: Process,
    id: DomId,
    gref: String,
    port: String,
}

impl Guest {
    fn new(host: &Host, name: &str, driver: DomId) -> Self {
        let id = host.create(name);
        let mut process = Process::domain(host.dir.path(), id);
        assert_eq!(process.ask("alloc 4"), "done");
        let gref = process.ask(format!("grant {driver} 0 rw"));
        let port = process.ask(format!("listen {driver}"));
        Self { process, id, gref, port }
    }

    fn map(&self) -> String {
        format!("map {} rw {}", self.id, self.gref)
    }

    fn bind(&self) -> String {
        format!("bind {} {}", self.id, self.port)
    }

    /// Makes a device process map the page and bind the port.
    fn connect(&self, device: &mut Process) {
        assert_eq!(device.ask(self.map()), "done");
        assert_eq!(device.ask(self.bind()), "done");
        assert_eq!(device.ask("wait"), "done", "event after bind");
    }

    fn exchange(&mut self, device: &mut Process, turns: u32) {
        assert_eq!(self.process.ask("write 0 \0\0\0\0\0\0\0\0"), "done");
        self.process.tell(format!("lockstep first {turns}"));
        device.tell(format!("lockstep second {turns}"));
        assert_eq!((self.process.answer(), device.answer()), ("done".into(), "done".into()));
    }

    /// Ends the grant, which may be in use until the hypervisor has seen the end of a process.
    fn end(&mut self) {
        let until = Instant::now() + LOST;
        while self.process.ask(format!("end {}", self.gref)) != "done" {
            assert!(Instant::now() < until, "the grant stays in use");
        }
    }
}

fn device_process_serves_only_its_frontend() {
    let host = Host::new();
    let driver = host.domain("driver");
    let mut a = Guest::new(&host, "a", driver.id());
    let mut b = Guest::new(&host, "b", driver.id());
    let (mut of_a, mut of_b) = (device(&driver, a.id), device(&driver, b.id));
    for (guest, other) in [(&b, &mut of_a), (&a, &mut of_b)] {
        assert_eq!(other.ask(guest.map()), "grant-permission-denied");
        assert_eq!(other.ask(guest.bind()), "event-bad-port");
    }
    a.connect(&mut of_a);
    b.connect(&mut of_b);
    a.exchange(&mut of_a, 500);
    b.exchange(&mut of_b, 500);
    let driver = host.hypervisor.domains().into_iter().find(|d| d.id == driver.id()).unwrap();
    assert_eq!((driver.ports, driver.devices), (2, 2));
}

fn killed_device_process_leaves_other_devices_running() {
    let host = Host::new();
    let driver = host.domain("driver");
    let mut a = Guest::new(&host, "a", driver.id());
    let mut b = Guest::new(&host, "b", driver.id());
    let (mut of_a, mut of_b) = (device(&driver, a.id), device(&driver, b.id));
    a.connect(&mut of_a);
    b.connect(&mut of_b);
    assert_eq!(a.process.ask(format!("end {}", a.gref)), "busy");
    b.process.tell("lockstep first 20000");
    of_b.tell("lockstep second 20000");
    of_a.kill();
    a.end();
    assert_eq!(a.process.ask("notify"), "done");
    assert_eq!((b.process.answer(), of_b.answer()), ("done".into(), "done".into()));
    assert_eq!(b.process.ask(format!("end {}", b.gref)), "busy");
    driver.xenstore().unwrap().read("name").unwrap();
}

fn successor_maps_grants_and_binds_port_of_killed_process() {
    let host = Host::new();
    let driver = host.domain("driver");
    let mut guest = Guest::new(&host, "guest", driver.id());
    for round in 0..20 {
        let mut device = device(&driver, guest.id);
        guest.connect(&mut device);
        guest.exchange(&mut device, 50);
        assert_eq!(device.ask(format!("write 8 round{round:02}")), "done");
        device.kill();
        // Sent while no process has the other end.
        assert_eq!(guest.process.ask("notify"), "done");
        assert_eq!(guest.process.ask("read 8 7"), format!("round{round:02}"));
    }
    guest.end();
}

/// A process that waits for another one to die has its connection before that.
fn successor_with_earlier_connection_takes_over() {
    let host = Host::new();
    let driver = host.domain("driver");
    let mut guest = Guest::new(&host, "guest", driver.id());
    let mut now = device(&driver, guest.id);
    for _ in 0..20 {
        let mut next = device(&driver, guest.id);
        guest.connect(&mut now);
        assert_eq!(next.ask(guest.bind()), "event-bad-port", "bound by the first process");
        now.kill();
        guest.connect(&mut next);
        guest.exchange(&mut next, 20);
        assert_eq!(guest.process.ask(format!("end {}", guest.gref)), "busy");
        assert_eq!(next.ask("unmap"), "done");
        now = next;
        // The port is closed with the next connection.
        now.kill();
        now = device(&driver, guest.id);
    }
    guest.end();
}

fn grant_of_two_device_processes_is_busy_until_both_end() {
    let host = Host::new();
    let driver = host.domain("driver");
    let mut guest = Guest::new(&host, "guest", driver.id());
    let (mut first, mut second) = (device(&driver, guest.id), device(&driver, guest.id));
    assert_eq!((first.ask(guest.map()), second.ask(guest.map())), ("done".into(), "done".into()));
    first.kill();
    // The hypervisor processes the end of the first process before this request.
    drop(driver.alloc_unbound(driver.id()).unwrap());
    assert_eq!(guest.process.ask(format!("end {}", guest.gref)), "busy");
    second.kill();
    guest.end();
}

fn process_killed_during_map_leaves_no_use() {
    let host = Host::new();
    let driver = host.domain("driver");
    let mut guest = Guest::new(&host, "guest", driver.id());
    for round in 0..20 {
        let mut device = device(&driver, guest.id);
        assert_eq!(device.ask(format!("storm {} {}", guest.id, guest.gref)), "done");
        // The process is killed at a random point of its loop.
        std::thread::sleep(std::time::Duration::from_micros(97 * round));
        device.kill();
        guest.end();
        guest.gref = guest.process.ask(format!("grant {} 0 rw", driver.id()));
    }
}

fn no_wakeup_is_lost_with_device_process() {
    let host = Host::new();
    let driver = host.domain("driver");
    let mut guest = Guest::new(&host, "guest", driver.id());
    let mut device = device(&driver, guest.id);
    guest.connect(&mut device);
    guest.exchange(&mut device, 20_000);
    guest.process.tell("flood first 500000");
    device.tell("flood second 500000");
    assert_eq!((guest.process.answer(), device.answer()), ("done".into(), "done".into()));
}

fn confined_device_process_opens_nothing() {
    if !rustix::process::getuid().is_root() {
        // Bypasses the test harness, which hides the output of passing tests.
        let skipped = "SKIPPED: only root can change the root directory; run this test as root\n";
        std::io::Write::write_all(&mut std::io::stderr(), skipped.as_bytes()).unwrap();
        return;
    }
    let host = Host::new();
    let driver = host.domain("driver");
    let mut guest = Guest::new(&host, "guest", driver.id());
    let mut device = device(&driver, guest.id);
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(device.ask(format!("confine {}", empty.path().display())), "done");
    guest.connect(&mut device);
    guest.exchange(&mut device, 100);
    // Pages in any order, which are mapped one by one.
    let more: Vec<_> =
        [3, 1].map(|page| guest.process.ask(format!("grant {} {page} rw", driver.id()))).into();
    assert_eq!(device.ask(format!("map {} rw {}", guest.id, more.join(" "))), "done");
    assert_eq!(device.ask("write 4094 ab"), "done");
    assert_eq!(device.ask("write 4096 cd"), "done");
    assert_eq!(guest.process.ask(format!("read {} 2", 4 * 4096 - 2)), "ab");
    assert_eq!(guest.process.ask("read 4096 2"), "cd");
}

fn device_survives_replacement_of_supervisor() {
    let host = Host::new();
    let driver = host.domain("driver");
    let id = driver.id();
    let mut guest = Guest::new(&host, "guest", id);
    let mut device = device(&driver, guest.id);
    guest.connect(&mut device);
    let own = driver.alloc_unbound(guest.id).unwrap();
    assert!(host.hypervisor.events().try_iter().count() >= 2);
    drop(own);
    drop(driver);
    let events = host.hypervisor.events();
    assert_eq!(events.recv_timeout(LOST), Ok(HypervisorEvent::Left { domid: id }));
    let info = host.hypervisor.domains().into_iter().find(|domain| domain.id == id).unwrap();
    assert_eq!((info.pid, info.ports, info.devices), (None, 1, 1));
    guest.exchange(&mut device, 500);

    let next = host.join(id);
    next.xenstore().unwrap().read("name").unwrap();
    let mut second = crate::device(&next, guest.id);
    assert_eq!(second.ask(guest.bind()), "event-bad-port", "bound by the first device process");
    guest.exchange(&mut device, 500);
    device.kill();
    guest.connect(&mut second);
    guest.exchange(&mut second, 500);

    // The last connection of all ends the domain.
    drop(next);
    assert_eq!(events.iter().nth(1), Some(HypervisorEvent::Left { domid: id }));
    second.kill();
    assert_eq!(events.recv_timeout(LOST), Ok(HypervisorEvent::Died { domid: id }));
    guest.end();
}

fn rejoinable_domain_exists_until_it_is_destroyed() {
    let host = Host::new();
    let config = DomainConfig::new("driver").memory_pages(4).rejoinable(true);
    let id = host.hypervisor.create_domain(config).unwrap();
    let events = host.hypervisor.events();
    for _ in 0..3 {
        drop(host.join(id));
        assert_eq!(events.recv_timeout(LOST), Ok(HypervisorEvent::Joined { domid: id }));
        assert_eq!(events.recv_timeout(LOST), Ok(HypervisorEvent::Left { domid: id }));
    }
    host.hypervisor.xenstore().unwrap().read(&format!("/local/domain/{id}/name")).unwrap();
    host.hypervisor.destroy_domain(id).unwrap();
    assert_eq!(events.recv_timeout(LOST), Ok(HypervisorEvent::Died { domid: id }));
}

fn joining_again_ends_unused_grants() {
    let host = Host::new();
    let config = DomainConfig::new("driver").memory_pages(4).rejoinable(true);
    let id = host.hypervisor.create_domain(config).unwrap();
    let user = host.domain("user");
    let first = host.join(id);
    let pages = first.alloc_pages(4).unwrap();
    pages.write_bytes(2 * 4096, b"in use").unwrap();
    let [busy, unused] =
        [2, 1].map(|page| first.grant(user.id(), &pages, page, Access::ReadWrite).unwrap());
    let mapping = user.map(id, &[busy], Access::ReadOnly).unwrap();
    let port = user.alloc_unbound(id).unwrap();
    let bound = first.bind_interdomain(user.id(), port.port()).unwrap();
    assert!(port.is_bound());
    drop((bound, pages, first));
    let left = host.hypervisor.events().iter().find(|e| matches!(e, HypervisorEvent::Left { .. }));
    assert_eq!(left, Some(HypervisorEvent::Left { domid: id }));
    assert!(!port.is_bound());

    let second = host.join(id);
    let denied = user.map(id, &[unused], Access::ReadOnly);
    assert_eq!(denied.err(), Some(GrantStatus::BadGrantRef), "ended");
    assert_eq!(second.alloc_pages(3).err(), Some(GrantError::OutOfPages), "page 2 is in use");
    let pages = second.alloc_pages(2).unwrap();
    let more = second.grant(user.id(), &pages, 0, Access::ReadOnly).unwrap();
    assert_ne!(more, busy);
    assert_eq!(second.end_access(more), Ok(()));
    let mut seen = [0; 6];
    mapping.read_bytes(0, &mut seen).unwrap();
    assert_eq!(&seen, b"in use");
    assert!(second.bind_interdomain(user.id(), port.port()).is_ok());
}

fn ports_and_channels_of_device_are_limited() {
    let host = Host::new();
    let (driver, guest) = (host.domain("driver"), host.domain("guest"));
    let ends: Vec<_> = (0..4).map(|_| guest.alloc_unbound(driver.id()).unwrap()).collect();
    let ports = ends[..3].iter().map(EventChannel::port).collect();
    let limited = DeviceScope { channels: 2, ports: Some(ports), ..scope(guest.id()) };
    let device = Domain::from_descriptors(driver.device_descriptors(&limited).unwrap()).unwrap();
    let bind = |end: usize| device.bind_interdomain(guest.id(), ends[end].port());
    assert_eq!(bind(3).err(), Some(EventError::BadPort), "not listed");
    let (first, second) = (bind(0).unwrap(), bind(1).unwrap());
    assert_eq!(bind(2).err(), Some(EventError::NoPorts));
    drop(first);
    let third = bind(2).unwrap();
    assert!(second.take().unwrap() && third.take().unwrap());
    assert_eq!(bind(0).err(), Some(EventError::NoPorts));

    let listed = |ports| DeviceScope { ports: Some(ports), ..scope(guest.id()) };
    let many = driver.device_descriptors(&listed(vec![Port(1); 1025])).unwrap_err();
    assert_eq!(many.code(), "device-ports");
    driver.device_descriptors(&listed(vec![Port(1); 1024])).unwrap();
    for absent in [DomId(300), DomId::SELF] {
        let error = driver.device_descriptors(&scope(absent)).unwrap_err();
        assert_eq!(error.code(), "device-no-frontend");
    }
}

fn device_does_not_reach_new_domain_with_frontends_number() {
    let host = Host::new();
    let driver = host.domain("driver");
    let guest = host.domain("guest");
    let id = guest.id();
    let device = Domain::from_descriptors(driver.device_descriptors(&scope(id)).unwrap()).unwrap();
    let page = guest.alloc_pages(1).unwrap();
    let gref = guest.grant(driver.id(), &page, 0, Access::ReadWrite).unwrap();
    let mapping = device.map(id, &[gref], Access::ReadWrite).unwrap();
    drop((page, guest));
    host.wait_death(id);
    mapping.write_bytes(0, b"still mapped").unwrap();
    host.hypervisor.create_domain(DomainConfig::new("other").id(id)).unwrap();
    let other = host.join(id);
    let page = other.alloc_pages(1).unwrap();
    let gref = other.grant(driver.id(), &page, 0, Access::ReadWrite).unwrap();
    let port = other.alloc_unbound(driver.id()).unwrap().port();
    let denied = device.map(id, &[gref], Access::ReadWrite).err();
    assert_eq!(denied, Some(GrantStatus::PermissionDenied));
    assert_eq!(device.bind_interdomain(id, port).err(), Some(EventError::BadPort));
    drop(mapping);
    // The supervisor reaches the new domain.
    let mapping = driver.map(id, &[gref], Access::ReadWrite).unwrap();
    assert_eq!(other.end_access(gref), Err(Busy(gref)));
    drop(mapping);
}

fn device_connection_is_denied_other_requests() {
    let host = Host::new();
    let (driver, guest) = (host.domain("driver"), host.domain("guest"));
    let descriptors = || driver.device_descriptors(&scope(guest.id())).unwrap();
    let device = Domain::from_descriptors(descriptors()).unwrap();
    assert_eq!(device.id(), driver.id());
    assert_eq!(device.xenstore().err().unwrap().code(), "xenstore-denied");
    assert_eq!(device.alloc_unbound(guest.id()).err(), Some(EventError::BadPort));
    let denied = GrantError::Refused(GrantStatus::PermissionDenied);
    assert_eq!(device.alloc_pages(1).err(), Some(denied));
    let error = device.device_descriptors(&scope(guest.id())).unwrap_err();
    assert_eq!(error.code(), "device-denied");
    let mut two = descriptors();
    two.fds.extend(descriptors().fds);
    let error = Domain::from_descriptors(two).unwrap_err();
    assert_eq!(error.code(), "device-descriptors");

    // Ports of the supervisor and of other devices cannot be closed.
    let end = guest.alloc_unbound(driver.id()).unwrap();
    let bound = device.bind_interdomain(guest.id(), end.port()).unwrap();
    let DeviceDescriptors { fds, .. } = descriptors();
    let ask = |op: u16, domain: u16, port: u32| {
        let mut bytes = b"PVH2".to_vec();
        bytes.extend([op.to_le_bytes(), domain.to_le_bytes()].concat());
        bytes.extend([port.to_le_bytes(), [0; 4]].concat());
        send(&fds[0], &bytes, SendFlags::NOSIGNAL).unwrap();
        let mut reply = [0; 64];
        let (got, _) = recv(&fds[0], &mut reply, RecvFlags::empty()).unwrap();
        (got > 0).then_some(reply[4])
    };
    let bad_port = Some(4);
    assert_eq!(ask(5, 0, bound.port().0), bad_port);
    assert_eq!(ask(5, 0, 4095), bad_port);
    assert!(end.is_bound());
    // A device connection cannot join as a domain; the attempt closes it.
    assert_eq!(ask(1, guest.id().0, 0), None);
    assert!(end.is_bound());
    drop(device);
    drop(bound);
    assert!(!end.is_bound());
}
