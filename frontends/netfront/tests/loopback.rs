//! The frontend and the backend in one thread; every packet is sent back.

mod common;

use common::{BACK, FRONT, Vif, echo, pattern};
use pvio_event_channel::EventChannel;
use pvio_netback::port::memory::loopback;
use pvio_netfront::{Checksum, Features, SendError};
use pvio_ring::proto::checksum::Transport;
use pvio_sim::LocalMachine;

fn receive_all(vif: &mut Vif) -> Vec<(Vec<u8>, Checksum)> {
    let mut all = Vec::new();
    while let Some(packet) = vif.front.receive(|f, c| (f.to_vec(), c)).unwrap() {
        all.push(packet);
    }
    vif.front.publish().unwrap();
    all
}

#[test]
fn packets_of_every_size_round_trip() {
    let (_machine, mut vif) = echo();
    // Every size near each slot boundary, and a sample of the others: together many more slots than
    // the rings have, so that both wrap several times.
    let near = (0..=16).flat_map(|page: usize| page * 4096..page * 4096 + 40);
    let sizes =
        (14..1600).chain(near.map(|n| n.saturating_sub(20))).chain((1600..65536).step_by(97));
    for len in sizes.chain([65534, 65535]).filter(|n| (14..=65535).contains(n)) {
        let frame = pattern(len, len);
        vif.front.send(&frame, Checksum::Unknown).unwrap();
        vif.front.publish().unwrap();
        vif.poll();
        assert_eq!(receive_all(&mut vif), [(frame, Checksum::Unknown)], "{len} bytes");
    }
    assert_eq!(vif.stats.dropped_in_all(), 0);
    let c = vif.front.counters();
    assert_eq!((c.tx_packets, c.tx_bytes), (c.rx_packets, c.rx_bytes));
    assert_eq!((c.tx_errors, c.rx_errors), (0, 0));
}

#[test]
fn packet_order_is_kept_and_full_ring_is_back_pressure() {
    let (_machine, mut vif) = echo();
    let mut sent = 0_u32;
    let mut got = 0_u32;
    for _ in 0..200 {
        loop {
            let mut frame = pattern(60 + sent as usize % 1400, 0);
            frame[..4].copy_from_slice(&sent.to_le_bytes());
            match vif.front.send(&frame, Checksum::Unknown) {
                Ok(()) => sent += 1,
                Err(SendError::Full) => break,
                Err(error) => panic!("{error}"),
            }
        }
        vif.front.publish().unwrap();
        vif.poll();
        for (frame, _) in receive_all(&mut vif) {
            assert_eq!(frame[..4], got.to_le_bytes());
            assert_eq!(frame.len(), 60 + got as usize % 1400);
            got += 1;
        }
    }
    assert!(sent >= 200 * 100, "{sent}");
    vif.poll();
    got += receive_all(&mut vif).len() as u32;
    assert_eq!(sent, got);
}

#[test]
fn checksum_flags_round_trip() {
    let (_machine, mut vif) = echo();
    // TCP over IPv4 whose checksum the receiver has to complete.
    let mut frame = pattern(14 + 20 + 20 + 33, 1);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 73, 0, 0, 0, 0, 64, 6]);
    let transport = Transport::of(&frame).unwrap();
    transport.blank(&mut frame);
    for checksum in [Checksum::Blank, Checksum::Validated, Checksum::Unknown] {
        vif.front.send(&frame, checksum).unwrap();
        vif.front.publish().unwrap();
        vif.poll();
        assert_eq!(receive_all(&mut vif), [(frame.clone(), checksum)]);
    }
}

#[test]
fn packet_with_feature_not_negotiated_is_not_sent() {
    let (_machine, mut vif) = echo();
    vif.front.set_features(Features::default());
    assert_eq!(vif.front.send(&pattern(4097, 0), Checksum::Unknown), Err(SendError::Size(4097)));
    let mut frame = pattern(87, 1);
    frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 73, 0, 0, 0, 0, 64, 6]);
    assert_eq!(vif.front.send(&frame, Checksum::Blank), Err(SendError::Checksum));
    vif.front.set_features(common::FRONT_FEATURES);
    assert_eq!(vif.front.send(&frame, Checksum::Blank), Ok(()));
    let not_ip = pattern(60, 1);
    assert_eq!(vif.front.send(&not_ip, Checksum::Blank), Err(SendError::Checksum));
    for len in [0, 13, 65536] {
        assert_eq!(vif.front.send(&pattern(len, 0), Checksum::Unknown), Err(SendError::Size(len)));
    }
}

#[test]
fn frontend_and_backend_sleep_until_notified_once_per_batch() {
    let (machine, mut vif) = echo();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    let at_back = |vif: &Vif| vif.back.channels().next().unwrap().take().unwrap();
    let _ = (at_back(&vif), vif.front.channel().take());
    assert!(!vif.back.final_check().unwrap());
    assert!(!vif.front.final_check().unwrap());

    vif.front.send(&pattern(60, 0), Checksum::Unknown).unwrap();
    assert!(!at_back(&vif), "not published yet");
    vif.front.publish().unwrap();
    assert!(at_back(&vif));
    vif.poll();
    assert_eq!(vif.front.channel().take(), Ok(true));
    assert!(vif.front.has_work().unwrap());
    assert!(vif.front.final_check().unwrap(), "final check with a received packet");
    assert_eq!(receive_all(&mut vif).len(), 1);
    assert!(!vif.front.final_check().unwrap());
    assert!(!vif.back.final_check().unwrap());
    let before = (front.events_sent(), back.events_sent());

    // A burst causes one event in each direction; posted buffers and completed requests cause none.
    for i in 0..30 {
        vif.front.send(&pattern(60, i), Checksum::Unknown).unwrap();
    }
    vif.front.publish().unwrap();
    vif.poll();
    assert_eq!(receive_all(&mut vif).len(), 30);
    assert_eq!((front.events_sent() - before.0, back.events_sent() - before.1), (1, 1));
}

#[test]
fn full_tx_ring_is_notified_when_there_is_room() {
    let (_machine, mut vif) = echo();
    let _ = vif.front.channel().take();
    // While the ring is not full, completed requests need no notification.
    assert!(!vif.front.final_check().unwrap());
    while vif.front.send(&pattern(4000, 0), Checksum::Unknown).is_ok() {}
    vif.front.publish().unwrap();
    assert!(!vif.front.final_check().unwrap());
    vif.poll();
    assert_eq!(vif.front.channel().take(), Ok(true));
    assert!(vif.front.has_room(1).unwrap());
}

#[test]
fn dismantled_queue_releases_all_grants_pages_and_ports() {
    let machine = LocalMachine::new();
    let mut vif = Vif::on(&machine, FRONT, loopback(16));
    let front = machine.domain(FRONT);
    assert_eq!(front.pages_granted(), 2 + 256 + 256);
    assert_eq!(front.pages_allocated(), 2 + 256 + 256);
    vif.front.send(&pattern(60, 0), Checksum::Unknown).unwrap();
    vif.front.publish().unwrap();
    vif.poll();

    // The backend has still mapped the rings: they must not be freed.
    let queue = vif.front.dismantle().expect_err("mapped");
    assert_eq!(front.pages_granted(), 2);
    drop(vif.back);
    queue.dismantle().expect("unmapped");
    assert_eq!((front.pages_granted(), front.pages_allocated(), front.ports_open()), (0, 0, 0));
}

#[test]
fn rings_mapped_by_backend_at_drop_are_leaked_not_reused() {
    let machine = LocalMachine::new();
    let vif = Vif::on(&machine, FRONT, loopback(16));
    let front = machine.domain(FRONT);
    drop(vif.front);
    assert_eq!(front.pages_allocated(), 2, "the rings");
    drop(vif.back);
    assert_eq!(front.pages_allocated(), 2, "mapped rings are leaked and not reused");
}
