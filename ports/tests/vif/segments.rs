//! Unsegmented packets between a guest and the kernel, in both directions, in a separate network
//! namespace.

use crate::rig::frames::{
    ACK, HOST_MAC, NOBODY, PUSH, SYN, Segment, checksum_holds, parse, pattern, to_port,
};
use crate::rig::namespace::{entered, ip};
use crate::rig::{GUEST_MAC, Guest, Rig, wait_for};
use pvio_hosted::Domain;
use pvio_netback::Stats;
use pvio_netback::fault::DropReason;
use pvio_netback::port::{self, NetPort, Offload, Packet};
use pvio_netfront::{Checksum, Gso, Nic, Queue, SendError};
use pvio_ports::host::NicConfig;
use pvio_ports::tap::{Tap, TapConfig, TapPort};
use pvio_ports::wait::WaitPort;
use pvio_ring::proto::netif::GsoKind;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;

const MSS: u16 = 1400;
const KINDS: [(bool, GsoKind); 2] = [(false, GsoKind::TcpV4), (true, GsoKind::TcpV6)];

fn on_bridge() -> (Rig, Wire) {
    ip("link add br0 type bridge").unwrap();
    ip("link set br0 up").unwrap();
    let rig = Rig::new(NicConfig::default(), |vif| vif.bridge = Some("br0".into()));
    (rig, Wire::new())
}

/// Another tap on the bridge, operated by the test.
struct Wire(TapPort);

impl Wire {
    fn new() -> Self {
        let config = TapConfig { bridge: Some("br0".into()), ..TapConfig::new("wire") };
        Self(TapPort::new(Tap::create(&config).unwrap(), Arc::new(Stats::default())).unwrap())
    }

    fn receive(&mut self) -> Option<(Vec<u8>, Offload)> {
        self.0.poll().unwrap();
        let packet = self.0.receive()?;
        let got = (packet.frame().to_vec(), packet.offload);
        self.0.recycle(packet.buf);
        Some(got)
    }

    fn send(&mut self, frame: &[u8], offload: Offload) {
        let mut buf = self.0.reserve().unwrap();
        let start = <TapPort as NetPort>::HEADROOM;
        port::PacketBuf::bytes_mut(&mut buf)[start..start + frame.len()].copy_from_slice(frame);
        self.0.send(Packet { buf, start, len: frame.len(), offload }).unwrap();
        self.0.flush();
    }
}

fn stream(v6: bool, data: &[u8]) -> Segment<'_> {
    let (macs, hosts) = ((GUEST_MAC.0, NOBODY), (2, 9));
    Segment { macs, v6, hosts, ports: (1000, 2000), seq: 7, ack: 9, flags: ACK | PUSH, data }
}

fn queue(guest: &mut Guest<Nic<Domain>>) -> &mut Queue<Domain> {
    guest.driver.class_mut().queue().unwrap()
}

/// Takes TCP segments until they contain `len` bytes, and checks each.
fn collect(len: usize, mut next: impl FnMut() -> Option<(Vec<u8>, bool)>) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let (frame, blank) = wait_for(&mut next);
        let Some((seq, _, _, data)) = parse(&frame) else { continue };
        assert_eq!(seq as usize, 7 + all.len(), "segments in order");
        assert_eq!(data.len(), usize::from(MSS).min(len - all.len()));
        assert!(checksum_holds(&frame, blank));
        all.extend_from_slice(data);
    }
    all
}

#[test]
fn kernel_segments_gso_packets_of_guest() {
    if !entered("segments::kernel_segments_gso_packets_of_guest", &[]) {
        return;
    }
    let (rig, mut wire) = on_bridge();
    let stats = rig.stats();
    let mut guest = rig.guest();
    for (n, (v6, kind)) in KINDS.into_iter().enumerate() {
        // The largest packet that a guest can send, and one barely larger than a segment.
        for len in [65535 - 14 - 40 - if v6 { 20 } else { 0 }, usize::from(MSS) + 1] {
            let data = pattern(len);
            let frame = stream(v6, &data).bytes();
            queue(&mut guest).send_gso(&frame, Gso { size: MSS, kind }).unwrap();
            queue(&mut guest).publish().unwrap();
            let got = collect(len, || {
                let (frame, offload) = wire.receive()?;
                assert_eq!(offload.gso, None, "interface without GSO received a GSO packet");
                Some((frame, matches!(offload.checksum, port::Checksum::Partial { .. })))
            });
            assert!(got == data);
        }
        assert_eq!(stats.tx_gso_packets(), 2 * (n as u64 + 1));
    }
    assert_eq!(stats.dropped_in_all(), 0);
}

/// Runs a connection to the kernel with hand-made segments.
fn stream_to_the_kernel(guest: &mut Guest<Nic<Domain>>, v6: bool, kind: GsoKind) {
    let host: IpAddr = if v6 { "fd00::1".parse() } else { "192.0.2.1".parse() }.unwrap();
    let listener = TcpListener::bind((host, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let data = pattern(1_000_000);
    let len = data.len();
    let kernel = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = vec![0; len];
        stream.read_exact(&mut all).unwrap();
        all
    });
    let from = if v6 { 4001 } else { 4000 };
    let queue = queue(guest);
    let syn = Segment {
        macs: (GUEST_MAC.0, HOST_MAC),
        hosts: (2, 1),
        ports: (from, port),
        seq: 99,
        ack: 0,
        flags: SYN,
        ..stream(v6, &[])
    };
    let answer = |queue: &mut Queue<Domain>| {
        wait_for(|| {
            let frame = queue.receive(|frame, _| frame.to_vec()).unwrap();
            queue.publish().unwrap();
            // Frames of other connections may still arrive.
            let frame = frame.filter(|frame| to_port(frame) == Some(from))?;
            parse(&frame).map(|(seq, ack, flags, _)| (seq, ack, flags))
        })
    };
    queue.send(&syn.bytes(), Checksum::Blank).unwrap();
    queue.publish().unwrap();
    let (theirs, acked, flags) = answer(queue);
    assert_eq!((acked, flags), (100, SYN | ACK));
    let mut ours = 100;
    let ack = theirs.wrapping_add(1);
    // Without window scaling, less than 64 KiB may be in flight.
    for part in data.chunks(30_000) {
        let segment = Segment { seq: ours, ack, flags: ACK | PUSH, data: part, ..syn };
        queue.send_gso(&segment.bytes(), Gso { size: MSS, kind }).unwrap();
        queue.publish().unwrap();
        ours = ours.wrapping_add(part.len() as u32);
        while answer(queue).1 != ours {}
    }
    assert!(kernel.join().unwrap() == data);
}

#[test]
fn kernel_socket_reads_gso_packets_of_guest() {
    if !entered("segments::kernel_socket_reads_gso_packets_of_guest", &[]) {
        return;
    }
    let address = Some(([192, 0, 2, 1].into(), 24));
    let options = NicConfig { address, ..NicConfig::default() };
    let rig = Rig::new(options, |vif| vif.vifname = Some("v0".into()));
    let mut guest = rig.guest();
    ip("addr add fd00::1/64 dev v0 nodad").unwrap();
    ip(&format!("neigh add 192.0.2.2 lladdr {GUEST_MAC} dev v0")).unwrap();
    ip(&format!("neigh add fd00::2 lladdr {GUEST_MAC} dev v0")).unwrap();
    for (v6, kind) in KINDS {
        stream_to_the_kernel(&mut guest, v6, kind);
    }
    assert!(rig.stats().tx_gso_packets() >= 68);
}

#[test]
fn kernel_gso_packets_reach_guest_whole_only_if_negotiated() {
    if !entered("segments::kernel_gso_packets_reach_guest_whole_only_if_negotiated", &[]) {
        return;
    }
    let (rig, mut wire) = on_bridge();
    let stats = rig.stats();
    let domain = rig.domain();
    // The same tap in two sessions: each session decides whether the kernel segments.
    let mut guest = Guest::attach(&domain, rig.addr, Nic::new(domain.clone()).taking_gso());
    for whole in [true, false, true] {
        for (v6, kind) in KINDS {
            // The largest packet that the kernel does not segment with any setting.
            let headers = if v6 { 14 + 40 + 20 } else { 14 + 20 + 20 };
            let data = pattern(65535 - headers);
            let macs = (NOBODY, GUEST_MAC.0);
            let frame = Segment { macs, ..stream(v6, &data) }.bytes();
            let start = if v6 { 54 } else { 34 };
            let checksum = port::Checksum::Partial { start, offset: 16 };
            let gso = Some(port::Gso { size: MSS, kind });
            wire.send(&frame, Offload { checksum, gso });
            let queue = queue(&mut guest);
            let mut next = || {
                let got = queue.receive_with_gso(|f, checksum, gso| (f.to_vec(), checksum, gso));
                queue.publish().unwrap();
                got.unwrap().filter(|(f, ..)| parse(f).is_some())
            };
            if whole {
                let (got, checksum, gso) = wait_for(next);
                let at = got.iter().zip(&frame).position(|(a, b)| a != b);
                assert_eq!((got.len(), at), (frame.len(), None));
                assert_eq!((checksum, gso), (Checksum::Blank, Some(Gso { size: MSS, kind })));
            } else {
                let got = collect(data.len(), || {
                    let (frame, checksum, gso) = next()?;
                    assert_eq!(gso, None);
                    Some((frame, checksum == Checksum::Blank))
                });
                assert!(got == data);
            }
        }
        guest.close();
        let nic = Nic::new(domain.clone());
        let nic = if whole { nic } else { nic.taking_gso() };
        guest = Guest::attach(&domain, rig.addr, nic);
    }
    assert_eq!(stats.rx_gso_packets(), 4);
    guest.close();
    rig.remove();
}

#[test]
fn malformed_gso_packets_are_dropped_individually() {
    if !entered("segments::malformed_gso_packets_are_dropped_individually", &[]) {
        return;
    }
    let (rig, mut wire) = on_bridge();
    let stats = rig.stats();
    let mut guest = rig.guest();
    let queue = queue(&mut guest);
    let data = pattern(20_000);
    let good = stream(false, &data).bytes();
    let (size, kind) = (MSS, GsoKind::TcpV4);
    // The TCP header ends after the frame.
    let mut short = stream(false, &data[..20]).bytes();
    short[34 + 12] = 0xf0;
    // The kernel uses this size for another purpose.
    let frags = (good.clone(), u16::MAX, DropReason::TxPort);
    for (frame, size, reason) in [(short, size, DropReason::TxPort), frags] {
        let before = stats.dropped(reason);
        queue.send_gso(&frame, Gso { size, kind }).unwrap();
        queue.publish().unwrap();
        wait_for(|| (stats.dropped(reason) > before).then_some(()));
    }
    // The frontend rejects a type that does not match the packet, and a segment size of 0.
    let other = Gso { size, kind: GsoKind::TcpV6 };
    assert_eq!(queue.send_gso(&good, other), Err(SendError::Gso));
    assert_eq!(queue.send_gso(&good, Gso { size: 0, kind }), Err(SendError::Gso));
    // A tiny segment size leads to many packets, and to no error.
    queue.send_gso(&stream(false, &data[..50]).bytes(), Gso { size: 8, kind }).unwrap();
    queue.send_gso(&good, Gso { size, kind }).unwrap();
    queue.publish().unwrap();
    let mut got = 0;
    while got < 20_050 {
        let (frame, _) = wait_for(|| wire.receive());
        got += parse(&frame).map_or(0, |(.., data)| data.len());
    }
    assert_eq!(got, 20_050);
}

#[test]
fn kernel_socket_sends_large_packets_to_guest_with_gso() {
    if !entered("segments::kernel_socket_sends_large_packets_to_guest_with_gso", &[]) {
        return;
    }
    let address = Some(([192, 0, 2, 1].into(), 24));
    let options = NicConfig { address, ..NicConfig::default() };
    let rig = Rig::new(options, |vif| vif.vifname = Some("v0".into()));
    let domain = rig.domain();
    let guest = Guest::attach(&domain, rig.addr, Nic::new(domain.clone()).taking_gso());
    let mut stack = crate::rig::stack::Stack::new(guest);
    let listener = TcpListener::bind("192.0.2.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let data = pattern(8_000_000);
    let sent = data.clone();
    let kernel = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&sent).unwrap();
    });
    let handle = stack.connect("192.0.2.1".parse().unwrap(), port);
    let got = stack.read(handle, data.len());
    assert!(got == data);
    kernel.join().unwrap();
    let stats = rig.stats();
    let average = stats.rx_bytes() / stats.rx_packets();
    assert!(stats.rx_gso_packets() > 0 && average > 5000, "{average} bytes a packet: {stats:?}");
}
