//! The hypervisor of hosted domains with a hostile domain: packets on its connection, on the connections
//! of its devices and on others.
//!
//! Each packet gets one reply, or its connection is closed. The memory and the ports of another domain are
//! only for those to which it gave access. What a domain has is released with its last connection.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, DomId, Granter};
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, send, socket_with,
};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

#[derive(Arbitrary, Debug)]
struct Input {
    grants: bool,
    port: bool,
    joins: bool,
    actions: Vec<(u8, Action)>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Request { operation: u8, domain: Which, value: Value, second: u8, ports: Vec<Value> },
    Raw(Vec<u8>),
    Connect,
    Close,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Which {
    Own,
    Victim,
    Zero,
    Any(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Value {
    Zero,
    VictimPort,
    Small(u8),
    Any(u32),
}

struct Machine {
    hypervisor: Hypervisor,
    dir: TempDir,
    /// A domain that takes no part.
    third: DomId,
}

fuzz_target!(|input: Input| {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let hypervisor = Hypervisor::start(dir.path()).expect("a hypervisor");
        let third = hypervisor.create_domain(DomainConfig::new("third")).expect("a free id");
        Machine { hypervisor, dir, third }
    });
    let Machine { hypervisor, dir, third } = machine;
    let create = |name: &str| {
        let config = DomainConfig::new(name).memory_pages(8).grant_frames(1).max_ports(16);
        hypervisor.create_domain(config).expect("a free id")
    };
    let victim = Domain::join(dir.path(), create("victim")).expect("a new domain");
    let attacker = create("attacker");
    let pages = victim.alloc_pages(1).expect("a page");
    let gref = input
        .grants
        .then(|| victim.grant(attacker, &pages, 0, Access::ReadOnly).expect("a free reference"));
    let other = victim.alloc_unbound(*third).expect("a free port");
    let offered = input.port.then(|| victim.alloc_unbound(attacker).expect("a free port"));
    let victim_port = offered.as_ref().unwrap_or(&other).port().0;

    let mut connections = vec![open(dir)];
    let join = request(1, attacker.0, 0, 0, &[]);
    if input.joins {
        exchange(&connections[0], &join).expect("a reply");
    }
    for (on, action) in input.actions.into_iter().take(64) {
        if connections.is_empty() {
            connections.push(open(dir));
        }
        let at = usize::from(on) % connections.len();
        let bytes = match action {
            Action::Connect => {
                if connections.len() < 16 {
                    connections.push(open(dir));
                }
                continue;
            }
            Action::Close => {
                connections.remove(at);
                continue;
            }
            Action::Raw(bytes) if bytes.is_empty() => continue,
            Action::Raw(bytes) => bytes,
            Action::Request { operation, domain, value, second, ports } => {
                let domain = match domain {
                    Which::Own => attacker.0,
                    Which::Victim => victim.id().0,
                    Which::Zero => 0,
                    Which::Any(any) => any,
                };
                let number = |value: Value| match value {
                    Value::Zero => 0,
                    Value::VictimPort => victim_port,
                    Value::Small(small) => small.into(),
                    Value::Any(any) => any,
                };
                let ports: Vec<u32> = ports.into_iter().map(number).collect();
                let operation = u16::from(operation % 9);
                request(operation, domain, number(value), second.into(), &ports)
            }
        };
        match exchange(&connections[at], &bytes) {
            None => drop(connections.remove(at)),
            Some((status, files)) => {
                let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                let (operation, domain) = (field(4), field(6));
                let about_victim = domain == victim.id().0 && status == 0;
                match operation {
                    1 => assert!(!about_victim, "a second process joined"),
                    2 => assert!(!about_victim || input.grants, "memory without a grant"),
                    4 => assert!(!about_victim || input.port, "a port of another domain was bound"),
                    _ => {}
                }
                assert!(status == 0 || files.is_empty(), "descriptors of a request that failed");
                if operation == 6 && connections.len() < 16 {
                    connections.extend(files);
                }
            }
        }
    }
    drop(connections);
    let until = Instant::now() + Duration::from_secs(8);
    let exists = || hypervisor.domains().into_iter().any(|domain| domain.id == attacker);
    // A domain that no process has joined as exists until it is destroyed.
    let _ = hypervisor.destroy_domain(attacker);
    while exists() {
        assert!(Instant::now() < until, "a domain without connections exists");
    }
    // The other domain is served as before, and has lost nothing.
    drop(victim.alloc_unbound(*third).expect("a free port"));
    let found = hypervisor.domains().into_iter().find(|domain| domain.id == victim.id());
    let ports = found.expect("the other domain").ports;
    assert_eq!(ports, 1 + usize::from(input.port), "ports of the other domain");
    if let Some(gref) = gref {
        assert!(victim.end_access(gref).is_ok(), "a grant is in use after the end");
    }
    drop((other, offered, pages));
    let id = victim.id();
    drop(victim);
    let _ = hypervisor.destroy_domain(id);
    while hypervisor.events().try_recv().is_ok() {}
});

/// Connects to the hypervisor.
fn open(dir: &TempDir) -> OwnedFd {
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a socket");
    let address = SocketAddrUnix::new(dir.path().join("hypervisor.sock")).expect("a short path");
    connect(&socket, &address).expect("a hypervisor that listens");
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(8))).expect("a socket");
    socket
}

fn request(operation: u16, domain: u16, value: u32, second: u32, ports: &[u32]) -> Vec<u8> {
    let mut bytes = b"PVH2".to_vec();
    bytes.extend(operation.to_le_bytes());
    bytes.extend(domain.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes.extend(second.to_le_bytes());
    bytes.extend(ports.iter().flat_map(|port| port.to_le_bytes()));
    bytes
}

/// Sends a packet. Returns the status of its reply and the descriptors; `None` if the connection was
/// closed instead.
fn exchange(socket: &OwnedFd, bytes: &[u8]) -> Option<(u16, Vec<OwnedFd>)> {
    match send(socket, bytes, SendFlags::NOSIGNAL) {
        Ok(_) => {}
        Err(Errno::PIPE | Errno::CONNRESET) => return None,
        Err(error) => panic!("send: {error}"),
    }
    let mut reply = [0; 64];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [IoSliceMut::new(&mut reply)];
    let got = match recvmsg(socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(got) => got.bytes,
        Err(Errno::CONNRESET) => 0,
        Err(error) => panic!("no reply: {error}"),
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    if got == 0 {
        return None;
    }
    let status = u16::from_le_bytes([reply[4], reply[5]]);
    assert!(got == 16 && reply.starts_with(b"PVH2") && status <= 7, "a reply of {got} bytes");
    Some((status, files))
}
