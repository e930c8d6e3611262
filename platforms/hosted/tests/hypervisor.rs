//! Start, domain creation, join, and the protocol of the hypervisor's socket.

mod support;

use pvio_event_channel::{EventChannel, EventChannels, EventError};
use pvio_grant_table::{Access, DomId, GrantMapper, GrantStatus, Granter};
use pvio_hosted::{
    Domain, DomainConfig, DomainError, Hypervisor, HypervisorEvent, JoinError, StartError,
};
use pvio_ring::shm::Region;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send, socket,
};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use support::{Host, LOST};

#[test]
fn second_hypervisor_in_same_directory_is_rejected() {
    let host = Host::new();
    let second = Hypervisor::start(host.dir.path()).unwrap_err();
    assert!(matches!(&second, StartError::Running(dir) if dir == host.dir.path()));
    assert!(second.to_string().contains("a pvio hypervisor is running in"));
    host.domain("still-served");
}

#[test]
fn stopped_hypervisor_removes_its_sockets() {
    let Host { hypervisor, dir } = Host::new();
    drop(hypervisor);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(matches!(Domain::join(dir.path(), DomId(1)), Err(JoinError::NoHypervisor(_))));
    Hypervisor::start(dir.path()).unwrap();
}

#[test]
fn stale_socket_of_dead_hypervisor_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hypervisor.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(matches!(
        Domain::join(dir.path(), DomId(1)),
        Err(JoinError::NoHypervisor(_) | JoinError::Io(_))
    ));
    let hypervisor = Hypervisor::start(dir.path()).unwrap();
    let id = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
    Domain::join(dir.path(), id).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn directory_with_too_long_path_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120));
    assert!(matches!(Hypervisor::start(&deep), Err(StartError::PathTooLong(_))));
}

#[test]
fn domain_name_or_id_in_use_is_rejected() {
    let host = Host::new();
    let id = host.create("guest");
    assert_eq!(id, DomId(1));
    let again = host.hypervisor.create_domain(DomainConfig::new("guest"));
    assert!(matches!(again, Err(DomainError::NameInUse(name)) if name == "guest"));
    let again = host.hypervisor.create_domain(DomainConfig::new("other").id(id));
    assert!(matches!(again, Err(DomainError::IdInUse(taken)) if taken == id));
    let control = DomainConfig::new("Domain-0").id(DomId::DOM0);
    assert_eq!(host.hypervisor.create_domain(control).unwrap(), DomId::DOM0);
    host.hypervisor.destroy_domain(id).unwrap();
    assert!(matches!(host.hypervisor.destroy_domain(id), Err(DomainError::NoDomain(_))));
    assert_eq!(host.create("guest"), DomId(2), "domain numbers are reused as late as possible");
}

#[test]
fn invalid_domain_configuration_is_rejected() {
    let host = Host::new();
    let long = "x".repeat(65);
    for name in ["", "a/b", "a b", "a\0", "é", long.as_str()] {
        let made = host.hypervisor.create_domain(DomainConfig::new(name));
        assert!(matches!(made, Err(DomainError::BadName(_))), "{name:?}");
    }
    let good = || DomainConfig::new("guest");
    for bad in [
        good().memory_pages(0),
        good().memory_pages(u32::MAX),
        good().grant_frames(0),
        good().grant_frames(65),
        good().max_ports(0),
        good().max_ports(4096),
    ] {
        let made = host.hypervisor.create_domain(bad);
        assert!(matches!(made, Err(DomainError::OutOfRange { .. })));
    }
    assert!(host.hypervisor.create_domain(good().id(DomId::SELF)).is_err());
    assert!(host.hypervisor.domains().is_empty());
    let most = good().memory_pages(1 << 24).grant_frames(64).max_ports(4095);
    host.join(host.hypervisor.create_domain(most).unwrap());
}

#[test]
fn domain_is_joined_by_one_process_at_a_time() {
    let host = Host::new();
    let id = host.create("guest");
    assert!(matches!(Domain::join(host.dir.path(), DomId(9)), Err(JoinError::NoDomain(_))));
    assert!(matches!(Domain::join(host.dir.path(), DomId::SELF), Err(JoinError::NoDomain(_))));
    let domain = host.join(id);
    assert!(matches!(Domain::join(host.dir.path(), id), Err(JoinError::Taken(_))));
    assert_eq!(host.hypervisor.domains()[0].pid, Some(std::process::id().cast_signed()));
    let clone = domain.clone();
    drop(domain);
    let events = host.hypervisor.events();
    assert_eq!(events.recv_timeout(LOST), Ok(HypervisorEvent::Joined { domid: id }));
    assert!(events.is_empty());
    drop(clone);
    assert_eq!(events.recv_timeout(LOST), Ok(HypervisorEvent::Died { domid: id }));
    assert!(matches!(Domain::join(host.dir.path(), id), Err(JoinError::NoDomain(_))));
    assert!(host.hypervisor.domains().is_empty());
}

#[test]
fn domain_keeps_mappings_and_channels_after_hypervisor_stops() {
    let Host { hypervisor, dir } = Host::new();
    let [front, back] = ["front", "back"].map(|name| {
        Domain::join(dir.path(), hypervisor.create_domain(DomainConfig::new(name)).unwrap())
            .unwrap()
    });
    let page = front.alloc_pages(1).unwrap();
    let gref = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
    let a = front.alloc_unbound(back.id()).unwrap();
    let b = back.bind_interdomain(front.id(), a.port()).unwrap();
    drop(back.map(front.id(), &[gref], Access::ReadOnly).unwrap());
    drop(hypervisor);
    assert_eq!(back.alloc_unbound(front.id()).err(), Some(EventError::Hypervisor));
    let more = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
    let mapping = back.map(front.id(), &[more], Access::ReadWrite).unwrap();
    mapping.write_bytes(0, b"still here").unwrap();
    b.notify().unwrap();
    assert!(a.wait(Some(LOST)).unwrap());
    let mut seen = [0; 10];
    page.read_bytes(0, &mut seen).unwrap();
    assert_eq!(&seen, b"still here");
    assert_eq!(
        front.map(back.id(), &[gref], Access::ReadOnly).err(),
        Some(GrantStatus::GeneralError),
        "memory of a peer that was never mapped is not available"
    );
}

fn knock(dir: &Path) -> OwnedFd {
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(dir.join("hypervisor.sock")).unwrap()).unwrap();
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(LOST),
    )
    .unwrap();
    socket
}

/// Returns the reply, or `None` if the hypervisor closed the connection.
fn answer(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = [0; 64];
    match recv(socket, &mut bytes, RecvFlags::empty()) {
        Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => None,
        Ok((got, _)) => Some(bytes[..got].to_vec()),
        Err(why) => panic!("neither a response nor a closed connection: {why}"),
    }
}

fn packet(op: u16, domain: u16, port: u32) -> Vec<u8> {
    let mut bytes = b"PVH2".to_vec();
    bytes.extend(op.to_le_bytes());
    bytes.extend(domain.to_le_bytes());
    bytes.extend(port.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

#[test]
fn malformed_packet_closes_only_its_connection() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let guest = host.create("guest").0;
    let mut wrong_magic = packet(1, guest, 0);
    wrong_magic[3] = b'9';
    for bytes in [
        vec![0],
        vec![0xff; 16],
        vec![0; 4096],
        packet(1, guest, 0)[..15].to_vec(),
        [packet(1, guest, 0), vec![0]].concat(),
        wrong_magic,
        packet(0, 0, 0),
        packet(8, 0, 0),
        packet(6, guest, 1),
        packet(1, 0x7ff0, 0),
        packet(1, guest, 1),
        // Valid requests of a process that has not joined as a domain.
        packet(3, front.id().0, 0),
        packet(5, 0, 1),
        packet(7, 0, 0),
    ] {
        let socket = knock(host.dir.path());
        send(&socket, &bytes, SendFlags::empty()).unwrap();
        assert_eq!(answer(&socket), None, "{bytes:?}");
    }
    let a = front.alloc_unbound(back.id()).unwrap();
    back.bind_interdomain(front.id(), a.port()).unwrap();
}

#[test]
fn malformed_packet_of_joined_domain_destroys_it() {
    let host = Host::new();
    for bad in [packet(1, 1, 0), packet(9, 0, 0), Vec::from(*b"hello")] {
        let id = host.create("guest");
        let socket = knock(host.dir.path());
        send(&socket, &packet(1, id.0, 0), SendFlags::empty()).unwrap();
        assert_eq!(&answer(&socket).expect("joined")[4..6], [0, 0]);
        send(&socket, &bad, SendFlags::empty()).unwrap();
        assert_eq!(answer(&socket), None);
        host.wait_death(id);
    }
}

#[test]
fn domain_cannot_close_foreign_ports() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let a = front.alloc_unbound(back.id()).unwrap();
    let id = host.create("guest");
    let socket = knock(host.dir.path());
    let ask = |bytes: Vec<u8>| {
        send(&socket, &bytes, SendFlags::empty()).unwrap();
        answer(&socket).expect("an answer")[4]
    };
    assert_eq!(ask(packet(1, id.0, 0)), 0);
    let bad_port = 4;
    assert_eq!(ask(packet(5, 0, a.port().0)), bad_port);
    assert_eq!(ask(packet(5, 0, 4096)), bad_port);
    back.bind_interdomain(front.id(), a.port()).unwrap();
}

#[test]
fn flooding_client_that_never_reads_is_disconnected() {
    let host = Host::new();
    let id = host.create("guest");
    let socket = knock(host.dir.path());
    send(&socket, &packet(1, id.0, 0), SendFlags::empty()).unwrap();
    let flooded =
        (0..1_000_000).any(|_| send(&socket, &packet(5, 0, 1), SendFlags::NOSIGNAL).is_err());
    assert!(flooded, "flooding connection was not closed");
    host.wait_death(id);
    host.domain("still-served");
}

#[test]
fn idle_connections_do_not_block_new_ones() {
    let host = Host::new();
    let id = host.create("guest");
    let strangers: Vec<_> = (0..200).map(|_| knock(host.dir.path())).collect();
    let guest = host.join(id);
    assert_eq!(answer(&strangers[0]), None, "oldest connection was closed");
    guest.alloc_unbound(id).unwrap();
}

#[test]
fn connection_of_other_user_is_rejected() {
    let host = Host::new();
    let id = host.create("guest");
    if !rustix::process::getuid().is_root() {
        // Bypasses the test harness, which hides the output of passing tests.
        let skipped = "SKIPPED: only root can become another user; run this test as root\n";
        std::io::Write::write_all(&mut std::io::stderr(), skipped.as_bytes()).unwrap();
        return;
    }
    // As if the permissions of directory and socket had been opened for all users.
    for (path, mode) in [(".", 0o755), ("hypervisor.sock", 0o666)] {
        let path = host.dir.path().join(path);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let joined = Domain::join(host.dir.path(), id);
            assert!(matches!(joined, Err(JoinError::OtherUser)));
            let socket = knock(host.dir.path());
            let _ = send(&socket, &packet(1, id.0, 0), SendFlags::NOSIGNAL);
            assert_eq!(answer(&socket), None);
        });
    });
    host.join(id);
}
