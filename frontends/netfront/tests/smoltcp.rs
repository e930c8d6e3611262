//! Two TCP/IP stacks that communicate over two connected vifs.
#![cfg(feature = "smoltcp")]

mod common;

use common::{Vif, echo, pattern, wire};
use pvio_netback::port::{self, NetPort, Offload, Packet};
use pvio_netfront::{Checksum, Features, Queue};
use pvio_ring::proto::checksum::Transport;
use pvio_sim::LocalDomain;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

/// A host: a vif's frontend with a TCP/IP stack, and the vif's backend.
struct Host {
    phy: Queue<LocalDomain>,
    back: pvio_netback::Queue<LocalDomain, Box<[u8]>>,
    port: port::memory::MemoryPort,
    interface: Interface,
    sockets: SocketSet<'static>,
}

impl Host {
    fn new(vif: Vif, number: u8, features: Features, mtu: u32) -> Self {
        let Vif { front: mut phy, back, port, .. } = vif;
        phy.set_features(features);
        phy.set_mtu(mtu);
        let mac = EthernetAddress([2, 0, 0, 0, 0, number]);
        let mut interface = Interface::new(Config::new(mac.into()), &mut phy, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            for address in [
                IpAddress::v4(10, 0, 0, number),
                IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, number.into()),
            ] {
                addresses.push(IpCidr::new(address, 24)).unwrap();
            }
        });
        Self { phy, back, port, interface, sockets: SocketSet::new(Vec::new()) }
    }

    fn poll(&mut self, now: Instant) {
        self.interface.poll(now, &mut self.phy, &mut self.sockets);
        self.phy.publish().unwrap();
        while self.back.poll(&mut self.port, 64).unwrap().any() {}
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65535]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }
}

/// Sends a megabyte by TCP from one host to the other and checks every byte.
fn transfer(v6: bool, features: [Features; 2], mtu: u32) -> (Host, Host) {
    let (_machine, a, b) = wire();
    let mut a = Host::new(a, 1, features[0], mtu);
    let mut b = Host::new(b, 2, features[1], mtu);
    let (from, to) = (a.tcp(), b.tcp());
    let target =
        if v6 { IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, 2) } else { IpAddress::v4(10, 0, 0, 2) };
    b.sockets.get_mut::<tcp::Socket>(to).listen(80).unwrap();
    let socket = a.sockets.get_mut::<tcp::Socket>(from);
    socket.connect(a.interface.context(), (target, 80), 4000).unwrap();

    let data = pattern(1 << 20, 1);
    let (mut sent, mut got) = (0, Vec::new());
    let mut now = Instant::ZERO;
    for _ in 0..100_000 {
        now += smoltcp::time::Duration::from_micros(500);
        let socket = a.sockets.get_mut::<tcp::Socket>(from);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        let socket = b.sockets.get_mut::<tcp::Socket>(to);
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        a.poll(now);
        b.poll(now);
        if got.len() == data.len() {
            break;
        }
    }
    assert!(got == data, "{} of {} bytes, or others", got.len(), data.len());
    (a, b)
}

const OFFLOAD: Features = common::FRONT_FEATURES;
const NONE: Features = common::NO_FEATURES;

#[test]
fn tcp_with_and_without_offload_passes_over_ipv4_and_ipv6() {
    for v6 in [false, true] {
        for features in [[OFFLOAD, OFFLOAD], [NONE, NONE], [OFFLOAD, NONE], [NONE, OFFLOAD]] {
            let (a, b) = transfer(v6, features, 1500);
            assert_eq!((a.phy.unverified(), b.phy.unverified()), (0, 0));
        }
    }
}

#[test]
fn tcp_with_large_mtu_uses_packets_of_several_pages() {
    let (a, _b) = transfer(false, [OFFLOAD, OFFLOAD], 16_000);
    let c = *a.phy.counters();
    assert!(c.tx_bytes / c.tx_packets > 4096, "{c:?}");
}

/// Returns the frames of a datagram as sent, and the offload state passed to the port.
fn on_the_wire(features: Features) -> Vec<(Vec<u8>, Offload)> {
    let (_machine, a, b) = wire();
    let mut host = Host::new(a, 1, features, 1500);
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(9).unwrap();
    let multicast = IpAddress::v4(224, 0, 0, 1);
    socket.send_slice(&pattern(501, 0), (multicast, 9)).unwrap();
    host.sockets.add(socket);
    host.poll(Instant::ZERO);
    let mut port = b.port;
    let frames = std::iter::from_fn(|| port.receive().map(|p| (p.frame().to_vec(), p.offload)));
    frames.filter(|(frame, _)| Transport::of(frame).is_ok()).collect()
}

#[test]
fn sent_checksum_is_blank_only_if_offload_was_negotiated() {
    let sent = on_the_wire(OFFLOAD);
    let (frame, offload) = &sent[0];
    assert_eq!(offload.checksum, port::Checksum::Partial { start: 34, offset: 6 });
    let transport = Transport::of(frame).unwrap();
    assert_eq!(frame[40..42], transport.pseudo_sum.to_be_bytes());

    let sent = on_the_wire(NONE);
    let (frame, offload) = &sent[0];
    assert_eq!(offload.checksum, port::Checksum::Validated);
    assert!(Transport::of(frame).unwrap().verify(frame));
    assert_ne!(frame[40..42], [0, 0]);
}

/// Returns whether a received frame with this offload state is passed to smoltcp.
fn reaches(frame: &[u8], checksum: port::Checksum) -> bool {
    let (_machine, a, mut b) = wire();
    let mut host = Host::new(a, 1, OFFLOAD, 1500);
    let mut buf = b.port.reserve().unwrap();
    buf[..frame.len()].copy_from_slice(frame);
    let offload = Offload { checksum, gso: None };
    b.port.send(Packet { buf, start: 0, len: frame.len(), offload }).unwrap();
    while host.back.poll(&mut host.port, 64).unwrap().any() {}
    let got = match Device::receive(&mut host.phy, Instant::ZERO) {
        Some((token, _)) => token.consume(|got| got == frame),
        None => false,
    };
    assert_eq!(host.phy.unverified(), u64::from(!got));
    got
}

#[test]
fn packet_with_wrong_checksum_is_dropped_unless_validated() {
    let mut frame = pattern(14 + 20 + 8 + 33, 1);
    frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 61, 0, 0, 0, 0, 64, 17]);
    frame[40..42].copy_from_slice(&[0, 0]);
    use port::Checksum::{Partial, Unknown, Validated};
    assert!(reaches(&frame, Unknown), "UDP without a checksum");
    Transport::of(&frame).unwrap().fill(&mut frame);
    assert!(reaches(&frame, Unknown));
    frame[60] ^= 1;
    assert!(!reaches(&frame, Unknown), "wrong checksum without validation");
    assert!(reaches(&frame, Validated));
    assert!(reaches(&frame, Partial { start: 34, offset: 6 }));
    // A fragment's checksum covers data that is not in this frame.
    frame[20] = 0x20;
    assert!(!reaches(&frame, Unknown));
    assert!(reaches(&frame, Validated));
    // Without a transport protocol, smoltcp does the verification.
    frame[20] = 0;
    frame[23] = 1;
    assert!(reaches(&frame, Unknown), "ICMP");
    frame[12] = 0x42;
    assert!(reaches(&frame, Unknown), "not IP");
    frame[12] = 8;
    frame[17] = 255;
    assert!(!reaches(&frame, Unknown), "longer than the frame");
}

#[test]
fn smoltcp_capabilities_report_frame_size_and_checksum_offload() {
    let (_machine, vif) = echo();
    let mut phy = vif.front;
    let capabilities = phy.capabilities();
    assert_eq!(capabilities.max_transmission_unit, 1514);
    assert!(!capabilities.checksum.tcp.rx() && !capabilities.checksum.tcp.tx());
    assert!(capabilities.checksum.ipv4.rx() && capabilities.checksum.ipv4.tx());
    assert!(capabilities.checksum.icmpv4.rx() && capabilities.checksum.icmpv4.tx());
    phy.set_mtu(9000);
    assert_eq!(phy.capabilities().max_transmission_unit, 9014);
    phy.set_features(NONE);
    assert_eq!(phy.capabilities().max_transmission_unit, 4096);
}

#[test]
fn frame_longer_than_mtu_is_not_sent() {
    let (_machine, vif) = echo();
    let mut phy = vif.front;
    phy.transmit(Instant::ZERO).unwrap().consume(1515, |frame| frame.fill(1));
    assert_eq!(phy.counters().tx_packets, 0);
    phy.transmit(Instant::ZERO).unwrap().consume(1514, |frame| frame.fill(1));
    assert_eq!(phy.counters().tx_packets, 1);
    assert_eq!(phy.send(&[1; 60], Checksum::Unknown), Ok(()));
}

#[test]
fn receive_with_full_tx_ring_returns_none() {
    let (_machine, vif) = echo();
    let mut phy = vif.front;
    while phy.send(&[1; 60], Checksum::Unknown).is_ok() {}
    assert!(phy.transmit(Instant::ZERO).is_none());
    assert!(Device::receive(&mut phy, Instant::ZERO).is_none());
}
