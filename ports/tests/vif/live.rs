//! Settings that a guest and its toolstack change while the NIC is connected, in a separate network
//! namespace.

use crate::rig::namespace::{entered, ip};
use crate::rig::{GUEST_MAC, Guest, Rig, wait_for};
use pvio_hosted::Domain;
use pvio_netback::fault::DropReason;
use pvio_netfront::{Hash, Hearing, Nic, Steering, SteeringState};
use pvio_ports::host::NicConfig;
use pvio_ring::proto::netif::{HashTypes, hash_frame};
use pvio_xenbus::handshake::common::{read_state, write_state};
use pvio_xenbus::handshake::vif::{multicast_request_path, write_xdp_headroom};
use pvio_xenbus::{XenbusState, Xenstore};
use std::net::UdpSocket;

fn rig() -> Rig {
    let address = Some(([192, 0, 2, 1].into(), 24));
    let options = NicConfig { address, max_queues: Some(1), ..NicConfig::default() };
    Rig::new(options, |vif| vif.vifname = Some("v0".into()))
}

/// Sends a datagram until the guest has received it, and checks that no other error occurs.
fn hears(guest: &mut Guest<Nic<Domain>>, host: &UdpSocket, to: &str, word: &[u8]) {
    wait_for(|| {
        host.send_to(word, to).unwrap();
        let queue = guest.driver.class_mut().queue().expect("NIC is connected");
        let got = queue.receive(|frame, _| frame.ends_with(word)).unwrap();
        queue.publish().unwrap();
        got.filter(|heard| *heard)
    });
}

#[test]
fn guest_reconfigures_headroom_repeatedly_while_connected() {
    if !entered("live::guest_reconfigures_headroom_repeatedly_while_connected", &[]) {
        return;
    }
    let mut rig = rig();
    let mut guest = rig.guest();
    ip(&format!("neigh replace 192.0.2.2 lladdr {GUEST_MAC} dev v0")).unwrap();
    let host = UdpSocket::bind("192.0.2.1:0").unwrap();
    let (front, back) = (rig.addr.frontend_path(), rig.addr.backend_path());
    for (headroom, word) in [(256, b"with room"), (0, b"with none"), (2048, b"with lots")] {
        write_xdp_headroom(&mut guest.xs, &front, headroom).unwrap();
        write_state(&mut guest.xs, &front, XenbusState::Reconfiguring).unwrap();
        let mut until = |state| {
            wait_for(|| (read_state(&mut rig.tools, &back).unwrap() == state).then_some(()));
        };
        until(XenbusState::Reconfigured);
        hears(&mut guest, &host, "192.0.2.2:99", word);
        write_state(&mut guest.xs, &front, XenbusState::Connected).unwrap();
        until(XenbusState::Connected);
        hears(&mut guest, &host, "192.0.2.2:99", word);
    }
    // An invalid value ends the session with a reason.
    write_xdp_headroom(&mut guest.xs, &front, 40_000).unwrap();
    write_state(&mut guest.xs, &front, XenbusState::Reconfiguring).unwrap();
    let error = rig.error();
    assert!(error.contains("xdp-headroom"), "{error}");
}

#[test]
fn guest_enables_multicast_filter_while_connected() {
    if !entered("live::guest_enables_multicast_filter_while_connected", &[]) {
        return;
    }
    let rig = rig();
    let (stats, mut guest) = (rig.stats(), rig.guest());
    assert!(guest.driver.class().carrier());
    ip("route add 224.0.0.0/4 dev v0").unwrap();
    let host = UdpSocket::bind("192.0.2.1:0").unwrap();
    let key = multicast_request_path(&rig.addr.frontend_path());
    let dropped = || stats.dropped(DropReason::RxGroup);
    for _ in 0..2 {
        hears(&mut guest, &host, "224.1.2.3:99", b"to a group");
        guest.xs.write(&key, b"1").unwrap();
        let before = dropped();
        wait_for(|| {
            host.send_to(b"to no one", "224.1.2.3:99").unwrap();
            (dropped() > before).then_some(())
        });
        guest.xs.write(&key, b"0").unwrap();
    }
    hears(&mut guest, &host, "224.1.2.3:99", b"to all");
}

#[test]
fn nic_requests_all_features_and_each_packet_shows_them() {
    if !entered("live::nic_requests_all_features_and_each_packet_shows_them", &[]) {
        return;
    }
    let address = Some(([192, 0, 2, 1].into(), 24));
    let options = NicConfig { address, max_queues: Some(3), ..NicConfig::default() };
    let rig = Rig::new(options, |vif| vif.vifname = Some("v0".into()));
    let (all_stats, domain) = (rig.all_stats(), rig.domain());
    let key = *b"forty bytes that nobody could guess. But";
    let nic = Nic::new(domain.clone())
        .with_queues(3)
        .steered_by(Steering::new(HashTypes::IPV4, &key).unwrap())
        .choosing_groups()
        .with_headroom(256);
    let mut guest = Guest::attach(&domain, rig.addr, nic);
    let settled = |guest: &mut Guest<Nic<Domain>>| {
        wait_for(|| {
            guest.driver.step(&mut guest.xs).unwrap();
            let nic = guest.driver.class_mut();
            let there = nic.queues().len() == 3 && nic.groups().are_sent();
            (there && nic.is_settled() && !nic.has_news()).then_some(())
        });
    };
    settled(&mut guest);
    let nic = guest.driver.class_mut();
    assert_eq!((nic.steering(), nic.hearing()), (SteeringState::On, Hearing::Joined));
    assert_eq!((nic.headroom_given(), nic.staged()), (256, 3 * 512));
    // One flow for each address; the kernel distributes them over the tap's queues.
    let host = UdpSocket::bind("192.0.2.1:0").unwrap();
    let mut used = [0_u32; 3];
    for last in 2..40 {
        ip(&format!("neigh replace 192.0.2.{last} lladdr {GUEST_MAC} dev v0")).unwrap();
        let word = [b'n', last];
        let (queue, hash, expected, room) = wait_for(|| {
            host.send_to(&word, format!("192.0.2.{last}:99")).unwrap();
            let nic = guest.driver.class_mut();
            nic.queues().iter_mut().enumerate().find_map(|(index, queue)| {
                let got = queue.receive_packet(|packet| {
                    let hash = hash_frame(packet.frame(), HashTypes::IPV4, &key);
                    let mine = packet.frame().ends_with(&word);
                    mine.then_some((index, packet.hash, hash, packet.headroom()))
                });
                queue.publish().unwrap();
                got.unwrap().flatten()
            })
        });
        let (kind, value) = expected.expect("frame is IPv4");
        assert_eq!((hash, room), (Some(Hash { kind, value }), 256));
        assert_eq!(queue, value as usize % 128 % 3);
        used[queue] += 1;
    }
    assert!(used.iter().all(|count| *count > 0), "{used:?}");
    assert!(
        all_stats.iter().map(|stats| stats.steered()).sum::<u64>() > 0,
        "no packet was steered to another queue"
    );
    // A group that the guest has not joined, and then joins.
    ip("route add 224.0.0.0/4 dev v0").unwrap();
    let dropped = || all_stats.iter().map(|s| s.dropped(DropReason::RxGroup)).sum::<u64>();
    let before = dropped();
    wait_for(|| {
        host.send_to(b"to no one", "224.1.2.3:99").unwrap();
        (dropped() > before).then_some(())
    });
    guest.driver.class_mut().join([1, 0, 0x5e, 1, 2, 3]).unwrap();
    settled(&mut guest);
    wait_for(|| {
        host.send_to(b"to a group", "224.1.2.3:99").unwrap();
        guest.driver.class_mut().queues().iter_mut().find_map(|queue| {
            let got = queue.receive(|frame, _| frame.ends_with(b"to a group")).unwrap();
            queue.publish().unwrap();
            got.filter(|heard| *heard)
        })
    });
    // Removes the headroom, then the staged pages, then the device.
    guest.driver.class_mut().ask_headroom(0);
    wait_for(|| {
        guest.driver.step(&mut guest.xs).unwrap();
        (guest.driver.class().headroom_given() == 0).then_some(())
    });
    guest.driver.class_mut().unstage();
    settled(&mut guest);
    let nic = guest.driver.class();
    assert_eq!((nic.staged(), nic.not_unstaged(), nic.fault()), (0, 0, None));
    guest.close();
    rig.remove();
}
