//! Frames on the wire, as other programs see them: captured by `tcpdump` and by the vif itself, and
//! read by `tshark`; a kernel as the guest, `iperf3` in it, a router, and a receiver that verifies
//! every checksum. Runs in separate network namespaces.

use crate::rig::kernel_guest::{KernelGuest, Space};
use crate::rig::namespace::{entered_with, entered_with_before, ip};
use crate::rig::{GUEST_MAC, Rig, wait_for};
use etherparse::PacketBuilder;
use pvio_netback::fault::DropReason;
use pvio_netfront::Checksum;
use pvio_ports::host::NicConfig;
use pvio_ports::pcapng::CaptureFile;
use pvio_ring::proto::checksum::Transport;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const HOST: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
const TSHARK: (&str, &str) = ("tshark", "tshark");

/// Process that is killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn tshark(file: &Path, args: &[&str]) -> Vec<String> {
    let out = Command::new("tshark").arg("-r").arg(file).args(args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Returns frames of every kind, valid and invalid.
fn frames() -> Vec<Vec<u8>> {
    let mac = GUEST_MAC.0;
    let v6 = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let (here, there) = ([192, 0, 2, 2], [192, 0, 2, 1]);
    let link = |to| PacketBuilder::ethernet2(mac, to);
    let tagged = || link(HOST).single_vlan(5.try_into().unwrap());
    let twice = || link(HOST).double_vlan(7.try_into().unwrap(), 5.try_into().unwrap());
    let group6 = [0x33, 0x33, 0, 0, 0, 0xfb];
    let mdns6 = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfb];
    let data = vec![0x5a; 8000];
    let mut all: Vec<Vec<u8>> = Vec::new();
    let mut add = |builder: etherparse::PacketBuilderStep<etherparse::UdpHeader>, len: usize| {
        let mut out = Vec::new();
        builder.write(&mut out, &data[..len]).unwrap();
        all.push(out);
    };
    for len in [0, 1, 18, 100, 1472] {
        add(link(HOST).ipv4(here, there, 64).udp(1000, 9), len);
        add(link(HOST).ipv6(v6(2), v6(1), 64).udp(1000, 9), len);
    }
    add(link(HOST).ipv4(here, there, 64).udp(1000, 9), 8000);
    add(link(HOST).ipv6(v6(2), v6(1), 64).udp(1000, 9), 8000);
    add(tagged().ipv4(here, there, 64).udp(1000, 9), 100);
    add(twice().ipv6(v6(2), v6(1), 64).udp(1000, 9), 1400);
    add(link([1, 0, 0x5e, 0, 0, 0xfb]).ipv4(here, [224, 0, 0, 251], 1).udp(5353, 5353), 50);
    add(link(group6).ipv6(v6(2), mdns6, 1).udp(5353, 5353), 50);
    add(link([0xff; 6]).ipv4(here, [255; 4], 64).udp(68, 67), 300);
    // Malformed frames: each one truncated at every header, and with wrong lengths.
    let good = all[6].clone();
    for len in [14, 15, 33, 34, 35, 41] {
        all.push(good[..len].to_vec());
    }
    for (at, value) in [(14, 0x4f), (14, 0x65), (14, 0x40), (16, 0xff), (24, 0xff), (38, 0xff)] {
        let mut bad = good.clone();
        bad[at] = value;
        all.push(bad);
    }
    let mut odd = good;
    odd[12..14].copy_from_slice(&[0x88, 0xb5]);
    all.push(odd);
    all
}

#[test]
fn sent_frames_are_unchanged_on_tap_and_in_vif_capture() {
    let name = "wire::sent_frames_are_unchanged_on_tap_and_in_vif_capture";
    if !entered_with(name, &[TSHARK, ("tcpdump", "tcpdump")]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("theirs.pcap"), dir.path().join("ours.pcapng"));
    let rig = Rig::new(NicConfig::default(), |vif| {
        (vif.vifname, vif.mtu) = (Some("v0".into()), Some(9000));
    });
    let mut guest = rig.guest();
    let frames = frames();
    let count = frames.len();
    let mut tcpdump = Command::new("tcpdump");
    tcpdump.args(["-i", "v0", "-U", "--immediate-mode", "-s", "0", "-c", &count.to_string(), "-w"]);
    tcpdump.arg(&theirs).args(["ether", "src", &GUEST_MAC.to_string()]).stderr(Stdio::piped());
    let mut dump = Running(tcpdump.spawn().unwrap());
    // The program prints a line when it listens.
    let mut said = [0; 1];
    dump.0.stderr.as_mut().unwrap().read_exact(&mut said).unwrap();
    wait_for(|| fs::metadata(&theirs).ok().filter(|file| file.len() > 0));
    let reader = rig.settings.probe.open(usize::MAX).unwrap();
    let queue = guest.driver.class_mut().queue().unwrap();
    for frame in &frames {
        wait_for(|| {
            let sent = queue.send(frame, Checksum::Unknown).is_ok();
            queue.publish().unwrap();
            sent.then_some(())
        });
    }
    assert!(dump.0.wait().unwrap().success());
    let mut file = CaptureFile::begin(fs::File::create(&ours).unwrap(), "v0", 70_000).unwrap();
    wait_for(|| {
        let add = |record: &pvio_ports::pcapng::CapturedPacket| {
            if record.sent {
                file.add(record)?;
            }
            Ok(true)
        };
        reader.read(Duration::from_millis(10), add).unwrap();
        (file.packets() == count as u64).then_some(())
    });
    file.end(reader.lost()).unwrap();
    let bytes = |file: &Path| {
        let mut reader = pcap_file::pcap::PcapReader::new(fs::File::open(file).unwrap()).unwrap();
        let mut all = Vec::new();
        while let Some(packet) = reader.next_packet() {
            all.push(packet.unwrap().data.to_vec());
        }
        all
    };
    let seen = bytes(&theirs);
    assert_eq!(seen.len(), count);
    for (n, (seen, sent)) in seen.iter().zip(&frames).enumerate() {
        assert!(seen == sent, "frame {n}: {seen:02x?} of {sent:02x?}");
    }
    // tshark reads the same from both files, and no more wrong checksums than were sent.
    let fields = ["-T", "fields", "-e", "frame.len", "-e", "frame.protocols", "-e", "_ws.col.info"];
    assert_eq!(tshark(&ours, &fields), tshark(&theirs, &fields));
    let times = tshark(&ours, &["-T", "fields", "-e", "frame.time_epoch"]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let ages: Vec<f64> =
        times.iter().map(|t| now.as_secs_f64() - t.parse::<f64>().unwrap()).collect();
    assert!(ages.iter().all(|age| (0.0..600.0).contains(age)), "{times:?}");
    assert!(times.iter().any(|t| !t.ends_with("000")), "nanoseconds: {times:?}");
    let way = tshark(
        &ours,
        &["-T", "fields", "-e", "frame.interface_name", "-e", "frame.packet_flags_direction"],
    );
    assert!(way.iter().all(|line| line.starts_with("v0\t") && line.contains('2')), "{way:?}");
}

/// A guest and a remote host, with this namespace as a router in between, whose interface to the
/// remote host has no offloads.
struct Route {
    guest: KernelGuest,
    far: Space,
    rig: Rig,
}

impl Route {
    fn new(mtu: u32, words: &str) -> Self {
        let rig = Rig::new(NicConfig::default(), |vif| {
            (vif.vifname, vif.mtu) = (Some("v0".into()), Some(mtu));
            vif.options = Some(words.into());
            vif.ip = Some("192.0.2.2 fd00:1::2".into());
        });
        let guest = KernelGuest::attach(&rig, mtu);
        let far = Space::new("far");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let here = |args: &str| ip(args).unwrap_or_else(|| panic!("ip {args}"));
        here("link set lo up");
        here(&format!("link add m0 mtu {mtu} type veth peer name f0 mtu {mtu} netns {}", far.0));
        for (name, v4, v6) in
            [("v0", "192.0.2.1/24", "fd00:1::1/64"), ("m0", "198.51.100.1/24", "fd00:2::1/64")]
        {
            here(&format!("addr add {v4} dev {name}"));
            here(&format!("addr add {v6} dev {name} nodad"));
            here(&format!("link set {name} up"));
        }
        let off = Command::new("ethtool")
            .args(["-K", "m0", "tx", "off", "tso", "off", "gso", "off", "sg", "off"])
            .output()
            .unwrap();
        assert!(off.status.success(), "{}", String::from_utf8_lossy(&off.stderr));
        for (space, name, v4, v6, by4, by6) in [
            (&guest.space, "eth0", "192.0.2.2/24", "fd00:1::2/64", "192.0.2.1", "fd00:1::1"),
            (&far, "f0", "198.51.100.2/24", "fd00:2::2/64", "198.51.100.1", "fd00:2::1"),
        ] {
            space.ip(&format!("addr add {v4} dev {name}"));
            space.ip(&format!("addr add {v6} dev {name} nodad"));
            space.ip(&format!("link set {name} up"));
            space.ip(&format!("route add default via {by4}"));
            space.ip(&format!("-6 route add default via {by6}"));
        }
        // The router sends neighbour solicitations from a link-local address, once duplicate
        // address detection has ended.
        for name in ["v0", "m0"] {
            let alone = format!("-6 -o addr show dev {name} scope link -tentative");
            wait_for(|| ip(&alone).filter(|addresses| addresses.contains("fe80")));
        }
        Self { guest, far, rig }
    }

    /// Returns the counters of all checksum errors, in both stacks.
    fn checksum_errors(&self) -> u64 {
        let count = |space: &Space| {
            let v4 = space.run("cat /proc/net/snmp");
            let mut lines =
                v4.lines().filter(|line| line.starts_with("Tcp:") || line.starts_with("Udp:"));
            let mut sum = 0;
            while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
                let at = names.split(' ').position(|name| name == "InCsumErrors").unwrap();
                sum += values.split(' ').nth(at).unwrap().parse::<u64>().unwrap();
            }
            let v6 = space.run("cat /proc/net/snmp6");
            let wrong = v6.lines().filter(|line| line.contains("InCsumErrors"));
            sum + wrong
                .map(|l| l.split_whitespace().last().unwrap().parse::<u64>().unwrap())
                .sum::<u64>()
        };
        count(&self.guest.space) + count(&self.far)
    }
}

#[test]
fn routed_traffic_of_guest_kernel_has_valid_checksums() {
    let name = "wire::routed_traffic_of_guest_kernel_has_valid_checksums";
    if !entered_with(name, &[("iperf3", "iperf3"), ("ethtool", "ethtool"), TSHARK]) {
        return;
    }
    for (mtu, words) in [(1500, "guard=ip"), (9000, "")] {
        let route = Route::new(mtu, words);
        let stats = route.rig.all_stats();
        let mut server = route.far.command("iperf3");
        let server = Running(server.args(["-s"]).stdout(Stdio::null()).spawn().unwrap());
        wait_for(|| route.far.run("ss -ltnH").contains(":5201").then_some(()));
        for line in [
            "-c 198.51.100.2 -n 20M",
            "-c 198.51.100.2 -n 20M -R",
            "-c fd00:2::2 -n 20M",
            "-c fd00:2::2 -n 20M -R",
            "-c 198.51.100.2 -u -b 50M -n 2M",
            "-c fd00:2::2 -u -b 50M -n 2M -R",
        ] {
            let out = route.guest.space.run(&format!("iperf3 {line} -J"));
            assert!(!out.contains("\"error\""), "{line}: {out}");
        }
        drop(server);
        let moved: u64 = stats.iter().map(|s| s.tx_bytes() + s.rx_bytes()).sum();
        assert!(moved >= 4 * 20_000_000, "{moved}");
        let gso: (u64, u64) = (
            stats.iter().map(|s| s.tx_gso_packets()).sum(),
            stats.iter().map(|s| s.rx_gso_packets()).sum(),
        );
        assert!(gso.0 > 100 && gso.1 > 100, "GSO packets in both directions: {gso:?}");
        assert_eq!(route.checksum_errors(), 0);
        for reason in
            [DropReason::TxChecksum, DropReason::TxGso, DropReason::RxGso, DropReason::TxSpoofIp]
        {
            assert_eq!(
                stats.iter().map(|s| s.dropped(reason)).sum::<u64>(),
                0,
                "{}",
                reason.code()
            );
        }
    }
}

#[test]
fn tap_is_created_in_configured_network_namespace() {
    let name = "wire::tap_is_created_in_configured_network_namespace";
    if !entered_with(name, &[]) {
        return;
    }
    let space = Space::new("tap");
    let words = format!("netns={}", space.0);
    let options = NicConfig { max_queues: Some(3), ..NicConfig::default() };
    let rig =
        Rig::new(options, |vif| (vif.vifname, vif.options) = (Some("v0".into()), Some(words)));
    let mut guest = rig.guest();
    assert!(ip("link show dev v0").is_none(), "tap is not in the default namespace");
    let there = ip(&format!("-n {} -o link show dev v0", space.0)).unwrap();
    assert!(there.contains("LOWER_UP"), "{there}");
    // Packets pass: requests of that kernel reach the guest.
    space.ip("addr add 192.0.2.1/24 dev v0");
    let _ = space.command("ip").args(["route", "get", "192.0.2.2"]).output();
    space.ip("neigh add 192.0.2.2 lladdr 00:16:3e:01:02:03 dev v0");
    let queue = guest.driver.class_mut().queue().unwrap();
    let send = "exec 3>/dev/udp/192.0.2.2/9; echo hello >&3";
    assert!(space.command("bash").args(["-c", send]).status().unwrap().success());
    let frame = wait_for(|| {
        let got = queue.receive(|frame, _| frame.to_vec()).unwrap();
        queue.publish().unwrap();
        got.filter(|frame| frame.ends_with(b"hello\n"))
    });
    assert!(Transport::of(&frame).unwrap().udp);
    guest.close();
    rig.remove();
    assert!(
        ip(&format!("-n {} link show dev v0", space.0)).is_none(),
        "tap was not removed with its vif"
    );
}

#[test]
fn tap_joins_and_leaves_open_vswitch_bridge() {
    let name = "wire::tap_joins_and_leaves_open_vswitch_bridge";
    let run = tempfile::tempdir().unwrap();
    let needs = ["ovs-vsctl", "ovsdb-tool", "ovsdb-server", "ovs-vswitchd"];
    let needs = needs.map(|program| (program, "openvswitch-switch"));
    // A separate Open vSwitch with its datapath in user space.
    let place = |what: &str| format!("OVS_{what}DIR={}", run.path().display());
    let places = ["RUN", "DB", "LOG"].map(place);
    let before = ["env", &places[0], &places[1], &places[2]];
    if !entered_with_before(name, &needs, &before) {
        return;
    }
    let dir = std::env::var("OVS_RUNDIR").unwrap();
    let (db, socket) = (format!("{dir}/conf.db"), format!("{dir}/db.sock"));
    let vsctl = |line: &str| {
        let out =
            Command::new("ovs-vsctl").arg("--timeout=20").args(line.split(' ')).output().unwrap();
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "ovs-vsctl {line}: {error}");
        String::from_utf8(out.stdout).unwrap()
    };
    let schema = "/usr/share/openvswitch/vswitch.ovsschema";
    assert!(Command::new("ovsdb-tool").args(["create", &db, schema]).status().unwrap().success());
    let start = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        Running(command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let _server = start("ovsdb-server", &[&db, &format!("--remote=punix:{socket}")]);
    // The socket's name exists shortly before the program listens.
    wait_for(|| UnixStream::connect(&socket).ok());
    vsctl("--no-wait init");
    let _switch = start("ovs-vswitchd", &[&format!("unix:{socket}")]);
    vsctl("add-br ovs0 -- set bridge ovs0 datapath_type=netdev");
    let rig = Rig::new(NicConfig::default(), |vif| {
        (vif.vifname, vif.bridge) = (Some("v0".into()), Some("ovs0".into()));
    });
    let mut guest = rig.guest();
    assert_eq!(vsctl("list-ports ovs0"), "v0\n");
    ip("addr add 192.0.2.1/24 dev ovs0").unwrap();
    ip("link set ovs0 up").unwrap();
    let mut who_has = [&[0xff; 6][..], &GUEST_MAC.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    who_has.extend([&GUEST_MAC.0[..], &[192, 0, 2, 2], &[0; 6], &[192, 0, 2, 1]].concat());
    let queue = guest.driver.class_mut().queue().unwrap();
    wait_for(|| {
        let _ = queue.send(&who_has, Checksum::Unknown);
        queue.publish().unwrap();
        let answer = |frame: &[u8], _| frame[12..14] == [8, 6] && frame[21] == 2;
        queue.receive(answer).unwrap().filter(|is_answer| *is_answer)
    });
    guest.close();
    rig.remove();
    assert_eq!(vsctl("list-ports ovs0"), "");
}
