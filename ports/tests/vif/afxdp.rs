//! A vif on a network interface's queues by AF_XDP: one end of a veth, in separate network
//! namespaces. The other end is connected to a bridge with a tap, and to a kernel.

use crate::rig::kernel_guest::{KernelGuest, Space};
use crate::rig::moved::{AtEnd, MovedServer};
use crate::rig::namespace::{entered, entered_with, ip, skipped};
use crate::rig::{GUEST_MAC, Guest, Rig, wait_for};
use pvio_grant_table::DomId;
use pvio_netback::fault::DropReason;
use pvio_netback::vif::Attach;
use pvio_netfront::Checksum;
use pvio_ports::afxdp::{AfXdp, AfXdpError, InterfacePlace};
use pvio_ports::host::{LinkDescription, LinkOpener, NicConfig};
use pvio_ports::settings::RuntimeSettings;
use pvio_ring::error::Report;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vif::ToolstackBack;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

type Nic = Guest<pvio_netfront::Nic<pvio_hosted::Domain>>;

/// Process that is killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn here(args: &str) {
    ip(args).unwrap_or_else(|| panic!("ip {args}"));
}

/// Whether this kernel supports AF_XDP on this interface; prints a message if not.
fn can(test: &str, name: &str) -> bool {
    match AfXdp::open(name, None, 1) {
        Ok(_) => true,
        Err(error @ (AfXdpError::Unsupported(_) | AfXdpError::NotPermitted(_))) => {
            skipped(test, &Report(&error).to_string());
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// Creates a veth whose other end is in a bridge.
fn two_ends() {
    here("link add x0 type veth peer name f0");
    here("link add br0 type bridge");
    here("link set f0 master br0");
    ["x0", "f0", "br0"].iter().for_each(|link| here(&format!("link set {link} up")));
}

/// Returns a vif with a tap in that bridge.
fn bridged() -> Rig {
    Rig::new(one_queue(), |vif| {
        (vif.vifname, vif.bridge) = (Some("v0".into()), Some("br0".into()));
    })
}

fn one_queue() -> NicConfig {
    NicConfig { max_queues: Some(1), ..NicConfig::default() }
}

fn frame(from: u8, to: u8, n: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5, n];
    frame.extend((frame.len()..len).map(|at| (at as u8).wrapping_mul(n | 1)));
    frame.truncate(len);
    frame
}

/// Sends frames from one NIC to the other and checks that they arrive unchanged and in order.
fn pass(from: (&mut Nic, u8), to: (&mut Nic, u8)) {
    let lengths = [15, 59, 60, 61, 1000, 1513, 1514];
    for round in 0..60 {
        let len = lengths[usize::from(round) % lengths.len()];
        let sent = frame(from.1, to.1, round, len);
        let queue = from.0.driver.class_mut().queue().unwrap();
        wait_for(|| {
            let sent = queue.send(&sent, Checksum::Unknown).is_ok();
            queue.publish().unwrap();
            sent.then_some(())
        });
        let queue = to.0.driver.class_mut().queue().unwrap();
        // The kernel of this namespace also sends frames.
        let got = wait_for(|| {
            let got = queue.receive(|frame, _| frame.to_vec()).unwrap();
            queue.publish().unwrap();
            got.filter(|frame| frame.get(12..14) == Some(&[0x88, 0xb5]))
        });
        assert!(got == sent, "frame {round}: {got:02x?} of {sent:02x?}");
    }
}

#[test]
fn afxdp_port_passes_frames_unchanged_both_ways_for_successive_guests() {
    let name = "afxdp::afxdp_port_passes_frames_unchanged_both_ways_for_successive_guests";
    if !entered(name, &[]) {
        return;
    }
    two_ends();
    if !can(name, "x0") {
        return;
    }
    let other = bridged();
    let options = NicConfig { max_queues: Some(4), ..NicConfig::default() };
    let rig = Rig::new(options, |vif| vif.options = Some("afxdp=x0".into()));
    let mut far = other.guest();
    let domain = rig.domain();
    for _ in 0..3 {
        let nic = pvio_netfront::Nic::new(domain.clone());
        let mut guest = Guest::attach(&domain, rig.addr, nic);
        let shown = ip("-o -d link show dev x0").unwrap();
        assert!(shown.contains("xdp"), "{shown}");
        pass((&mut guest, 1), (&mut far, 2));
        pass((&mut far, 2), (&mut guest, 1));
        guest.close();
    }
    rig.remove();
    let shown = ip("-o link show dev x0").unwrap();
    assert!(!shown.contains("xdp"), "XDP program is still attached: {shown}");
}

#[test]
fn moved_afxdp_passes_frames_for_successive_guests_without_capabilities() {
    let name = "afxdp::moved_afxdp_passes_frames_for_successive_guests_without_capabilities";
    if !entered(name, &[]) {
        return;
    }
    two_ends();
    if !can(name, "x0") {
        return;
    }
    let other = bridged();
    let mut far = other.guest();
    for at_end in [AtEnd::Stop, AtEnd::Leave] {
        let settings = Arc::new(RuntimeSettings::default());
        let rig = Rig::serving(
            move |domain| (MovedServer::new(domain, one_queue(), at_end), settings),
            |vif| vif.options = Some("afxdp=x0".into()),
        );
        let domain = rig.domain();
        for _ in 0..2 {
            let nic = pvio_netfront::Nic::new(domain.clone());
            let mut guest = Guest::attach(&domain, rig.addr, nic);
            pass((&mut guest, 1), (&mut far, 2));
            pass((&mut far, 2), (&mut guest, 1));
            guest.close();
        }
        rig.remove();
    }
}

#[test]
fn afxdp_link_is_adopted_only_with_place_of_its_interface() {
    let name = "afxdp::afxdp_link_is_adopted_only_with_place_of_its_interface";
    if !entered(name, &[]) {
        return;
    }
    two_ends();
    if !can(name, "x0") {
        return;
    }
    let opener = || LinkOpener::new(one_queue(), Arc::new(|| ()));
    let addr = DeviceAddr::new(BackendKind::Vif, DomId(1), DomId(2), 0);
    let mut vif = ToolstackBack::new(addr, GUEST_MAC);
    vif.options = Some("afxdp=x0".into());
    let mut first = opener();
    first.open(&vif, Attach::Here).unwrap();
    let adopt = |edit: &dyn Fn(&mut InterfacePlace)| {
        let handed = first.link().unwrap().hand_over().unwrap();
        let (mut description, mut descriptors) = handed.unwrap();
        let LinkDescription::AfXdp { place, sockets, .. } = &mut description else {
            panic!("{description:?}")
        };
        edit(place);
        *sockets = false;
        descriptors.truncate(2);
        let mut next = opener();
        let adopted = next.adopt(&vif, first.applied(), &description, descriptors).unwrap();
        assert_eq!(next.link().is_some(), adopted);
        adopted
    };
    assert!(adopt(&|_| ()));
    let found = InterfacePlace::find("f0", None).unwrap();
    assert!(!adopt(&|place| place.index = found.index), "another interface of the host");
    assert!(!adopt(&|place| place.netns = Some("pvio-other".into())));
    assert!(!adopt(&|place| place.name = "f0".into()));
}

#[test]
fn afxdp_guest_without_rx_buffers_holds_bounded_frames_and_worker_sleeps() {
    let name = "afxdp::afxdp_guest_without_rx_buffers_holds_bounded_frames_and_worker_sleeps";
    if !entered(name, &[]) {
        return;
    }
    two_ends();
    if !can(name, "x0") {
        return;
    }
    let (other, rig) =
        (bridged(), Rig::new(one_queue(), |vif| vif.options = Some("afxdp=x0".into())));
    let stats = rig.stats();
    let (mut far, mut guest) = (other.guest(), rig.guest());
    let queue = far.driver.class_mut().queue().unwrap();
    for n in 0..4000_u16 {
        wait_for(|| {
            let sent = queue.send(&frame(2, 1, n as u8, 100), Checksum::Unknown).is_ok();
            queue.publish().unwrap();
            sent.then_some(())
        });
    }
    let mut before = u64::MAX;
    // Waits until no more frames arrive.
    wait_for(|| {
        std::thread::sleep(Duration::from_millis(50));
        let packets = stats.rx_packets();
        (core::mem::replace(&mut before, packets) == packets).then_some(())
    });
    let woken = stats.wakeups();
    std::thread::sleep(Duration::from_millis(500));
    let woken = stats.wakeups() - woken;
    assert!(woken < 100, "{woken} wakeups for packets without rx buffers");
    let ours = |frame: &[u8]| frame.get(12..14) == Some(&[0x88, 0xb5]);
    let queue = guest.driver.class_mut().queue().unwrap();
    let mut taken = 0;
    let mut last = frame(2, 1, 0xff, 1000);
    last[12..14].copy_from_slice(&[0x88, 0xb6]);
    let sender = far.driver.class_mut().queue().unwrap();
    wait_for(|| {
        let _ = sender.send(&last, Checksum::Unknown);
        sender.publish().unwrap();
        while let Some(got) = queue.receive(|frame, _| frame.to_vec()).unwrap() {
            taken += usize::from(ours(&got));
            if got == last {
                return Some(());
            }
        }
        queue.publish().unwrap();
        None
    });
    // One ring of the guest, one of the socket, and the frames in between.
    assert!((256..=256 + 256 + 64).contains(&taken), "{taken} of 4000 packets were buffered");
}

#[test]
fn afxdp_segments_gso_packets_with_valid_checksums() {
    let name = "afxdp::afxdp_segments_gso_packets_with_valid_checksums";
    if !entered_with(name, &[("iperf3", "iperf3"), ("ethtool", "ethtool")]) {
        return;
    }
    let (near, far) = (Space::new("near"), Space::new("far"));
    here("link set lo up");
    near.ip(&format!("link add x0 type veth peer name f0 netns {}", far.0));
    near.ip("link set x0 up");
    match AfXdp::open("x0", Some(&near.0), 1) {
        Err(error @ (AfXdpError::Unsupported(_) | AfXdpError::NotPermitted(_))) => {
            return skipped(name, &Report(&error).to_string());
        }
        other => drop(other.unwrap()),
    }
    let words = format!("afxdp=x0,netns={}", near.0);
    let rig = Rig::new(NicConfig::default(), |vif| vif.options = Some(words));
    let stats = rig.all_stats();
    let guest = KernelGuest::attach(&rig, 1500);
    for (space, name, last) in [(&guest.space, "eth0", 2), (&far, "f0", 1)] {
        space.ip(&format!("addr add 192.0.2.{last}/24 dev {name}"));
        space.ip(&format!("addr add fd00:1::{last}/64 dev {name} nodad"));
        space.ip(&format!("link set {name} up"));
    }
    // With tx offload, the veth would pass on blank checksums, which nothing completes.
    far.run("ethtool -K f0 tx off");
    let mut server = far.command("iperf3");
    let _server = Running(server.args(["-s"]).stdout(Stdio::null()).spawn().unwrap());
    wait_for(|| far.run("ss -ltnH").contains(":5201").then_some(()));
    for line in ["-c 192.0.2.1 -n 10M", "-c 192.0.2.1 -n 10M -R", "-c fd00:1::1 -n 10M"] {
        let out = guest.space.run(&format!("iperf3 {line} -J"));
        assert!(!out.contains("\"error\""), "{line}: {out}");
    }
    let out = guest.space.run("iperf3 -c 192.0.2.1 -u -b 20M -n 1M -J");
    assert!(!out.contains("\"error\""), "{out}");
    let cut: u64 = stats.iter().map(|s| s.tx_gso_packets()).sum();
    assert!(cut > 100, "GSO packets of the guest: {cut}");
    let lost: u64 = stats.iter().map(|s| s.dropped(DropReason::TxPort)).sum();
    assert_eq!(lost, 0);
    for file in ["/proc/net/snmp", "/proc/net/snmp6"] {
        for space in [&guest.space, &far] {
            let text = space.run(&format!("cat {file}"));
            let tcp: Vec<_> = text.lines().filter(|l| l.starts_with("Tcp:")).collect();
            if let [names, values] = tcp[..] {
                let at = names.split(' ').position(|name| name == "InCsumErrors").unwrap();
                assert_eq!(values.split(' ').nth(at), Some("0"), "{text}");
            }
            let wrong = text.lines().filter(|l| l.contains("InCsumErrors"));
            let six = wrong.filter(|l| l.starts_with("Udp6") || l.starts_with("Tcp6"));
            assert!(six.clone().all(|l| l.ends_with("\t0") || l.ends_with(" 0")), "{text}");
        }
    }
}

#[test]
fn afxdp_on_missing_or_busy_interface_is_rejected_with_reason() {
    let name = "afxdp::afxdp_on_missing_or_busy_interface_is_rejected_with_reason";
    if !entered(name, &[]) {
        return;
    }
    let refused = |words: &str| {
        Rig::new(NicConfig::default(), |vif| vif.options = Some(words.into())).error()
    };
    let error = refused("afxdp=nowhere0");
    assert!(error.contains("the interface nowhere0 does not exist"), "{error}");
    let error = refused("afxdp=x0,netns=pvio-nowhere");
    assert!(error.contains("the network namespace pvio-nowhere cannot be entered"), "{error}");
    here("link add x0 type veth peer name f0");
    here("link set x0 up");
    if !can(name, "x0") {
        return;
    }
    let _taken = AfXdp::open("x0", None, 1).unwrap();
    let error = refused("afxdp=x0");
    assert!(error.contains("another program uses the interface"), "{error}");
}
