//! Wrappers of a port, with a port in memory: guard, shaper, faults, capture.

mod shaper;

use etherparse::PacketBuilder;
use pvio_netback::Stats;
use pvio_netback::fault::DropReason;
use pvio_netback::port::memory::{MemoryPort, pair};
use pvio_netback::port::{Checksum, Gso, NetPort, Offload, Packet, PortError};
use pvio_ports::options::NicOptions;
use pvio_ports::pcapng::CaptureFile;
use pvio_ports::settings::{RuntimeSettings, WrapperSettings};
use pvio_ports::wrappers::capture::Probe;
use pvio_ports::wrappers::faults::{FaultPlan, Plans, REORDER};
use pvio_ports::wrappers::guard::{Guards, Network, Rules};
use pvio_ports::wrappers::shape::{DirectionLimits, Shape, Shapes, SharedRate};
use pvio_ring::proto::netif::GsoKind;
use pvio_runtime::BucketRate;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const MAC: [u8; 6] = [0, 0x16, 0x3e, 1, 2, 3];
const OTHER: [u8; 6] = [0, 0x16, 0x3e, 9, 9, 9];
const MS: Duration = Duration::from_millis(1);

fn send(port: &mut impl NetPort<Buf = Box<[u8]>>, frame: &[u8]) -> Result<(), PortError> {
    send_with(port, frame, Offload::default())
}

fn send_with(
    port: &mut impl NetPort<Buf = Box<[u8]>>,
    frame: &[u8],
    offload: Offload,
) -> Result<(), PortError> {
    let buf = port.reserve().expect("space");
    let mut buf = port.fit(buf, frame.len());
    buf[..frame.len()].copy_from_slice(frame);
    port.send(Packet { buf, start: 0, len: frame.len(), offload })
}

fn received(port: &mut impl NetPort<Buf = Box<[u8]>>) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(packet) = port.receive() {
        all.push(packet.frame().to_vec());
        port.recycle(packet.buf);
    }
    all
}

/// Returns a frame of `len` bytes that contains a number.
fn numbered(n: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![2; len];
    frame[14..18].copy_from_slice(&n.to_be_bytes());
    frame
}

fn number(frame: &[u8]) -> u32 {
    u32::from_be_bytes(frame[14..18].try_into().unwrap())
}

fn built(builder: etherparse::PacketBuilderStep<etherparse::UdpHeader>) -> Vec<u8> {
    let mut out = Vec::new();
    builder.write(&mut out, b"data").unwrap();
    out
}

fn udp4(mac: [u8; 6], from: [u8; 4], to_port: u16) -> Vec<u8> {
    built(PacketBuilder::ethernet2(mac, OTHER).ipv4(from, [192, 0, 2, 1], 64).udp(68, to_port))
}

fn udp6(mac: [u8; 6], from: [u8; 16]) -> Vec<u8> {
    built(PacketBuilder::ethernet2(mac, OTHER).ipv6(from, v6(1), 64).udp(1000, 2000))
}

fn v6(last: u8) -> [u8; 16] {
    let mut address = [0; 16];
    (address[0], address[15]) = (0xfd, last);
    address
}

/// Link-local address derived from `MAC`.
const LOCAL: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 2, 0x16, 0x3e, 0xff, 0xfe, 1, 2, 3];

fn arp(mac: [u8; 6], sender: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut f = [[0xff; 6], mac].concat();
    f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    f.extend(sender);
    f.extend(ip);
    f.extend([0; 6]);
    f.extend([192, 0, 2, 1]);
    f
}

/// Returns an ICMPv6 message after these extension headers (each starts with the type of the next
/// one).
fn icmp6(from: [u8; 16], first: u8, before: &[u8], message: &[u8]) -> Vec<u8> {
    let mut f = [OTHER, MAC].concat();
    f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    f.extend(((before.len() + message.len()) as u16).to_be_bytes());
    f.extend([first, 255]);
    f.extend(from);
    f.extend(v6(1));
    f.extend(before);
    f.extend(message);
    f
}

/// Returns a neighbour discovery message: type, address, and an option with a link-layer address.
fn neighbour(kind: u8, target: [u8; 16], option: u8, mac: [u8; 6]) -> Vec<u8> {
    let mut m = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    m.extend(target);
    m.extend([option, 1]);
    m.extend(mac);
    m
}

#[test]
fn guard_passes_only_frames_with_addresses_of_vif() {
    use DropReason::{TxSpoofArp, TxSpoofIp, TxSpoofMac, TxSpoofNeighbour, TxSpoofProtocol};
    let networks = ["192.0.2.2", "198.51.100.0/24", "fd00::2"].map(|n| n.parse().unwrap());
    let ip = Rules { mac: Some(MAC), addresses: Some(networks.to_vec()) };
    let mac = Rules { addresses: None, ..ip.clone() };
    let mut vlan = [OTHER, MAC].concat();
    vlan.extend([0x81, 0, 0, 5]);
    vlan.extend(&udp4(MAC, [192, 0, 2, 9], 9)[12..]);
    let fragment = [58, 0, 0, 1, 0, 0, 0, 1];
    let hop = [58, 0, 5, 2, 0, 0, 1, 0];
    let own = neighbour(136, v6(2), 2, MAC);
    let stolen = neighbour(136, v6(3), 2, MAC);
    let router = [&[134; 1][..], &[0; 15], &[1, 1], &MAC].concat();
    let mut endless = own.clone();
    endless.extend([1, 0]);
    let cut = &icmp6(v6(2), 58, &[], &own)[..70];
    // A frame, its result with `mac`, and its result with `ip`.
    for (n, (frame, by_mac, by_ip)) in [
        (udp4(MAC, [192, 0, 2, 2], 9), None, None),
        (udp4(MAC, [198, 51, 100, 77], 9), None, None),
        (udp4(MAC, [192, 0, 2, 3], 9), None, Some(TxSpoofIp)),
        (udp4(OTHER, [192, 0, 2, 2], 9), Some(TxSpoofMac), Some(TxSpoofMac)),
        // A DHCP request without an address, and other packets without an address.
        (udp4(MAC, [0; 4], 67), None, None),
        (udp4(MAC, [0; 4], 53), None, Some(TxSpoofIp)),
        (udp6(MAC, v6(2)), None, None),
        (udp6(MAC, LOCAL), None, None),
        (udp6(MAC, v6(3)), None, Some(TxSpoofIp)),
        (udp6(MAC, [0; 16]), None, Some(TxSpoofIp)),
        (arp(MAC, MAC, [192, 0, 2, 2]), None, None),
        (arp(MAC, MAC, [0; 4]), None, None),
        (arp(MAC, MAC, [192, 0, 2, 1]), None, Some(TxSpoofArp)),
        (arp(MAC, OTHER, [192, 0, 2, 2]), Some(TxSpoofArp), Some(TxSpoofArp)),
        (arp(MAC, MAC, [192, 0, 2, 2])[..30].to_vec(), Some(TxSpoofArp), Some(TxSpoofArp)),
        (icmp6(v6(2), 58, &[], &own), None, None),
        (icmp6([0; 16], 58, &[], &neighbour(135, v6(2), 14, OTHER)), None, None),
        (icmp6(v6(2), 58, &[], &stolen), None, Some(TxSpoofNeighbour)),
        (icmp6(v6(2), 0, &hop, &stolen), None, Some(TxSpoofNeighbour)),
        (
            icmp6(v6(2), 58, &[], &neighbour(135, v6(9), 1, OTHER)),
            Some(TxSpoofNeighbour),
            Some(TxSpoofNeighbour),
        ),
        (icmp6(v6(2), 58, &[], &router), None, Some(TxSpoofNeighbour)),
        (icmp6(v6(2), 44, &fragment, &own), Some(TxSpoofNeighbour), Some(TxSpoofNeighbour)),
        (icmp6(v6(2), 58, &[], &endless), Some(TxSpoofNeighbour), Some(TxSpoofNeighbour)),
        (cut.to_vec(), Some(TxSpoofNeighbour), Some(TxSpoofNeighbour)),
        (vlan, None, Some(TxSpoofProtocol)),
        (MAC.to_vec(), Some(TxSpoofMac), Some(TxSpoofMac)),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(mac.check(&frame).err(), by_mac, "frame {n} under mac");
        assert_eq!(ip.check(&frame).err(), by_ip, "frame {n} under ip");
        assert_eq!(Rules::default().check(&frame), Ok(()));
        // A truncated frame is at most dropped.
        (0..frame.len()).for_each(|len| {
            let _ = ip.check(&frame[..len]);
        });
    }
}

#[test]
fn network_parses_and_contains_its_addresses() {
    let has = |net: &str, ip: &str| net.parse::<Network>().unwrap().has(ip.parse().unwrap());
    assert!(has("0.0.0.0/0", "192.0.2.1") && has("::/0", "fd00::1") && has("fd00::/8", "fd01::1"));
    assert!(!has("0.0.0.0/0", "fd00::1") && !has("192.0.2.0/31", "192.0.2.2"));
    for bad in ["", "x", "1.2.3.4/33", "::/129", "1.2.3.4/", "1.2.3", "1.2.3.4/-1"] {
        assert!(bad.parse::<Network>().is_err(), "{bad}");
    }
}

#[test]
fn guard_changed_at_run_time_applies_and_leaks_no_buffer() {
    let (port, mut wire) = pair(4);
    let guards = Guards::default();
    let mut port = guards.wrap(port);
    let foreign = udp4(OTHER, [192, 0, 2, 2], 9);
    assert_eq!(send(&mut port, &foreign), Ok(()));
    guards.set(Rules { mac: Some(MAC), addresses: None });
    port.set_clock(MS);
    for _ in 0..20 {
        assert_eq!(send(&mut port, &foreign), Err(PortError::Refused(DropReason::TxSpoofMac)));
    }
    assert_eq!(send(&mut port, &udp4(MAC, [192, 0, 2, 2], 9)), Ok(()));
    assert_eq!(received(&mut wire).len(), 2);
}

fn faulty(
    plan: FaultPlan,
    depth: usize,
) -> (impl NetPort<Buf = Box<[u8]>>, MemoryPort, Arc<Stats>) {
    let (port, wire) = pair(depth);
    let (plans, stats) = (Plans::default(), Arc::new(Stats::default()));
    plans.set(plan);
    (plans.wrap(port, Arc::clone(&stats), 0), wire, stats)
}

/// Returns the numbers of the frames that arrive of `count` frames, sent once per millisecond.
fn through(plan: FaultPlan, count: u32, out: bool) -> (Vec<u32>, usize, Arc<Stats>) {
    let (mut port, mut wire, stats) = faulty(plan, 64);
    let (mut numbers, mut broken) = (Vec::new(), 0);
    for tick in 0..count + 200 {
        port.set_clock(tick * MS);
        if tick < count {
            let frame = numbered(tick, 100);
            if out { send(&mut port, &frame).unwrap() } else { send(&mut wire, &frame).unwrap() }
        }
        let got = if out { received(&mut wire) } else { received(&mut port) };
        for frame in got {
            broken += usize::from(frame != numbered(number(&frame), 100));
            numbers.push(number(&frame));
        }
    }
    (numbers, broken, stats)
}

#[test]
fn network_faults_occur_at_planned_rate_and_are_deterministic_by_seed() {
    let none = FaultPlan { seed: 7, ..FaultPlan::default() };
    let of = |part: usize, percent: usize| (part * 95..=part * 105).contains(&(percent * 100));
    for out in [true, false] {
        let reason = if out { DropReason::TxFault } else { DropReason::RxFault };
        assert_eq!(through(none, 500, out).0, (0..500).collect::<Vec<_>>());
        let lossy = FaultPlan { lose: 200_000, ..none };
        let (first, _, stats) = through(lossy, 10_000, out);
        assert!(of(8000, first.len()), "{}", first.len());
        assert_eq!(stats.dropped(reason), 10_000 - first.len() as u64);
        assert_eq!(through(lossy, 10_000, out).0, first);
        assert_ne!(through(FaultPlan { seed: 8, ..lossy }, 10_000, out).0, first);

        let (twice, ..) = through(FaultPlan { repeat: 1_000_000, ..none }, 500, out);
        assert_eq!(twice, (0..500).flat_map(|n| [n, n]).collect::<Vec<_>>());
        let (_, broken, _) = through(FaultPlan { corrupt: 500_000, ..none }, 10_000, out);
        assert!((4700..5300).contains(&broken), "{broken}");

        let (mixed, ..) = through(FaultPlan { reorder: 100_000, ..none }, 1000, out);
        let passed = mixed.windows(2).filter(|two| two[0] > two[1]).count();
        assert!((50..150).contains(&passed), "{passed}");
        let mut sorted = mixed.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>(), "no packet is lost");
        assert!(mixed.iter().enumerate().all(|(at, n)| at.abs_diff(*n as usize) <= 4));
    }
}

#[test]
fn delayed_packets_arrive_at_deadline_and_are_bounded_by_buffers() {
    let plan = FaultPlan { delay: 10 * MS, ..FaultPlan::default() };
    let (mut port, mut wire, _) = faulty(plan, 8);
    port.set_clock(MS);
    while let Ok(buf) = port.reserve() {
        port.send(Packet { buf, start: 0, len: 60, offload: Offload::default() }).unwrap();
    }
    send(&mut wire, &[1; 60]).unwrap();
    assert!(received(&mut port).is_empty() && received(&mut wire).is_empty());
    assert_eq!(port.deadline(), Some(11 * MS));
    port.set_clock(10 * MS);
    assert!(received(&mut port).is_empty() && received(&mut wire).is_empty());
    port.set_clock(11 * MS);
    assert_eq!((received(&mut wire).len(), received(&mut port).len()), (8, 1));
    assert_eq!(port.deadline(), None);
    assert_eq!(REORDER, 3 * MS);
}

#[test]
fn capture_writes_whole_marked_packets_to_readable_pcapng() {
    let (port, mut wire) = pair(4);
    let probe = Probe::default();
    let mut port = probe.wrap(port);
    send(&mut port, &numbered(0, 60)).unwrap();
    let reader = probe.open(usize::MAX).unwrap();
    assert!(probe.open(100).is_err(), "second capture is rejected");
    port.set_clock(MS);
    let gso = Gso { size: 1448, kind: GsoKind::TcpV4 };
    let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso: Some(gso) };
    send_with(&mut port, &numbered(1, 65_000), offload).unwrap();
    send(&mut wire, &numbered(2, 61)).unwrap();
    assert_eq!(received(&mut port).len(), 1);
    let mut file = CaptureFile::begin(Vec::new(), "vif7.0", 70_000).unwrap();
    reader
        .read(Duration::ZERO, |record| {
            file.add(record)?;
            Ok(true)
        })
        .unwrap();
    // Packets beyond the number of records are counted as lost, and do not delay others.
    for n in 0..600 {
        send(&mut wire, &numbered(n, 60)).unwrap();
        assert_eq!(received(&mut port).len(), 1);
        received(&mut wire);
    }
    assert_eq!(reader.lost(), 600 - 512);
    let bytes = file.end(reader.lost()).unwrap();
    drop(reader);
    port.set_clock(2 * MS);
    assert!(probe.open(100).is_ok());

    let mut found = pcap_file::pcapng::PcapNgReader::new(&bytes[..]).unwrap();
    let (mut packets, mut dropped) = (Vec::new(), false);
    while let Some(block) = found.next_block() {
        match block.unwrap() {
            pcap_file::pcapng::Block::EnhancedPacket(packet) => {
                packets.push((
                    packet.data.to_vec(),
                    packet.original_len,
                    format!("{:?}", packet.options),
                ));
            }
            pcap_file::pcapng::Block::InterfaceStatistics(block) => {
                dropped = format!("{:?}", block.options).contains("IsbIfDrop(88)");
            }
            _ => {}
        }
    }
    assert!(dropped);
    assert_eq!((&packets[0].0, packets[0].1), (&numbered(1, 65_000), 65_000));
    assert!(packets[0].2.contains("Flags(2)"), "sent: {}", packets[0].2);
    for mark in ["to be segmented: TCP over IPv4, 1448 bytes each", "checksum left blank"] {
        assert!(packets[0].2.contains(mark), "{}", packets[0].2);
    }
    assert_eq!((&packets[1].0, packets.len()), (&numbered(2, 61), 2));
    assert!(packets[1].2.contains("Flags(1)"), "received: {}", packets[1].2);
}

#[test]
fn nic_options_set_all_wrappers_and_invalid_ones_change_nothing() {
    let (port, mut wire) = pair(4);
    let settings = RuntimeSettings::default();
    let mut port = settings.wrap(port, Arc::default(), 0);
    let said = |words: &str| NicOptions::default().and(words).unwrap();
    let shares = BTreeMap::from([("up".into(), SharedRate::new(BucketRate::per_second(1, 1)))]);
    let mut set = |words: &str, ip: Option<&str>| {
        let (options, addresses) = (said(words), ip.map(String::from));
        let wrappers = WrapperSettings { options, mac: MAC, addresses };
        let done = settings.apply(&wrappers, &shares);
        port.set_clock(MS);
        let sent = match port.reserve() {
            Ok(buf) => {
                port.unreserve(buf);
                send(&mut port, &udp4(MAC, [192, 0, 2, 3], 9)).is_ok()
            }
            Err(_) => false,
        };
        (done.map_err(|fault| fault.node_text()), sent, received(&mut wire).len())
    };
    assert_eq!(set("", None), (Ok(()), true, 1));
    assert_eq!(set("guard=ip", Some("192.0.2.2 192.0.2.3")), (Ok(()), true, 1));
    assert_eq!(set("guard=ip", Some("192.0.2.2")), (Ok(()), false, 0));
    for (words, ip, why) in [
        ("guard=ip", None, "ip=…"),
        ("guard=ip", Some("192.0.2.3 x"), "\"x\" of the vif"),
        ("share=down", None, "--nic-share down=RATE"),
    ] {
        let (done, sent, _) = set(words, ip);
        let text = done.unwrap_err();
        assert!(text.contains(why) && text.contains("nic-options") && !sent, "{text}");
    }
    assert_eq!(set("loss=100", None), (Ok(()), true, 0));
    assert_eq!(set("share=up", None), (Ok(()), true, 1));
    assert_eq!(set("share=up", None), (Ok(()), false, 0), "rate of one byte per second");
    assert_eq!(set("tx=1/1", None), (Ok(()), true, 1));
    assert_eq!(set("", None), (Ok(()), true, 1));
}
