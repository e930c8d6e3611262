//! A guest's TCP/IP stack.

use super::{GUEST_MAC, Guest, PATIENCE};
use pvio_hosted::Domain;
use pvio_netfront::Nic;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// TCP/IP stack of a guest over its NIC.
pub struct Stack {
    pub guest: Guest<Nic<Domain>>,
    interface: Interface,
    pub sockets: SocketSet<'static>,
    begin: Instant,
}

impl Stack {
    pub fn new(mut guest: Guest<Nic<Domain>>) -> Self {
        let nic = guest.driver.class_mut();
        let mac = EthernetAddress(nic.mac().unwrap().0);
        assert_eq!(mac.0, GUEST_MAC.0);
        let mut interface = Interface::new(Config::new(mac.into()), nic, Moment::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::v4(192, 0, 2, 2), 24)).unwrap();
            let v6 = IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, 2);
            addresses.push(IpCidr::new(v6, 64)).unwrap();
        });
        let sockets = SocketSet::new(Vec::new());
        Self { guest, interface, sockets, begin: Instant::now() }
    }

    /// Runs the stack once, and sleeps if there is no work.
    pub fn turn(&mut self) {
        let now = Moment::from_micros(self.begin.elapsed().as_micros() as i64);
        let nic = self.guest.driver.class_mut();
        self.interface.poll(now, nic, &mut self.sockets);
        let queue = nic.queue().expect("connected");
        queue.publish().unwrap();
        if !queue.final_check().unwrap() {
            let delay = self.interface.poll_delay(now, &self.sockets);
            let most = delay.map_or(Duration::from_millis(5), |d| d.into());
            queue.channel().wait(Some(most.min(Duration::from_millis(5)))).unwrap();
        }
    }

    pub fn connect(&mut self, to: IpAddr, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 17]);
        let handle = self.sockets.add(tcp::Socket::new(buffer(), buffer()));
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.interface.context(), (IpAddress::from(to), port), 4000).unwrap();
        handle
    }

    /// Reads `len` bytes from a socket.
    pub fn read(&mut self, handle: SocketHandle, len: usize) -> Vec<u8> {
        let (mut got, begin) = (Vec::new(), Instant::now());
        while got.len() < len {
            assert!(begin.elapsed() < PATIENCE, "{} of {len} bytes", got.len());
            self.turn();
            let socket = self.sockets.get_mut::<tcp::Socket>(handle);
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
            }
        }
        got
    }
}
