//! GSO packets of TCP.

mod common;

use common::{BACK, FRONT, FRONT_FEATURES, Vif, hostile, pattern};
use pvio_netback::port::memory::loopback;
use pvio_netfront::{BackendFault, Checksum, Features, Gso, Queue, SendError};
use pvio_ring::proto::checksum::Transport;
use pvio_ring::proto::netif::{Extra, ExtraKind, GsoKind, RxFlags, RxResponse};
use pvio_sim::LocalMachine;

const ALL: Features = Features {
    gso_v4: true,
    gso_v6: true,
    takes_gso_v4: true,
    takes_gso_v6: true,
    ..FRONT_FEATURES
};
const V4: Gso = Gso { size: 1400, kind: GsoKind::TcpV4 };

/// Returns a frame of TCP over IPv4 with `len` bytes of data and a blank checksum.
fn frame(len: usize) -> Vec<u8> {
    let mut f = pattern(54 + len, 1);
    f[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6]);
    f[16..18].copy_from_slice(&(40 + len as u16).to_be_bytes());
    f[46] = 0x50;
    Transport::of(&f).unwrap().blank(&mut f);
    f
}

/// Creates a vif whose packets are sent back to it, with GSO in both directions.
fn echo() -> (LocalMachine, Vif) {
    let machine = LocalMachine::new();
    let mut front = Queue::new(&machine.domain(FRONT), BACK).unwrap();
    front.set_features(ALL);
    let stats = Default::default();
    let features = pvio_netback::Features {
        gso_v4: true,
        gso_v6: true,
        sends_gso_v4: true,
        sends_gso_v6: true,
        ..common::BACK_FEATURES
    };
    let back = common::attach(machine.domain(BACK), FRONT, &front, features, &stats);
    let vif = Vif { front, back, port: loopback(64), stats };
    (machine, vif)
}

#[test]
fn gso_packets_of_every_slot_count_round_trip() {
    let (_machine, mut vif) = echo();
    // More slots than the rings have, so that both wrap, with extra segments at every position.
    for round in 0..40 {
        for len in [1, 3000, 4042, 4043, 20_000, 65_535 - 54] {
            let frame = frame(len);
            vif.front.send_gso(&frame, V4).unwrap();
            vif.front.publish().unwrap();
            vif.poll();
            let got = vif.front.receive_with_gso(|f, c, gso| (f == frame, c, gso)).unwrap();
            assert_eq!(got, Some((true, Checksum::Blank, Some(V4))), "{len} bytes, {round}");
            vif.front.publish().unwrap();
        }
    }
    assert_eq!(vif.stats.dropped_in_all(), 0);
    assert_eq!(vif.front.counters().tx_errors, 0);
}

#[test]
fn gso_send_on_full_ring_is_rejected_as_full() {
    let (_machine, mut vif) = echo();
    let small = frame(10);
    let sent = (0..).take_while(|_| vif.front.send_gso(&small, V4).is_ok()).count();
    assert_eq!(sent, 128, "two slots each, of 256");
    assert_eq!(vif.front.send(&small, Checksum::Blank), Err(SendError::Full));
    vif.front.publish().unwrap();
    vif.poll();
    assert!(vif.front.has_room(200).unwrap());
}

#[test]
fn gso_not_negotiated_or_invalid_is_not_sent() {
    let (_machine, mut vif) = echo();
    let frame = frame(2000);
    for gso in [Gso { kind: GsoKind::TcpV6, ..V4 }, Gso { size: 0, ..V4 }] {
        assert_eq!(vif.front.send_gso(&frame, gso), Err(SendError::Gso));
    }
    let mut udp = frame.clone();
    udp[23] = 17;
    assert_eq!(vif.front.send_gso(&udp, V4), Err(SendError::Gso));
    vif.front.set_features(Features { gso_v4: false, ..ALL });
    assert_eq!(vif.front.send_gso(&frame, V4), Err(SendError::Gso));
    vif.front.send(&frame, Checksum::Blank).unwrap();
}

#[test]
fn received_gso_not_negotiated_is_backend_fault() {
    let mut h = hostile();
    h.front.set_features(Features { takes_gso_v6: false, ..ALL });
    for (kind, taken) in [(GsoKind::TcpV4, true), (GsoKind::TcpV6, false)] {
        let buffer = h.buffer();
        let flags = RxFlags::EXTRA_INFO;
        let first = RxResponse { id: buffer.id, offset: 0, flags, status: 60 };
        h.rx.push(&first.to_bytes()).unwrap();
        h.buffer();
        let kind = ExtraKind::Gso { size: 9, kind };
        h.rx.push(&Extra { kind, more: false }.to_bytes()).unwrap();
        let _ = h.rx.publish();
        let got = h.front.receive(|frame, _| frame.len());
        assert_eq!(got, if taken { Ok(Some(60)) } else { Err(BackendFault::RxGso) });
    }
}
