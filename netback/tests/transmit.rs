//! The transmit path: which packets are forwarded, and how.

mod common;

use common::{ALL, pattern, setup, setup_at, tcp};
use pvio_event_channel::EventChannel;
use pvio_grant_table::GrantRef;
use pvio_netback::fault::{DropReason, Fault, QueueError};
use pvio_netback::port::{Checksum, Gso, NetPort, Offload};
use pvio_ring::proto::checksum::Transport;
use pvio_ring::proto::netif::{Extra, ExtraKind, GsoKind, TxFlags, TxRequest, rsp};

#[test]
fn one_slot_packet_is_sent_and_completed() {
    let mut s = setup(ALL);
    let frame = pattern(60, 1);
    let slot = s.guest.slot(3, 100, &frame);
    s.guest.send(&[slot]);
    assert_eq!(s.poll().tx, 1);
    assert_eq!(s.sent(), [(frame, Offload::default())]);
    assert_eq!(s.guest.answers(), [(3, rsp::OKAY)]);
    assert_eq!((s.stats.tx_packets(), s.stats.tx_bytes()), (1, 60));
}

#[test]
fn batch_of_sent_packets_sends_one_event() {
    let mut s = setup(ALL);
    let before = s.back.events_sent();
    for page in 0..40 {
        let slot = s.guest.slot(page, 0, &pattern(60, page));
        s.guest.send(&[slot]);
    }
    assert_eq!(s.poll().tx, 40);
    assert_eq!(s.back.events_sent() - before, 1);
    assert_eq!(s.sent().len(), 40);
    assert_eq!(s.guest.answers().len(), 40);
    // No further notification was requested.
    let slot = s.guest.slot(0, 0, &pattern(60, 0));
    s.guest.send(&[slot]);
    s.poll();
    assert_eq!(s.back.events_sent() - before, 1);
    assert_eq!(s.stats.notifications(), 1);
}

#[test]
fn split_event_channels_signal_tx_and_rx_separately() {
    let mut s = setup_at(ALL, 0, true);
    assert_eq!(s.queue.channels().count(), 2);
    let slot = s.guest.slot(0, 0, &pattern(60, 0));
    s.guest.send(&[slot]);
    s.poll();
    assert_eq!(s.guest.tx_channel.take(), Ok(true));
    assert_eq!(s.guest.rx_channel.as_ref().unwrap().take(), Ok(false));
    s.guest.post(1..3);
    s.inject(&pattern(60, 0), Offload::default());
    s.poll();
    assert_eq!(s.guest.tx_channel.take(), Ok(false));
    assert_eq!(s.guest.rx_channel.as_ref().unwrap().take(), Ok(true));
}

#[test]
fn xsa_432_packet_is_sent_dropped_or_fatal_by_slot_count() {
    for slots in 1..=22 {
        let mut s = setup(ALL);
        let parts: Vec<_> = (0..slots).map(|i| pattern(100 + i, i)).collect();
        let refs: Vec<_> = parts.iter().map(Vec::as_slice).collect();
        let packet = s.guest.packet(0, &refs);
        s.guest.send(&packet);
        let result = s.queue.poll(&mut s.port, 64);
        if slots <= 19 {
            assert!(result.is_ok(), "{slots} slots");
            assert_eq!(s.sent(), [(parts.concat(), Offload::default())], "{slots} slots");
            let all_okay: Vec<_> = (0..slots as u16).map(|id| (id, rsp::OKAY)).collect();
            assert_eq!(s.guest.answers(), all_okay);
        } else if slots <= 21 {
            assert!(result.is_ok(), "{slots} slots");
            assert_eq!(s.stats.dropped(DropReason::TxSlots), 1);
            let all_error: Vec<_> = (0..slots as u16).map(|id| (id, rsp::ERROR)).collect();
            assert_eq!(s.guest.answers(), all_error);
            assert_eq!(s.sent(), []);
        } else {
            assert_eq!(result, Err(QueueError::Fault(Fault::TooManySlots)));
        }
    }
}

#[test]
fn largest_and_smallest_packets_are_sent() {
    let mut s = setup(ALL);
    let frame = pattern(65535, 5);
    let parts: Vec<_> = frame.chunks(4096).collect();
    let packet = s.guest.packet(0, &parts);
    s.guest.send(&packet);
    let least = pattern(14, 6);
    let slot = s.guest.slot(40, 0, &least);
    s.guest.send(&[slot]);
    s.poll();
    assert_eq!(s.sent(), [(frame, Offload::default()), (least, Offload::default())]);
}

#[test]
fn xsa_448_empty_slots_are_completed_without_grant_access() {
    // XSA-448: the page of an empty slot may be anything.
    let mut s = setup(ALL);
    let frame = pattern(90, 2);
    let mut packet = s.guest.packet(0, &[&frame[..60], &[], &frame[60..], &[]]);
    packet[1].gref = GrantRef(u32::MAX);
    packet[3].gref = GrantRef(0);
    packet[3].offset = 4096;
    s.guest.send(&packet);
    s.poll();
    assert_eq!(s.sent(), [(frame, Offload::default())]);
    let okay = |id| (id, rsp::OKAY);
    assert_eq!(s.guest.answers(), [okay(0), okay(1), okay(2), okay(3)]);
}

#[test]
fn xsa_423_headers_split_over_slots_are_parsed_after_copy() {
    // XSA-423: a packet is parsed only after all of it is in private memory.
    for cut in 0..64 {
        let mut s = setup(ALL);
        let frame = tcp(false, 64);
        let mut packet =
            s.guest.packet(0, &[&frame[..cut], &frame[cut..cut + 5], &frame[cut + 5..]]);
        packet[0].flags |= TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED;
        s.guest.send(&packet);
        s.poll();
        let checksum = Checksum::Partial { start: 34, offset: 16 };
        assert_eq!(s.sent(), [(frame, Offload { checksum, gso: None })], "cut at {cut}");
    }
}

#[test]
fn tx_checksum_flags_become_port_offload() {
    let blank = TxFlags::CSUM_BLANK;
    let valid = TxFlags::DATA_VALIDATED;
    for (v6, start) in [(false, 34), (true, 54)] {
        let partial = Checksum::Partial { start, offset: 16 };
        for (flags, checksum) in [
            (TxFlags::empty(), Checksum::Unknown),
            (valid, Checksum::Validated),
            (blank | valid, partial),
            (blank, partial),
        ] {
            let mut s = setup(ALL);
            let mut slot = s.guest.slot(0, 0, &tcp(v6, 10));
            slot.flags = flags;
            s.guest.send(&[slot]);
            s.poll();
            assert_eq!(s.sent()[0].1, Offload { checksum, gso: None }, "{flags:?}");
        }
    }
}

#[test]
fn negotiated_gso_is_passed_to_port_and_other_gso_is_dropped() {
    let mut s = setup(pvio_netback::Features { sends_gso_v4: true, ..ALL });
    let frame = tcp(false, 20_000);
    let parts: Vec<_> = frame.chunks(4096).collect();
    let mut packet = s.guest.packet(0, &parts);
    packet[0].flags |= TxFlags::EXTRA_INFO | TxFlags::CSUM_BLANK;
    s.guest.push(&packet[..1]);
    let kind = ExtraKind::Gso { size: 1448, kind: GsoKind::TcpV4 };
    s.guest.tx.push(&Extra { kind, more: false }.to_bytes()).unwrap();
    s.guest.send(&packet[1..]);
    s.poll();
    let t = Transport::of(&frame).unwrap();
    let checksum = Checksum::Partial { start: t.start as u16, offset: 16 };
    let gso = Some(Gso { size: 1448, kind: GsoKind::TcpV4 });
    assert_eq!(s.sent(), [(frame, Offload { checksum, gso })]);
    let mut answers = s.guest.answers();
    assert_eq!(answers.pop(), Some((0, rsp::NULL)));
    assert_eq!(answers, (0..packet.len() as u16).map(|id| (id, rsp::OKAY)).collect::<Vec<_>>());

    // The other IP version was not negotiated, and UDP cannot be segmented this way.
    for frame in [tcp(true, 5000), {
        let mut udp = tcp(false, 5000);
        udp[23] = 17;
        udp
    }] {
        let mut slot = s.guest.slot(0, 0, &frame[..4000]);
        slot.size = 4000;
        slot.flags = TxFlags::EXTRA_INFO | TxFlags::CSUM_BLANK;
        s.guest.push(&[slot]);
        s.guest.tx.push(&Extra { kind, more: false }.to_bytes()).unwrap();
        let _ = s.guest.tx.publish();
        s.poll();
        assert_eq!(s.sent(), []);
    }
    assert_eq!(s.stats.dropped_in_all(), 2);
}

#[test]
fn gso_packet_with_full_checksum_is_blanked() {
    for (v6, kind) in [(false, GsoKind::TcpV4), (true, GsoKind::TcpV6)] {
        let all = pvio_netback::Features { sends_gso_v4: true, sends_gso_v6: true, ..ALL };
        let mut s = setup(all);
        let frame = tcp(v6, 4000);
        let mut slot = s.guest.slot(0, 0, &frame);
        slot.flags = TxFlags::EXTRA_INFO | TxFlags::DATA_VALIDATED;
        s.guest.push(&[slot]);
        let kind = ExtraKind::Gso { size: 1448, kind };
        s.guest.tx.push(&Extra { kind, more: false }.to_bytes()).unwrap();
        let _ = s.guest.tx.publish();
        s.poll();
        let t = Transport::of(&frame).unwrap();
        let mut blank = frame.clone();
        t.blank(&mut blank);
        let sent = s.sent();
        assert!(sent[0].0 == blank && blank != frame);
        let checksum = Checksum::Partial { start: t.start as u16, offset: 16 };
        assert_eq!(sent[0].1.checksum, checksum);
        assert_eq!((s.stats.gso_fixups(), s.stats.tx_gso_packets()), (1, 1));
    }
}

#[test]
fn largest_gso_packet_with_headers_in_own_slot_is_sent() {
    // As a Linux guest sends it: the headers alone, then full pages starting in the middle of one.
    let mut s = setup(pvio_netback::Features { sends_gso_v4: true, ..ALL });
    let frame = tcp(false, 65535 - 54);
    let mut parts = vec![&frame[..66]];
    parts.extend(frame[66..].chunks(4096));
    let mut packet = s.guest.packet(0, &parts);
    assert_eq!(packet.len(), 17);
    packet[0].flags |= TxFlags::EXTRA_INFO | TxFlags::CSUM_BLANK;
    s.guest.push(&packet[..1]);
    let kind = ExtraKind::Gso { size: 1448, kind: GsoKind::TcpV4 };
    s.guest.tx.push(&Extra { kind, more: false }.to_bytes()).unwrap();
    s.guest.send(&packet[1..]);
    s.poll();
    assert!(s.sent()[0].0 == frame);
    assert_eq!(s.guest.answers().len(), 18);
}

#[test]
fn full_port_blocks_ring_and_loses_no_packet() {
    let mut s = setup(ALL);
    let held: Vec<_> = std::iter::from_fn(|| s.port.reserve().ok()).collect();
    let frame = pattern(60, 4);
    let slot = s.guest.slot(0, 0, &frame);
    s.guest.send(&[slot]);
    assert!(!s.poll().any());
    assert_eq!(s.queue.final_check(), Ok(false), "may sleep until the port has space");
    assert_eq!(s.queue.has_work(), Ok(false));
    held.into_iter().for_each(|buf| s.port.unreserve(buf));
    s.queue.unblock();
    assert_eq!(s.queue.has_work(), Ok(true));
    assert_eq!(s.poll().tx, 1);
    assert_eq!(s.sent(), [(frame, Offload::default())]);
}

#[test]
fn request_published_before_sleep_is_found_by_final_check() {
    let mut s = setup(ALL);
    assert_eq!(s.queue.final_check(), Ok(false));
    let slot = s.guest.slot(0, 0, &pattern(60, 4));
    s.guest.push(&[slot]);
    assert!(s.guest.tx.publish(), "publish notifies a sleeping backend");
    assert_eq!(s.queue.final_check(), Ok(true));
    s.poll();
    assert_eq!(s.queue.final_check(), Ok(false));
}

#[test]
fn lost_port_drops_packet_without_fault() {
    let mut s = setup(ALL);
    let slot = s.guest.slot(0, 0, &pattern(60, 4));
    s.guest.send(&[slot]);
    let (_, gone) = pvio_netback::port::memory::pair(1);
    drop(std::mem::replace(&mut s.wire, gone));
    s.poll();
    assert_eq!(s.guest.answers(), [(0, rsp::ERROR)]);
    assert_eq!(s.stats.dropped(DropReason::TxPort), 1);
}

#[test]
fn poll_sends_at_most_its_budget() {
    let mut s = setup(ALL);
    for i in 0..100 {
        let slot = TxRequest { id: i, ..s.guest.slot(0, 0, &pattern(60, 4)) };
        s.guest.send(&[slot]);
    }
    assert_eq!(s.queue.poll(&mut s.port, 10).unwrap().tx, 10);
    assert_eq!(s.queue.poll(&mut s.port, 70).unwrap().tx, 70);
    assert_eq!(s.queue.poll(&mut s.port, 64).unwrap().tx, 20);
}
