//! Two NIC frontends with smoltcp. Each has a vif backend; the backends are connected in memory.
//!
//! ```console
//! $ cargo run -p pvio-netfront --features smoltcp --example smoltcp
//! ```

use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_netback::{port::memory, test_utils};
use pvio_netfront::Queue;
use pvio_sim::LocalMachine;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::udp::{PacketBuffer, PacketMetadata, Socket};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (machine, driver) = (LocalMachine::new(), DomId(1));
    let (left, right) = memory::pair(64);
    let mut hosts = Vec::new();
    for (number, mut port) in [(2, left), (3, right)] {
        let guest = DomId(number.into());
        let mut nic = Queue::new(&machine.domain(guest), driver)?;
        let (rings, channel) = ([nic.tx_gref(), nic.rx_gref()], nic.channel().port());
        let mut backend = test_utils::connect(machine.domain(driver), guest, rings, channel)?;
        let mac = EthernetAddress([2, 0, 0, 0, 0, number]);
        let mut interface = Interface::new(Config::new(mac.into()), &mut nic, Instant::ZERO);
        let address = IpCidr::new(IpAddress::v4(10, 0, 0, number), 24);
        interface.update_ip_addrs(|all| all.push(address).expect("room for one address"));

        let buffer = || PacketBuffer::new(vec![PacketMetadata::EMPTY; 4], vec![0; 2048]);
        let mut sockets = SocketSet::new(Vec::new());
        let socket = sockets.add(Socket::new(buffer(), buffer()));
        sockets.get_mut::<Socket>(socket).bind(7)?;
        hosts.push((sockets, socket, move |now, sockets: &mut SocketSet<'_>| {
            interface.poll(now, &mut nic, sockets);
            nic.publish().expect("the event channel is open");
            while backend.poll(&mut port, 64).expect("the frontend is honest").any() {}
        }));
    }

    let (sockets, socket, _) = &mut hosts[0];
    let target = (IpAddress::v4(10, 0, 0, 3), 7);
    sockets.get_mut::<Socket>(*socket).send_slice(b"hello", target)?;
    // Address resolution first; smoltcp repeats it every second.
    for millis in 0..10_000 {
        for (sockets, _, poll) in &mut hosts {
            poll(Instant::ZERO + Duration::from_millis(millis), sockets);
        }
    }
    let (sockets, socket, _) = &mut hosts[1];
    assert_eq!(sockets.get_mut::<Socket>(*socket).recv()?.0, b"hello");
    Ok(())
}
