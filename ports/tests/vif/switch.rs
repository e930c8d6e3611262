//! Vifs that are connected by a switch: members alone, and with guests of hosted hypervisors.

use crate::rig::namespace::entered;
use crate::rig::{Guest, Rig, wait_for};
use etherparse::PacketBuilder;
use pvio_netback::fault::DropReason;
use pvio_netback::port::{Checksum, Gso, NetPort, Offload, Packet};
use pvio_netback::{Stats, port::FRAME_MAX};
use pvio_netfront::Checksum as Sent;
use pvio_ports::host::{NicConfig, NicSettings};
use pvio_ports::switch::{Switch, SwitchMembership, SwitchQueue};
use pvio_ports::tap::TapConfig;
use pvio_ring::proto::checksum::Transport;
use pvio_ring::proto::netif::GsoKind;
use std::sync::Arc;
use std::time::Duration;

const ALL: [u8; 6] = [0xff; 6];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

fn station(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

struct Member {
    queue: SwitchQueue,
    stats: Arc<Stats>,
    _membership: SwitchMembership,
}

fn join(switch: &Arc<Switch>, takes: (bool, bool)) -> Member {
    let membership = switch.join(1, takes).unwrap();
    let stats = Arc::new(Stats::default());
    let queue = SwitchQueue::new(membership.queue(0).unwrap(), &stats);
    Member { queue, stats, _membership: membership }
}

fn frame(from: [u8; 6], to: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.resize(len, 7);
    frame
}

impl Member {
    fn send(&mut self, frame: &[u8], offload: Offload) {
        self.queue.set_clock(Duration::from_secs(1));
        let buf = self.queue.reserve().expect("buffers of the sender are returned");
        let mut buf = self.queue.fit(buf, frame.len());
        buf.as_mut_slice()[..frame.len()].copy_from_slice(frame);
        self.queue.send(Packet { buf, start: 0, len: frame.len(), offload }).unwrap();
    }

    fn received(&mut self) -> Vec<(Vec<u8>, Offload)> {
        let mut all = Vec::new();
        while let Some(packet) = self.queue.receive() {
            all.push((packet.frame().to_vec(), packet.offload));
            self.queue.recycle(packet.buf);
        }
        all
    }
}

#[test]
fn switch_forwards_to_learned_port_and_floods_unknown_destinations() {
    let switch = Switch::new();
    let mut members = [(); 3].map(|()| join(&switch, (true, true)));
    let mut count = |from: usize, frame: &[u8]| {
        members[from].send(frame, Offload::default());
        let got = members.each_mut().map(|member| member.received());
        assert!(got.iter().flatten().all(|(other, _)| other == frame));
        got.map(|frames| frames.len())
    };
    assert_eq!(
        count(0, &frame(station(0), station(1), 60)),
        [0, 1, 1],
        "unknown destination is flooded"
    );
    assert_eq!(count(1, &frame(station(1), station(0), 60)), [1, 0, 0]);
    assert_eq!(count(0, &frame(station(0), station(1), 9000)), [0, 1, 0]);
    assert_eq!(count(2, &frame(station(2), ALL, 60)), [1, 1, 0]);
    assert_eq!(count(2, &frame(station(2), GROUP, 9000)), [1, 1, 0]);
    assert_eq!(
        count(0, &frame(station(0), station(0), 60)),
        [0, 0, 0],
        "frame to the sender itself is not forwarded"
    );
    // The station has moved. A group address is never learned.
    assert_eq!(count(2, &frame(station(1), ALL, 60)), [1, 1, 0]);
    assert_eq!(count(0, &frame(GROUP, station(1), 60)), [0, 0, 1]);
    assert_eq!(count(0, &frame(station(0), GROUP, 60)), [0, 1, 1]);
    // The stations of a member that leaves are removed.
    let [zero, mut one, two] = members;
    drop((zero, two));
    one.send(&frame(station(9), station(1), 60), Offload::default());
    assert_eq!((switch.members(), one.received().len()), (1, 0));
}

#[test]
fn switch_member_that_never_receives_loses_only_its_own_packets() {
    let switch = Switch::new();
    let [mut a, mut b, mut c] = [(); 3].map(|()| join(&switch, (true, true)));
    b.send(&frame(station(1), ALL, 60), Offload::default());
    c.send(&frame(station(2), ALL, 60), Offload::default());
    a.received();
    b.received();
    c.received();
    let (mut to_c, large) = (0, FRAME_MAX - 4);
    for len in [60, 1514, large].into_iter().cycle().take(3000) {
        a.send(&frame(station(0), station(1), len), Offload::default());
        a.send(&frame(station(0), station(2), len), Offload::default());
        to_c += c.received().iter().filter(|(frame, _)| frame.len() == len).count();
    }
    assert_eq!(to_c, 3000);
    let held: Vec<usize> = b.received().iter().map(|(frame, _)| frame.len()).collect();
    let bytes: usize = held.iter().sum();
    assert!((100_000..=256 * 1024).contains(&bytes), "{bytes}");
    assert_eq!(b.stats.dropped(DropReason::RxSwitch), 3000 - held.len() as u64);
    assert_eq!(c.stats.dropped_in_all(), 0);
    // After that, packets are delivered again.
    a.send(&frame(station(0), station(1), large), Offload::default());
    assert_eq!(b.received().len(), 1);
}

/// Returns a TCP frame with `data` and a blank checksum.
fn tcp(v6: bool, vlan: bool, data: &[u8]) -> Vec<u8> {
    let link = PacketBuilder::ethernet2(station(0), station(1));
    let address = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let mut out = Vec::new();
    let tcp = match (v6, vlan) {
        (false, false) => link.ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64),
        (false, true) => {
            link.single_vlan(5.try_into().unwrap()).ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64)
        }
        (true, _) => link.ipv6(address(1), address(2), 64),
    };
    tcp.tcp(1000, 2000, 0xffff_f000, 500).psh().fin().cwr().write(&mut out, data).unwrap();
    Transport::of(&out).unwrap().blank(&mut out);
    out
}

#[test]
fn switch_delivers_gso_packet_whole_or_as_valid_segments() {
    let data: Vec<u8> = (0..20_000_u32).map(|n| (n * 7 + n / 256) as u8).collect();
    for (v6, vlan, kind) in [
        (false, false, GsoKind::TcpV4),
        (false, true, GsoKind::TcpV4),
        (true, false, GsoKind::TcpV6),
    ] {
        let switch = Switch::new();
        let mut a = join(&switch, (true, true));
        let mut whole = join(&switch, (!v6, v6));
        let mut cut = join(&switch, (v6, !v6));
        let sent = tcp(v6, vlan, &data);
        let t = Transport::of(&sent).unwrap();
        let (start, offset) = (t.start as u16, t.offset as u16);
        let gso = Some(Gso { size: 1400, kind });
        let offload = Offload { checksum: Checksum::Partial { start, offset }, gso };
        a.send(&sent, offload);
        assert_eq!(whole.received(), [(sent.clone(), offload)]);
        let segments = cut.received();
        assert_eq!(segments.len(), data.len().div_ceil(1400));
        let mut back: Vec<u8> = Vec::new();
        for (n, (frame, offload)) in segments.iter().enumerate() {
            assert_eq!(*offload, Offload { checksum: Checksum::Validated, gso: None });
            assert!(Transport::of(frame).unwrap().verify(frame), "segment {n}");
            let parsed = etherparse::PacketHeaders::from_ethernet_slice(frame).unwrap();
            if let Some(etherparse::NetHeaders::Ipv4(ip, _)) = &parsed.net {
                assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                assert_eq!(usize::from(ip.identification), n);
            }
            let tcp = parsed.transport.unwrap().tcp().unwrap();
            assert_eq!(tcp.sequence_number, 0xffff_f000_u32.wrapping_add(back.len() as u32));
            let last = n + 1 == segments.len();
            assert_eq!((tcp.fin, tcp.psh, tcp.cwr), (last, last, n == 0));
            back.extend(parsed.payload.slice());
        }
        assert!(back == data);
        // A member that is known by its address gets the same segments.
        cut.send(&frame(station(1), ALL, 60), Offload::default());
        a.send(&sent, offload);
        assert_eq!(cut.received().len(), segments.len());
        // A packet that is marked as TCP and is not is dropped.
        let nonsense = frame(station(0), station(1), 3000);
        a.send(&nonsense, offload);
        assert!(cut.received().is_empty());
    }
}

/// Guests on one switch, each with its own hypervisor.
fn guests<const N: usize>(
    words: &str,
) -> [(Rig, Guest<pvio_netfront::Nic<pvio_hosted::Domain>>); N] {
    let shared: Arc<NicSettings> = Arc::default();
    std::array::from_fn(|n| {
        let rig = Rig::within(NicConfig::default(), Arc::clone(&shared), |vif| {
            vif.mac.0 = station(n as u8);
            vif.options = Some(format!("switch=lan,{words}"));
        });
        let guest = rig.guest();
        (rig, guest)
    })
}

#[test]
fn switched_guests_communicate_despite_one_that_never_receives() {
    let [(_a, mut a), (b, mut b_guest), (_c, mut c)] = guests::<3>("");
    let stats = b.stats();
    let quiet = b_guest.driver.class_mut().queue().unwrap();
    // It announces its address and then never receives.
    quiet.send(&frame(station(1), ALL, 60), Sent::Unknown).unwrap();
    quiet.publish().unwrap();
    let (a, c) = (a.driver.class_mut().queue().unwrap(), c.driver.class_mut().queue().unwrap());
    c.send(&frame(station(2), ALL, 60), Sent::Unknown).unwrap();
    c.publish().unwrap();
    let mut heard = 0;
    wait_for(|| {
        while let Some(from) = a.receive(|frame, _| frame[11]).unwrap() {
            heard |= 1 << from;
        }
        a.publish().unwrap();
        (heard == 0b110).then_some(())
    });
    let (mut answered, mut sent) = (0_u64, 0_u64);
    wait_for(|| {
        if a.send(&frame(station(0), station(1), 1514), Sent::Unknown).is_ok()
            && a.send(&frame(station(0), station(2), 1000), Sent::Unknown).is_ok()
        {
            sent += 1;
        }
        a.publish().unwrap();
        while c.receive(|frame, _| frame.len()).unwrap().is_some() {
            answered += 1;
        }
        c.publish().unwrap();
        // The memory of the quiet guest is exhausted long before.
        (answered > 3000 && stats.dropped(DropReason::RxSwitch) > 1000).then_some(())
    });
    assert!(sent >= 3000);
}

#[test]
fn idle_switched_guests_are_not_woken() {
    let [(a, mut first), (b, mut second)] = guests::<2>("");
    let (stats, others) = (a.stats(), b.stats());
    let queue = first.driver.class_mut().queue().unwrap();
    queue.send(&frame(station(0), ALL, 60), Sent::Unknown).unwrap();
    queue.publish().unwrap();
    let other = second.driver.class_mut().queue().unwrap();
    wait_for(|| other.receive(|_, _| ()).unwrap());
    other.publish().unwrap();
    // Both sleep: the wake-ups of earlier packets are over.
    let settled = |stats: &Stats| {
        wait_for(|| {
            let before = stats.wakeups();
            std::thread::sleep(Duration::from_millis(50));
            (stats.wakeups() == before).then_some(before)
        })
    };
    let before = (settled(&stats), settled(&others));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!((stats.wakeups(), others.wakeups()), before);
    // A packet wakes the queue.
    queue.send(&frame(station(0), ALL, 61), Sent::Unknown).unwrap();
    queue.publish().unwrap();
    assert_eq!(wait_for(|| other.receive(|frame, _| frame.len()).unwrap()), 61);
    assert!(others.wakeups() > before.1);
}

#[test]
fn loopback_returns_frames_and_file_port_records_and_replays() {
    let dir = tempfile::tempdir().unwrap();
    let [record, again] = ["a.pcapng", "b.pcapng"].map(|name| dir.path().join(name));
    let sent: Vec<Vec<u8>> = (60..300).map(|len| frame(station(0), ALL, len)).collect();
    let run = |words: String, sends: bool, receives: bool| {
        let rig = Rig::new(NicConfig::default(), |vif| vif.options = Some(words));
        let stats = rig.stats();
        let mut guest = rig.guest();
        let queue = guest.driver.class_mut().queue().unwrap();
        let mut all = sent.iter().filter(|_| sends).peekable();
        let mut got = Vec::new();
        wait_for(|| {
            while let Some(frame) = all.next_if(|frame| queue.send(frame, Sent::Unknown).is_ok()) {
                let _ = frame;
            }
            queue.publish().unwrap();
            while let Some(frame) = queue.receive(|frame, _| frame.to_vec()).unwrap() {
                got.push(frame);
            }
            queue.publish().unwrap();
            let taken = stats.tx_packets() == sent.len() as u64 || !sends;
            (taken && (got.len() == sent.len() || !receives)).then_some(())
        });
        guest.close();
        rig.remove();
        got
    };
    assert_eq!(run("loopback".into(), true, true), sent);
    run(format!("record={}", record.display()), true, false);
    let both = format!("replay={},record={}", record.display(), again.display());
    assert_eq!(run(both, true, true), sent);
    let file = std::fs::read(&again).unwrap();
    assert!(file.len() > sent.iter().map(Vec::len).sum());
    for (words, why) in [
        ("replay=/nowhere".to_owned(), "nic-replay"),
        (format!("replay={}", std::env::current_exe().unwrap().display()), "nic-replay"),
        ("record=/nowhere/x".to_owned(), "nic-record"),
        ("netns=nowhere".to_owned(), "ip netns add nowhere"),
        ("guard=perhaps".to_owned(), "nic-options"),
    ] {
        let mut rig = Rig::new(NicConfig::default(), |vif| vif.options = Some(words));
        let error = rig.error();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn uplink_connects_switch_and_segments_kernel_gso_for_guest_without_gso() {
    let name = "switch::uplink_connects_switch_and_segments_kernel_gso_for_guest_without_gso";
    if !entered(name, &[]) {
        return;
    }
    let mut shared = NicSettings::default();
    let mut tap = TapConfig::new("up0");
    tap.address = Some(([192, 0, 2, 1].into(), 24));
    shared.switches.set_uplink("lan", tap);
    shared
        .switches
        .set_uplink("cut", TapConfig { bridge: Some("none".into()), ..TapConfig::new("x") });
    let shared = Arc::new(shared);
    let edit = |words: &str| {
        let words = words.to_owned();
        move |vif: &mut pvio_xenbus::handshake::vif::ToolstackBack| vif.options = Some(words)
    };
    let rig = Rig::within(NicConfig::default(), Arc::clone(&shared), edit("switch=lan"));
    let stats = rig.stats();
    let mut stack = crate::rig::stack::Stack::new(rig.guest());
    let data = crate::rig::frames::pattern(1_000_000);
    let listener = std::net::TcpListener::bind("192.0.2.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let whole = data.clone();
    let kernel = std::thread::spawn(move || {
        use std::io::Write;
        listener.accept().unwrap().0.write_all(&whole).unwrap();
    });
    let handle = stack.connect([192, 0, 2, 1].into(), port);
    assert!(stack.read(handle, data.len()) == data);
    kernel.join().unwrap();
    assert_eq!((stats.rx_gso_packets(), stats.dropped(DropReason::RxGso)), (0, 0));
    let queue = stack.guest.driver.class_mut().queue().unwrap();
    assert_eq!(queue.counters().rx_errors, 0);
    // A switch whose uplink cannot be created is rejected.
    let mut other = Rig::within(NicConfig::default(), shared, edit("switch=cut"));
    assert!(other.error().contains("tap-no-bridge"));
}
