//! What a guest and its toolstack change while the NIC is connected, in a network namespace of the test's
//! own.

mod rig;

use pvio_hosted::Domain;
use pvio_netback::fault::DropReason;
use pvio_netback::host::TapOptions;
use pvio_netfront::Nic;
use pvio_xenbus::handshake::common::{read_state, write_state};
use pvio_xenbus::handshake::vif::{multicast_request_path, write_xdp_headroom};
use pvio_xenbus::{XenbusState, Xenstore};
use rig::namespace::{entered, ip};
use rig::{GUEST_MAC, Guest, Rig, wait_for};
use std::net::UdpSocket;

fn rig() -> Rig {
    let address = Some(([192, 0, 2, 1].into(), 24));
    let options = TapOptions { address, max_queues: Some(1), ..TapOptions::default() };
    Rig::new(options, |vif| vif.vifname = Some("v0".into()))
}

/// Sends a datagram until the guest has it; nothing else may be wrong with it.
fn hears(guest: &mut Guest<Nic<Domain>>, host: &UdpSocket, to: &str, word: &[u8]) {
    wait_for(|| {
        host.send_to(word, to).unwrap();
        let queue = guest.driver.class_mut().queue().expect("it is connected");
        let got = queue.receive(|frame, _| frame.ends_with(word)).unwrap();
        queue.publish().unwrap();
        got.filter(|heard| *heard)
    });
}

#[test]
fn a_guest_reconfigures_its_headroom_as_often_as_it_likes() {
    if !entered("a_guest_reconfigures_its_headroom_as_often_as_it_likes", &[]) {
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
    // What makes no sense ends the session, with a reason.
    write_xdp_headroom(&mut guest.xs, &front, 40_000).unwrap();
    write_state(&mut guest.xs, &front, XenbusState::Reconfiguring).unwrap();
    let error = rig.error();
    assert!(error.contains("xdp-headroom"), "{error}");
}

#[test]
fn a_guest_chooses_its_groups_while_it_is_connected() {
    if !entered("a_guest_chooses_its_groups_while_it_is_connected", &[]) {
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
