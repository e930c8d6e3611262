//! Formats of received packets for old and new guests: headroom before the data (XDP), and the
//! segment size in a slot before the packet (the form of segmentation before extra segments).

#[path = "common/control.rs"]
mod control;

mod common;

use common::{ALL, pattern, setup, tcp};
use control::many;
use pvio_netback::Features;
use pvio_netback::fault::DropReason;
use pvio_netback::port::{Checksum, Gso, Offload};
use pvio_netback::queue::Headroom;
use pvio_ring::proto::netif::{
    CtrlAsk, CtrlStatus, Extra, ExtraKind, GsoKind, RxFlags, RxResponse,
};
use pvio_ring::shm::{PAGE_SIZE, Region};

fn xdp(headroom: u16) -> [u8; 8] {
    Extra { kind: ExtraKind::Xdp { headroom }, more: false }.to_bytes()
}

fn response(id: u16, offset: u16, flags: RxFlags, status: i16) -> [u8; 8] {
    RxResponse { id, offset, flags, status }.to_bytes()
}

#[test]
fn headroom_offsets_data_in_each_slot_and_adds_xdp_extra_segment() {
    let mut s = setup(ALL);
    s.queue.headroom().set(256);
    s.guest.post(0..8);
    let frame = pattern(5000, 1);
    s.inject(&frame, Offload::default());
    s.poll();
    let (both, none) = (RxFlags::EXTRA_INFO | RxFlags::MORE_DATA, RxFlags::empty());
    let got = s.guest.received_raw();
    assert_eq!(got, [response(0, 256, both, 3840), xdp(256), response(2, 256, none, 1160)]);
    let mut whole = vec![0; 3840];
    s.guest.data.read_bytes(256, &mut whole).unwrap();
    let mut rest = vec![0; 1160];
    s.guest.data.read_bytes(2 * PAGE_SIZE + 256, &mut rest).unwrap();
    assert_eq!([whole, rest].concat(), frame);
    assert_eq!(s.guest.page(0, 256), [0; 256], "headroom is not written");
    // The headroom is removed again.
    s.queue.headroom().set(0);
    s.inject(&frame, Offload::default());
    s.poll();
    let got = s.guest.received();
    assert_eq!(got.iter().map(|r| (r.offset, r.status)).collect::<Vec<_>>(), [(0, 4096), (0, 904)]);
}

#[test]
fn backlogged_packet_uses_headroom_in_effect_at_delivery() {
    let mut s = setup(ALL);
    s.inject(&pattern(4096, 1), Offload::default());
    s.poll();
    assert_eq!(s.queue.backlog(), 1);
    s.queue.headroom().set(256);
    s.guest.post(0..2);
    s.poll();
    assert_eq!(s.guest.received(), [], "packet with headroom needs three slots");
    s.guest.post(2..3);
    s.poll();
    assert_eq!(s.guest.received_raw().len(), 3);
}

#[test]
fn maximum_headroom_without_sg_drops_packet_that_does_not_fit() {
    let mut s = setup(Features { sg: false, ..ALL });
    s.queue.headroom().set(u16::MAX);
    assert_eq!(s.queue.headroom().get(), Headroom::MOST);
    s.guest.post(0..40);
    s.inject(&pattern(2049, 1), Offload::default());
    s.inject(&pattern(2048, 1), Offload::default());
    s.poll();
    assert_eq!(s.stats.dropped(DropReason::RxTooBig), 1);
    let got = s.guest.received_raw();
    assert_eq!(got, [response(0, 2048, RxFlags::EXTRA_INFO, 2048), xdp(2048)]);
    let mut s = setup(ALL);
    s.queue.headroom().set(Headroom::MOST);
    s.guest.post(0..40);
    s.inject(&pattern(65_535, 1), Offload::default());
    s.poll();
    assert_eq!(s.guest.received_raw().len(), 33);
}

#[test]
fn gso_hash_and_xdp_extra_segments_are_ordered_by_type() {
    let mut m = many(Features { gso_v6: true, ..ALL }, 1);
    assert_eq!(m.set(CtrlAsk::SetHashAlgorithm(1)), CtrlStatus::Success);
    assert_eq!(m.set(CtrlAsk::SetHashFlags(15)), CtrlStatus::Success);
    let setup = &mut m.queues[0];
    setup.queue.headroom().set(64);
    setup.guest.post(0..8);
    let gso = Gso { size: 500, kind: GsoKind::TcpV6 };
    let checksum = Checksum::Partial { start: 54, offset: 16 };
    setup.inject(&tcp(true, 1500), Offload { checksum, gso: Some(gso) });
    m.poll();
    let got = m.queues[0].guest.received_raw();
    let segments: Vec<_> = got[1..].iter().map(|raw| (raw[0], raw[1])).collect();
    assert_eq!(segments, [(1, 1), (4, 1), (5, 0)]);
}

#[test]
fn gso_prefix_slot_precedes_packet_if_only_prefix_was_negotiated() {
    let more = RxFlags::MORE_DATA;
    let blank = RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED;
    for (v6, size) in [(false, 54 + 5000), (true, 74 + 5000)] {
        let old = Features { gso_prefix_v4: !v6, gso_prefix_v6: v6, ..ALL };
        // Two slots follow it (as in Linux's netback).
        let prefix = response(0, 1400, RxFlags::GSO_PREFIX | more, 2);
        let first = response(1, 0, blank | more, 4096);
        let last = response(2, 0, RxFlags::empty(), size - 4096);
        assert_eq!(to_be_segmented(old, v6), (vec![prefix, first, last], 0));
        // A guest that accepts the new form gets that one.
        let new = Features { gso_v4: !v6, gso_v6: v6, ..old };
        let (got, _) = to_be_segmented(new, v6);
        assert_eq!(got[0][4] & 16, 0);
        assert_eq!(got[1][0], 1, "the extra segment");
        // The other IP version was not requested.
        let other = Features { gso_prefix_v4: v6, gso_prefix_v6: !v6, ..ALL };
        assert_eq!(to_be_segmented(other, v6), (vec![], 1));
    }
}

/// Delivers an unsegmented packet to a guest with these features.
fn to_be_segmented(features: Features, v6: bool) -> (Vec<[u8; 8]>, u64) {
    let mut s = setup(features);
    s.guest.post(0..8);
    let kind = if v6 { GsoKind::TcpV6 } else { GsoKind::TcpV4 };
    let checksum = Checksum::Partial { start: if v6 { 54 } else { 34 }, offset: 16 };
    let frame = tcp(v6, 5000);
    s.inject(&frame, Offload { checksum, gso: Some(Gso { size: 1400, kind }) });
    s.poll();
    let got = s.guest.received_raw();
    if got.first().is_some_and(|first| first[4] & 16 != 0) {
        assert_eq!(s.guest.page(1, 4096), frame[..4096]);
    }
    (got, s.stats.dropped(DropReason::RxGso))
}
