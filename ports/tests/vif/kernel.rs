//! A guest's TCP/IP stack against the kernel's, through frontend, rings, backend and a tap, in a
//! separate network namespace.

use crate::rig::frames::pattern;
use crate::rig::namespace::{entered, ip};
use crate::rig::stack::Stack;
use crate::rig::{GUEST_MAC, Guest, PATIENCE, Rig, wait_for};
use pvio_event_channel::{EventChannel, EventChannels as _};
use pvio_grant_table::{Access, Granter};
use pvio_hosted::{Channel, Domain, Pages};
use pvio_netback::fault::DropReason;
use pvio_netfront::{Checksum, Nic};
use pvio_ports::host::NicConfig;
use pvio_ring::proto::checksum::Transport;
use pvio_ring::shm::Region;
use pvio_xenbus::driver::{Fault, FrontendClass, FrontendContext};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{Hotplug, read_hotplug, read_state};
use pvio_xenbus::handshake::vif::{EventChannels, FrontRequest, Queue};
use pvio_xenbus::{XenbusState, Xenstore};
use smoltcp::socket::tcp;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const HOST: [u8; 4] = [192, 0, 2, 1];

/// Sends `data` to the kernel, which returns it in the same connection; both compare it.
pub fn echo_by_tcp(stack: &mut Stack, host: IpAddr, data: &[u8]) {
    let listener = TcpListener::bind((host, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let len = data.len();
    let kernel = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = vec![0; len];
        stream.read_exact(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        all
    });
    let handle = stack.connect(host, port);
    let (mut sent, mut back) = (0, Vec::new());
    let begin = Instant::now();
    while back.len() < len {
        assert!(begin.elapsed() < PATIENCE, "{sent} sent, {} back, of {len}", back.len());
        stack.turn();
        let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
        if socket.can_send() && sent < len {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
        }
    }
    assert!(kernel.join().unwrap() == data && back == data);
}

fn options() -> NicConfig {
    NicConfig { address: Some((HOST.into(), 24)), ..NicConfig::default() }
}

#[test]
fn tcp_with_blank_checksums_passes_both_ways_over_ipv4_and_ipv6() {
    if !entered("kernel::tcp_with_blank_checksums_passes_both_ways_over_ipv4_and_ipv6", &[]) {
        return;
    }
    let rig = Rig::new(options(), |vif| vif.vifname = Some("v0".into()));
    let mut stack = Stack::new(rig.guest());
    ip("addr add fd00::1/64 dev v0 nodad").unwrap();
    let data = pattern(2_000_000);
    echo_by_tcp(&mut stack, HOST.into(), &data);
    let v6: IpAddr = "fd00::1".parse().unwrap();
    echo_by_tcp(&mut stack, v6, &data);

    let stats = rig.stats();
    assert!(stats.tx_bytes() > 4_000_000 && stats.rx_bytes() > 4_000_000, "{stats:?}");
    assert_eq!(stats.dropped(DropReason::TxChecksum), 0);
    assert_eq!(stats.dropped(DropReason::TxPort), 0);
    // Checksums were blank in both directions: the guest verified none of the received ones.
    let queue = stack.guest.driver.class_mut().queue().unwrap();
    assert!(queue.features().checksum_v4 && queue.features().checksum_v6);
    assert_eq!(queue.unverified(), 0);
    assert_eq!((queue.counters().tx_errors, queue.counters().rx_errors), (0, 0));
}

#[test]
fn kernel_leaves_checksum_blank_for_guest_with_offload() {
    if !entered("kernel::kernel_leaves_checksum_blank_for_guest_with_offload", &[]) {
        return;
    }
    let rig = Rig::new(options(), |vif| vif.vifname = Some("v0".into()));
    let mut guest = rig.guest();
    ip(&format!("neigh add 192.0.2.2 lladdr {GUEST_MAC} dev v0")).unwrap();
    let socket = UdpSocket::bind((IpAddr::from(HOST), 0)).unwrap();
    socket.send_to(b"blank", "192.0.2.2:9").unwrap();
    let queue = guest.driver.class_mut().queue().unwrap();
    let (frame, checksum) = wait_for(|| {
        let packet = queue.receive(|frame, checksum| (frame.to_vec(), checksum)).unwrap();
        queue.publish().unwrap();
        // The kernel also sends other packets on a new link.
        packet.filter(|(frame, _)| frame.ends_with(b"blank"))
    });
    assert_eq!(checksum, Checksum::Blank);
    let transport = Transport::of(&frame).unwrap();
    assert_eq!(frame[40..42], transport.pseudo_sum.to_be_bytes());
}

#[test]
fn worker_without_work_sleeps_until_guest_notifies() {
    if !entered("kernel::worker_without_work_sleeps_until_guest_notifies", &[]) {
        return;
    }
    let rig = Rig::new(options(), |vif| vif.vifname = Some("v0".into()));
    let mut guest = rig.guest();
    let stats = rig.stats();
    let queue = guest.driver.class_mut().queue().unwrap();
    // A worker that never sleeps is never woken.
    for _ in 0..3 {
        let before = stats.wakeups();
        wait_for(|| {
            queue.send(&[0xff; 60], Checksum::Unknown).unwrap();
            queue.publish().unwrap();
            (stats.wakeups() > before).then_some(())
        });
    }
}

#[test]
fn jumbo_packets_span_several_slots() {
    if !entered("kernel::jumbo_packets_span_several_slots", &[]) {
        return;
    }
    let rig = Rig::new(options(), |vif| vif.mtu = Some(9000));
    let mut stack = Stack::new(rig.guest());
    let link = ip("-o link show").unwrap();
    let name = format!("vif{}.0", rig.addr.front);
    assert!(link.lines().any(|l| l.contains(&name) && l.contains(" mtu 9000 ")), "{link}");
    echo_by_tcp(&mut stack, HOST.into(), &pattern(2_000_000));
    let counters = *stack.guest.driver.class_mut().queue().unwrap().counters();
    assert!(counters.rx_bytes / counters.rx_packets > 1514, "{counters:?}");
}

#[test]
fn tap_persists_while_guest_reattaches_and_is_removed_with_device() {
    if !entered("kernel::tap_persists_while_guest_reattaches_and_is_removed_with_device", &[]) {
        return;
    }
    let mut rig = Rig::new(options(), |vif| vif.vifname = Some("v0".into()));
    let back = rig.addr.backend_path();
    let mut guest = rig.guest();
    assert_eq!(read_hotplug(&mut rig.tools, &back).unwrap(), Some(Hotplug::Connected));
    let index = |link: &str| link.split(':').next().unwrap().to_owned();
    let first = ip("-o link show dev v0").unwrap();
    assert!(!first.contains("NO-CARRIER"), "{first}");

    guest.close();
    let gone = wait_for(|| ip("-o link show dev v0").filter(|l| l.contains("NO-CARRIER")));
    assert_eq!(index(&gone), index(&first), "interface index is unchanged");
    // As a kernel that is booted by another one.
    let domain = guest.domain.clone();
    let mut stack = Stack::new(Guest::attach(&domain, rig.addr, Nic::new(domain.clone())));
    echo_by_tcp(&mut stack, HOST.into(), &pattern(10_000));
    // And as one that crashed before, without closing the device.
    let mut stack = Stack::new(Guest::attach(&domain, rig.addr, Nic::new(domain.clone())));
    echo_by_tcp(&mut stack, HOST.into(), &pattern(10_000));

    stack.guest.close();
    rig.remove();
    assert!(ip("link show dev v0").is_none());
}

#[test]
fn failed_tap_creation_closes_device_with_error_and_hotplug_status() {
    if !entered("kernel::failed_tap_creation_closes_device_with_error_and_hotplug_status", &[]) {
        return;
    }
    let mut rig = Rig::new(options(), |vif| vif.bridge = Some("nope".into()));
    let error = rig.error();
    assert!(error.contains("tap-no-bridge") && error.contains("ip link add nope"), "{error}");
    let back = rig.addr.backend_path();
    let hotplug = read_hotplug(&mut rig.tools, &back).unwrap();
    let Some(Hotplug::Failed(why)) = hotplug else { panic!("{hotplug:?}") };
    assert!(why.contains("ip link add nope"), "without the remedy: {why}");
    // The reason is written before the state.
    let begin = Instant::now();
    while read_state(&mut rig.tools, &back).unwrap() != XenbusState::Closed {
        assert!(begin.elapsed() < Duration::from_secs(20), "device was not closed");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn guest_protocol_violation_closes_device_with_reason() {
    if !entered("kernel::guest_protocol_violation_closes_device_with_reason", &[]) {
        return;
    }
    let mut rig = Rig::new(options(), |vif| vif.vifname = Some("v0".into()));
    let domain = rig.domain();
    let mut guest = Guest::attach(&domain, rig.addr, Raw { domain: domain.clone(), rings: None });
    let (tx, _, channel) = guest.driver.class().rings.as_ref().unwrap();
    // An impossible producer: a thousand requests in a ring of 256.
    assert!(tx.store_u32(0, 1000, Ordering::SeqCst));
    channel.notify().unwrap();
    let error = rig.error();
    assert!(error.contains("tx-ring-producer-overflow"), "{error}");
    guest.until(XenbusState::Closed);
    assert!(ip("-o link show dev v0").unwrap().contains("NO-CARRIER"));
}

/// Guest that sets up rings whose contents the test writes.
struct Raw {
    domain: Domain,
    rings: Option<(Pages, Pages, Channel)>,
}

impl FrontendClass for Raw {
    fn prepare(&mut self, _: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault> {
        let pages = || self.domain.alloc_pages(1).unwrap();
        let channel = self.domain.alloc_unbound(context.back_id).unwrap();
        self.rings = Some((pages(), pages(), channel));
        Ok(())
    }

    fn request(
        &self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        let (tx, rx, channel) = self.rings.as_ref().unwrap();
        let grant = |page| self.domain.grant(context.back_id, page, 0, Access::ReadWrite);
        let keys = Queue {
            tx_ring_ref: grant(tx).unwrap().0,
            rx_ring_ref: grant(rx).unwrap().0,
            events: EventChannels::Shared(channel.port().0),
        };
        FrontRequest { queues: vec![keys], ..FrontRequest::default() }.write(xs, &context.front)
    }

    fn connect(&mut self, _: &mut dyn Xenstore, _: &FrontendContext) -> Result<(), Fault> {
        Ok(())
    }

    fn disconnect(&mut self) {}

    fn release(&mut self) {}
}
