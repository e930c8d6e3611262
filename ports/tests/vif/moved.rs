//! Sessions on a link that another process opened: their threads have descriptors and no
//! capabilities.

use crate::kernel::echo_by_tcp;
use crate::queues::{Many, OFFERED, every_queue_works};
use crate::rig::frames::pattern;
use crate::rig::moved::{AtEnd, MovedServer};
use crate::rig::namespace::{entered, ip};
use crate::rig::stack::Stack;
use crate::rig::{GUEST_MAC, Guest, Rig, wait_for};
use pvio_grant_table::DomId;
use pvio_netback::vif::Attach;
use pvio_netfront::{Checksum, Nic};
use pvio_ports::file::packets_of;
use pvio_ports::host::{LinkDescription, LinkOpener, NicConfig, OpenLink};
use pvio_ports::settings::RuntimeSettings;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vif::ToolstackBack;
use std::sync::Arc;

fn rig(at_end: AtEnd, edit: impl FnOnce(&mut ToolstackBack)) -> Rig {
    let address = Some(([192, 0, 2, 1].into(), 24));
    let config = NicConfig { address, max_queues: Some(OFFERED), ..NicConfig::default() };
    let settings = Arc::new(RuntimeSettings::default());
    Rig::serving(move |domain| (MovedServer::new(domain, config, at_end), settings), edit)
}

#[test]
fn moved_tap_serves_sessions_of_any_number_of_queues() {
    if !entered("moved::moved_tap_serves_sessions_of_any_number_of_queues", &[]) {
        return;
    }
    for at_end in [AtEnd::Stop, AtEnd::Leave, AtEnd::Reset] {
        let rig = rig(at_end, |vif| vif.vifname = Some("v0".into()));
        let domain = rig.domain();
        for count in [3, 1, 4, 2] {
            let mut guest = Guest::attach(&domain, rig.addr, Many::new(&domain, count));
            every_queue_works(&mut guest.driver.class_mut().queues);
            guest.close();
            let link = || ip("-o link show dev v0").unwrap();
            if at_end == AtEnd::Leave {
                assert!(!link().contains("NO-CARRIER"), "{}", link());
            } else {
                wait_for(|| link().contains("NO-CARRIER").then_some(()));
            }
        }
        rig.remove();
        assert!(ip("link show dev v0").is_none(), "the tap is removed with its last handle");
    }
}

#[test]
fn moved_tap_passes_tcp_with_blank_checksums() {
    if !entered("moved::moved_tap_passes_tcp_with_blank_checksums", &[]) {
        return;
    }
    let rig = rig(AtEnd::Stop, |vif| vif.vifname = Some("v0".into()));
    let mut stack = Stack::new(rig.guest());
    echo_by_tcp(&mut stack, [192, 0, 2, 1].into(), &pattern(2_000_000));
    let stats = rig.stats();
    assert!(stats.tx_bytes() > 2_000_000 && stats.rx_bytes() > 2_000_000, "{stats:?}");
    let queue = stack.guest.driver.class_mut().queue().unwrap();
    assert_eq!((queue.unverified(), queue.counters().rx_errors), (0, 0));
}

#[test]
fn moved_files_are_replayed_once_and_recorded_further() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|name| dir.path().join(name));
    let frame = |n: u8| {
        let mut frame = vec![n; 80];
        frame[..6].copy_from_slice(&GUEST_MAC.0);
        frame
    };
    // Without a file to replay, then with the recording of that.
    for (record, replay, sessions) in [(&first, None, 2), (&second, Some(&first), 3)] {
        let replay = replay.map(|path| format!(",replay={}", path.display())).unwrap_or_default();
        let options = format!("record={}{replay}", record.display());
        let rig = rig(AtEnd::Stop, |vif| vif.options = Some(options));
        let domain = rig.domain();
        for session in 0..sessions {
            let mut guest = Guest::attach(&domain, rig.addr, Nic::new(domain.clone()));
            let queue = guest.driver.class_mut().queue().unwrap();
            queue.send(&frame(session), Checksum::Unknown).unwrap();
            queue.publish().unwrap();
            let replayed = if !replay.is_empty() && session == 0 { 2 } else { 0 };
            for n in 0..replayed {
                let got = wait_for(|| queue.receive(|frame, _| frame.to_vec()).unwrap());
                assert_eq!(got, frame(n));
                queue.publish().unwrap();
            }
            guest.close();
            let queue = packets_of(record).unwrap();
            assert_eq!(queue, (0..=session).map(frame).collect::<Vec<_>>());
        }
        rig.remove();
    }
}

#[test]
fn link_is_moved_only_if_its_kind_and_descriptors_permit() {
    let addr = DeviceAddr::new(BackendKind::Vif, DomId(1), DomId(2), 0);
    let open = |options: &str| {
        let mut vif = ToolstackBack::new(addr, GUEST_MAC);
        vif.options = Some(options.into());
        let mut opener = LinkOpener::new(NicConfig::default(), Arc::new(|| ()));
        opener.open(&vif, Attach::Here).map(|()| opener)
    };
    let switch = open("switch=lan").unwrap();
    assert!(switch.link().unwrap().hand_over().unwrap().is_none());
    let loopback = open("loopback").unwrap();
    let (description, none) = loopback.link().unwrap().hand_over().unwrap().unwrap();
    assert_eq!((&description, none.len()), (&LinkDescription::Loopback, 0));
    let file = std::fs::File::open("/dev/null").unwrap();
    let bad = OpenLink::from_descriptors(&description, vec![file.try_clone().unwrap().into()]);
    assert_eq!(bad.unwrap_err().code, "nic-descriptors");
    let tap = LinkDescription::Tap { mtu: 1500, queues: 1 };
    let bad = OpenLink::from_descriptors(&tap, vec![file.into()]);
    assert_eq!(bad.unwrap_err().code, "tap-not-a-tap");
}
