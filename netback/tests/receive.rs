//! The receive path: port to guest.

mod common;

use common::{ALL, DATA_PAGES, pattern, setup, setup_at, tcp};
use pvio_netback::Features;
use pvio_netback::fault::{DropReason, Fault, QueueError};
use pvio_netback::port::{Checksum, Gso, NetPort, Offload};
use pvio_netback::queue::{BACKLOG_BYTES, BACKLOG_PACKETS, STAGED_MAX};
use pvio_ring::RingFault;
use pvio_ring::proto::checksum::Transport;
use pvio_ring::proto::netif::{GsoKind, RxFlags, RxResponse, rsp};
use pvio_ring::shm::Region;
use std::sync::atomic::Ordering;

const PLAIN: Offload = Offload { checksum: Checksum::Unknown, gso: None };

#[test]
fn received_packet_spans_one_slot_per_page_across_index_wrap() {
    for len in [14, 60, 1514, 4095, 4096, 4097, 8192, 65535] {
        // With the second start, the last packet's slots cross the wrap of the indices.
        for start in [0, u32::MAX - 5] {
            let mut s = setup_at(ALL, start, false);
            s.guest.post(0..30);
            let frame = pattern(len, len);
            s.inject(&frame, PLAIN);
            assert_eq!(s.poll().rx, 1);
            let got = s.guest.received();
            let slots = len.div_ceil(4096);
            assert_eq!(got.len(), slots);
            let mut whole = Vec::new();
            for (i, r) in got.iter().enumerate() {
                let more = if i + 1 < slots { RxFlags::MORE_DATA } else { RxFlags::empty() };
                let size = (len - i * 4096).min(4096);
                let status = size as i16;
                assert_eq!(*r, RxResponse { id: i as u16, offset: 0, flags: more, status });
                whole.extend(s.guest.page(i, size));
            }
            assert_eq!(whole, frame);
            assert_eq!((s.stats.rx_packets(), s.stats.rx_bytes()), (1, len as u64));
        }
    }
}

#[test]
fn packet_without_enough_rx_buffers_waits() {
    let mut s = setup(ALL);
    let frame = pattern(9000, 1);
    s.guest.post(0..2);
    s.inject(&frame, PLAIN);
    s.poll();
    assert_eq!(s.guest.received(), []);
    assert_eq!(s.queue.backlog(), 1);
    let budgets = |packets, bytes| {
        [
            ("waiting-packets", packets, BACKLOG_PACKETS as u64),
            ("waiting-bytes", bytes, BACKLOG_BYTES as u64),
            ("staged-pages", 0, STAGED_MAX as u64),
        ]
    };
    assert_eq!(s.stats.budgets().collect::<Vec<_>>(), budgets(1, 9000));
    assert_eq!(s.queue.final_check(), Ok(false), "may sleep with two of three needed buffers");
    assert!(s.guest.post(2..3), "third buffer notifies the backend");
    assert_eq!(s.queue.final_check(), Ok(true));
    s.poll();
    assert_eq!(s.guest.received().len(), 3);
    assert_eq!(s.queue.backlog(), 0);
    assert_eq!(s.stats.budgets().collect::<Vec<_>>(), budgets(0, 0));
    drop(s.queue);
    assert!(s.stats.budgets().all(|(_, used, limit)| (used, limit) == (0, 0)));
}

#[test]
fn posting_buffers_to_queue_without_backlog_requests_no_event() {
    let mut s = setup(ALL);
    s.guest.post(0..1);
    s.inject(&pattern(60, 0), PLAIN);
    s.poll();
    assert_eq!(s.queue.final_check(), Ok(false));
    s.guest.received();
    assert!(!s.guest.post(1..20));
}

#[test]
fn guest_without_buffers_has_bounded_backlog_and_transmit_continues() {
    // Large packets: the backlog is bounded by bytes.
    let mut s = setup(ALL);
    for i in 0..12 {
        s.inject(&pattern(60_000, i), PLAIN);
        s.poll();
    }
    let fit = BACKLOG_BYTES / 60_000;
    assert_eq!(s.queue.backlog(), fit);
    assert_eq!(s.stats.dropped_in_all(), 0, "other packets stay in the port");
    // Transmission continues.
    let slot = s.guest.slot(0, 0, &pattern(60, 0));
    s.guest.send(&[slot]);
    assert_eq!(s.poll().tx, 1);
    // When buffers are posted, the oldest packets are delivered first.
    s.guest.post(0..15);
    while s.poll().any() {}
    assert_eq!(s.guest.received().len(), 15);
    assert_eq!(s.guest.page(0, 4096), pattern(60_000, 0)[..4096]);
    assert_eq!(s.queue.backlog(), fit, "one packet delivered, one taken from the port");
    s.queue.drop_backlog(&mut s.port);
    assert_eq!(s.queue.backlog(), 0);
    assert_eq!(s.stats.dropped(DropReason::RxNoBuffers), fit as u64);
    common::drain(&mut s.port);
    let free: Vec<_> = std::iter::from_fn(|| s.wire.reserve().ok()).collect();
    assert_eq!(free.len(), 128, "a buffer was lost");
}

#[test]
fn backlog_of_small_packets_is_bounded_by_count() {
    let mut s = setup(ALL);
    let (port, wire) = pvio_netback::port::memory::pair(BACKLOG_PACKETS + 8);
    (s.port, s.wire) = (port, wire);
    for i in 0..BACKLOG_PACKETS + 5 {
        s.inject(&pattern(60, i), PLAIN);
    }
    while s.poll().any() {}
    assert_eq!(s.queue.backlog(), BACKLOG_PACKETS);
    assert_eq!(
        std::iter::from_fn(|| s.port.receive()).count(),
        5,
        "other packets stay in the port"
    );
}

#[test]
fn batch_of_received_packets_sends_one_event() {
    let mut s = setup(ALL);
    s.guest.post(0..40);
    let before = s.back.events_sent();
    (0..40).for_each(|i| s.inject(&pattern(60, i), PLAIN));
    assert_eq!(s.poll().rx, 40);
    assert_eq!(s.back.events_sent() - before, 1);
    assert_eq!(s.guest.received().len(), 40);
}

#[test]
fn packet_that_guest_cannot_accept_is_dropped_with_reason() {
    let features = Features { sg: false, ..ALL };
    let gso = |size| Some(Gso { size, kind: GsoKind::TcpV4 });
    let blank = Checksum::Partial { start: 34, offset: 16 };
    let outside = Checksum::Partial { start: 60, offset: 16 };
    let cases = [
        (pattern(13, 0), PLAIN, features, DropReason::RxShort),
        (pattern(0, 0), PLAIN, features, DropReason::RxShort),
        (pattern(4097, 0), PLAIN, features, DropReason::RxTooBig),
        (tcp(false, 90), Offload { checksum: blank, gso: gso(9) }, features, DropReason::RxGso),
        (
            tcp(false, 90),
            Offload { checksum: blank, gso: gso(0) },
            Features { gso_v4: true, ..ALL },
            DropReason::RxGso,
        ),
        (
            tcp(false, 90),
            Offload { checksum: blank, gso: gso(9) },
            Features { gso_v4: true, checksum_v4: false, ..ALL },
            DropReason::RxGso,
        ),
        (pattern(60, 0), Offload { checksum: outside, gso: None }, ALL, DropReason::RxChecksum),
    ];
    for (frame, offload, features, reason) in cases {
        let mut s = setup(features);
        s.guest.post(0..30);
        s.inject(&frame, offload);
        s.poll();
        assert_eq!(s.stats.dropped(reason), 1, "{reason:?}");
        assert_eq!(s.stats.dropped_in_all(), 1);
        assert_eq!(s.guest.received(), []);
    }
}

#[test]
fn blank_checksum_is_completed_unless_guest_negotiated_offload() {
    for v6 in [false, true] {
        for accepts in [false, true] {
            let features = if v6 {
                Features { checksum_v6: accepts, checksum_v4: false, ..ALL }
            } else {
                Features { checksum_v4: accepts, checksum_v6: false, ..ALL }
            };
            let mut s = setup(features);
            s.guest.post(0..4);
            let mut frame = tcp(v6, 101);
            let t = Transport::of(&frame).unwrap();
            t.blank(&mut frame);
            let checksum = Checksum::Partial { start: t.start as u16, offset: t.offset as u16 };
            s.inject(&frame, Offload { checksum, gso: None });
            s.poll();
            let got = s.guest.received();
            let data = s.guest.page(0, frame.len());
            if accepts {
                assert_eq!(got[0].flags, RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED);
                assert_eq!(data, frame);
            } else {
                assert_eq!(got[0].flags, RxFlags::DATA_VALIDATED);
                assert!(t.verify(&data));
            }
        }
    }
}

#[test]
fn blank_checksum_of_inner_header_is_completed() {
    // The checksum of a tunnel's inner packet: the guest would complete the outer one.
    let mut s = setup(ALL);
    s.guest.post(0..4);
    let frame = tcp(false, 101);
    let checksum = Checksum::Partial { start: 60, offset: 6 };
    s.inject(&frame, Offload { checksum, gso: None });
    s.poll();
    assert_eq!(s.guest.received()[0].flags, RxFlags::DATA_VALIDATED);
    let data = s.guest.page(0, frame.len());
    assert_ne!(data[66..68], frame[66..68]);
    assert_eq!(data[..66], frame[..66]);
}

#[test]
fn validated_checksum_sets_data_validated_flag() {
    let mut s = setup(ALL);
    s.guest.post(0..4);
    s.inject(&pattern(60, 0), Offload { checksum: Checksum::Validated, gso: None });
    s.inject(&pattern(60, 0), PLAIN);
    s.poll();
    let got = s.guest.received();
    assert_eq!((got[0].flags, got[1].flags), (RxFlags::DATA_VALIDATED, RxFlags::empty()));
}

#[test]
fn gso_packet_uses_one_slot_for_extra_segment() {
    let mut s = setup(Features { gso_v4: true, ..ALL });
    let mut frame = tcp(false, 9000);
    let t = Transport::of(&frame).unwrap();
    t.blank(&mut frame);
    let checksum = Checksum::Partial { start: 34, offset: 16 };
    let gso = Some(Gso { size: 1448, kind: GsoKind::TcpV4 });
    s.guest.post(0..3);
    s.inject(&frame, Offload { checksum, gso });
    s.poll();
    assert_eq!(s.guest.received(), [], "three pages and an extra need four slots");
    s.guest.post(3..4);
    s.poll();
    let first = {
        let mut slot = s.guest.rx.pop().unwrap().unwrap();
        RxResponse::read(&mut slot).unwrap()
    };
    let flags =
        RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED | RxFlags::MORE_DATA | RxFlags::EXTRA_INFO;
    assert_eq!(first, RxResponse { id: 0, offset: 0, flags, status: 4096 });
    let mut extra = [0; 8];
    s.guest.rx.pop().unwrap().unwrap().read(&mut extra).unwrap();
    assert_eq!(extra, [1, 0, 0xa8, 5, 1, 0, 0, 0]);
    let rest = s.guest.received();
    assert_eq!((rest[0].id, rest[0].status, rest[0].flags), (2, 4096, RxFlags::MORE_DATA));
    assert_eq!((rest[1].id, rest[1].flags), (3, RxFlags::empty()));
    let data = [s.guest.page(0, 4096), s.guest.page(2, 4096), s.guest.page(3, frame.len() - 8192)];
    assert_eq!(data.concat(), frame);
}

#[test]
fn failed_grant_copy_sets_error_in_its_own_slot() {
    let mut s = setup(ALL);
    let taken = s.guest.grefs[1];
    pvio_grant_table::Granter::end_access(&s.guest.domain, taken).unwrap();
    s.guest.post(0..5);
    s.inject(&pattern(9000, 0), PLAIN);
    s.inject(&pattern(60, 0), PLAIN);
    s.poll();
    let statuses: Vec<_> = s.guest.received().iter().map(|r| r.status).collect();
    assert_eq!(statuses, [4096, rsp::ERROR, 808, 60]);
    assert_eq!(s.stats.dropped(DropReason::RxCopy), 1);
    assert_eq!(s.stats.rx_packets(), 1);
}

#[test]
fn rx_producer_overflow_ends_vif() {
    let mut s = setup(ALL);
    s.guest.rx_page.store_u32(0, 257, Ordering::SeqCst);
    s.inject(&pattern(60, 0), PLAIN);
    let fault = Fault::RxRing(RingFault::ProducerOverflow { prod: 257, ahead: 257, most: 256 });
    assert_eq!(s.queue.poll(&mut s.port, 64), Err(QueueError::Fault(fault)));
    assert_eq!(fault.code(), "rx-ring-producer-overflow");
}

#[test]
fn dropped_queue_unmaps_rings_and_closes_ports() {
    let s = setup_at(ALL, 0, true);
    assert_eq!((s.back.pages_mapped(), s.back.ports_open()), (2, 2));
    drop(s.queue);
    assert_eq!((s.back.pages_mapped(), s.back.ports_open()), (0, 0));
    assert_eq!(s.guest.domain.pages_granted(), DATA_PAGES + 2);
}

#[test]
fn killed_guest_drops_packet_without_fault() {
    let mut s = setup(ALL);
    s.guest.post(0..4);
    s.machine.kill(common::FRONT);
    s.inject(&pattern(60, 0), PLAIN);
    s.poll();
    assert_eq!(s.stats.dropped(DropReason::RxCopy), 1);
    drop(s.queue);
    assert_eq!(s.back.pages_mapped(), 0);
}
