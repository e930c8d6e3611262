//! Two NIC frontends with smoltcp. Each has a vif backend; the backends are connected in memory.
//!
//! ```console
//! $ cargo run -p pvio-netfront --features smoltcp --example smoltcp
//! ```

use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_netback::port::memory::{MemoryPort, pair};
use pvio_netback::queue::{EventPorts, QueueRefs};
use pvio_netback::{Features, Queue as Backend};
use pvio_netfront::Queue;
use pvio_sim::{LocalDomain, LocalMachine};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::udp::{PacketBuffer, PacketMetadata, Socket};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

const DRIVER: DomId = DomId(1);

struct Host {
    nic: Queue<LocalDomain>,
    backend: Backend<LocalDomain, Box<[u8]>>,
    port: MemoryPort,
    interface: Interface,
}

impl Host {
    fn new(machine: &LocalMachine, number: u8, port: MemoryPort) -> Self {
        let guest = DomId(10 + u16::from(number));
        let mut nic = Queue::new(&machine.domain(guest), DRIVER).unwrap();
        let events = EventPorts::Shared(nic.channel().port());
        let refs = QueueRefs { tx_ring: nic.tx_gref(), rx_ring: nic.rx_gref(), events };
        let driver = machine.domain(DRIVER);
        let backend =
            Backend::attach(driver, guest, &refs, Features::LEAST, Default::default()).unwrap();
        let mac = EthernetAddress([2, 0, 0, 0, 0, number]);
        let mut interface = Interface::new(Config::new(mac.into()), &mut nic, Instant::ZERO);
        let address = IpCidr::new(IpAddress::v4(10, 0, 0, number), 24);
        interface.update_ip_addrs(|addresses| addresses.push(address).unwrap());
        Self { nic, backend, port, interface }
    }

    fn poll(&mut self, now: Instant, sockets: &mut SocketSet<'_>) {
        self.interface.poll(now, &mut self.nic, sockets);
        self.nic.publish().unwrap();
        while self.backend.poll(&mut self.port, 64).unwrap().any() {}
    }
}

fn socket(port: u16) -> Socket<'static> {
    let buffer = || PacketBuffer::new(vec![PacketMetadata::EMPTY; 4], vec![0; 2048]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    socket
}

fn main() {
    let machine = LocalMachine::new();
    let (a, b) = pair(64);
    let mut hosts = [Host::new(&machine, 1, a), Host::new(&machine, 2, b)];
    let mut sockets = [SocketSet::new(vec![]), SocketSet::new(vec![])];
    let sender = sockets[0].add(socket(4000));
    let receiver = sockets[1].add(socket(7));
    let target = (IpAddress::v4(10, 0, 0, 2), 7);
    sockets[0].get_mut::<Socket>(sender).send_slice(b"hello", target).unwrap();

    let mut now = Instant::ZERO;
    while !sockets[1].get_mut::<Socket>(receiver).can_recv() {
        // Address resolution first; smoltcp repeats it every second.
        now += Duration::from_millis(1);
        assert!(now < Instant::from_secs(10), "the datagram was lost");
        for (host, sockets) in hosts.iter_mut().zip(&mut sockets) {
            host.poll(now, sockets);
        }
    }
    let (data, from) = sockets[1].get_mut::<Socket>(receiver).recv().unwrap();
    assert_eq!((data, from.endpoint.port), (&b"hello"[..], 4000));
}
