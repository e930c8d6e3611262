//! Headroom before received data: with pvio's backend, in Linux's form, and with invalid values.

mod common;

use common::{Hostile, echo, hostile, pattern};
use pvio_netfront::{BackendFault, Checksum, HEADROOM_MAX};
use pvio_ring::proto::netif::{Extra, ExtraKind, RxFlags, RxResponse, rsp};
use pvio_ring::shm::Region;

#[test]
fn packets_of_every_size_arrive_with_requested_headroom() {
    for headroom in [1, 256, HEADROOM_MAX] {
        let (_machine, mut vif) = echo();
        vif.front.take_headroom(headroom);
        // Requested, in effect, disabled again.
        for given in [0, headroom, 0] {
            vif.back.headroom().set(given);
            for len in (14..200).chain([1514, 3840, 4095, 4096, 4097, 9000, 65_535]) {
                let frame = pattern(len, len);
                vif.front.send(&frame, Checksum::Unknown).unwrap();
                vif.front.publish().unwrap();
                vif.poll();
                let got = vif.front.receive_packet(|mut packet| {
                    assert_eq!(packet.headroom(), usize::from(given));
                    assert!(packet.frame() == frame, "{len} bytes behind {given}");
                    let whole = packet.with_headroom();
                    assert_eq!(whole.len(), len + usize::from(given));
                    // It contains no data of another packet, although it is written to.
                    let (room, same) = whole.split_at_mut(given.into());
                    assert!(room.iter().all(|byte| *byte == 0) && same == frame);
                    room.fill(0xee);
                    packet.frame_mut()[0] = 1;
                    assert_eq!(packet.frame()[0], 1);
                });
                assert_eq!(got, Ok(Some(())), "{len}");
                vif.front.publish().unwrap();
            }
        }
        assert_eq!(vif.stats.dropped_in_all(), 0);
    }
}

/// Completes one slot of a packet, with data after the headroom of its page.
fn slot(h: &mut Hostile, (offset, status): (u16, i16), flags: RxFlags) {
    let id = h.buffer().id;
    h.rx.push(&RxResponse { id, offset, flags, status }.to_bytes()).unwrap();
}

fn room(h: &mut Hostile, headroom: u16, more: bool) {
    h.buffer();
    let kind = ExtraKind::Xdp { headroom };
    h.rx.push(&Extra { kind, more }.to_bytes()).unwrap();
}

/// Receives a packet of one slot that reports this headroom.
fn says(asked: u16, at: (u16, i16), headroom: u16) -> Result<Option<(usize, usize)>, BackendFault> {
    let mut h = hostile();
    if asked > 0 {
        h.front.take_headroom(asked);
    }
    slot(&mut h, at, RxFlags::EXTRA_INFO);
    room(&mut h, headroom, false);
    let _ = h.rx.publish();
    let got = h.front.receive_packet(|packet| (packet.headroom(), packet.frame().len()));
    if let Err(fault) = got {
        assert_eq!(h.front.receive(|_, _| ()), Err(fault), "fault is permanent");
    }
    got
}

#[test]
fn invalid_headroom_of_received_packet_is_backend_fault() {
    let lie = |headroom, offset| Err(BackendFault::RxHeadroom { headroom, offset });
    assert_eq!(says(256, (256, 60), 256), Ok(Some((256, 60))));
    assert_eq!(says(256, (256, 60), 100), Ok(Some((100, 60))), "less headroom than requested");
    assert_eq!(says(256, (256, 60), 0), Ok(Some((0, 60))));
    // More than was requested; more than there is before the data.
    assert_eq!(says(256, (300, 60), 257), lie(257, 300));
    assert_eq!(says(2048, (2049, 60), u16::MAX), lie(u16::MAX, 2049));
    assert_eq!(
        says(u16::MAX, (2049, 60), 2049),
        lie(2049, 2049),
        "more headroom than can be requested"
    );
    assert_eq!(says(256, (255, 60), 256), lie(256, 255));
    assert_eq!(says(256, (1, 400), 256), lie(256, 1));
    // Included in the length, so that no Ethernet header is left.
    for left in 0..14 {
        assert_eq!(says(256, (0, 256 + left), 256), lie(256, 0));
    }
    assert_eq!(says(256, (0, 100), 256), lie(256, 0));
    assert_eq!(says(256, (0, 256 + 14), 256), Ok(Some((256, 14))));
    assert_eq!(lie(1, 0).unwrap_err().code(), "rx-headroom");
    // Not requested: it is ignored.
    assert_eq!(says(0, (0, 60), 256), Ok(Some((0, 60))));
    assert_eq!(says(0, (256, 60), u16::MAX), Ok(Some((0, 60))));
    // Reported twice.
    let mut h = hostile();
    h.front.take_headroom(256);
    slot(&mut h, (256, 60), RxFlags::EXTRA_INFO);
    room(&mut h, 256, true);
    room(&mut h, 256, false);
    let _ = h.rx.publish();
    assert_eq!(h.front.receive(|_, _| (0, 0)), lie(256, 256));
    // For a packet that has failed.
    let mut h = hostile();
    h.front.take_headroom(256);
    slot(&mut h, (0, rsp::ERROR), RxFlags::EXTRA_INFO);
    room(&mut h, 256, false);
    let _ = h.rx.publish();
    assert_eq!((h.front.receive(|_, _| ()), h.front.counters().rx_errors), (Ok(None), 1));
    // No packet may use more slots than the largest one needs with that headroom.
    for (asked, most) in [(0, 19), (256, 20), (2048, 35)] {
        let mut h = hostile();
        h.front.take_headroom(asked);
        for at in 0..=most {
            slot(&mut h, (asked, if at == 0 { 60 } else { 0 }), RxFlags::MORE_DATA);
            let _ = h.rx.publish();
            let ends = at == most;
            let expected = if ends { Err(BackendFault::RxSlots) } else { Ok(None) };
            assert_eq!(h.front.receive(|_, _| ()), expected, "slot {at} behind {asked}");
        }
    }
}

#[test]
fn headroom_counted_in_length_as_by_linux_netback_is_accepted() {
    // Linux's netback reports offset 0, and the length of every slot includes the headroom.
    let mut h = hostile();
    h.front.take_headroom(256);
    let frame = pattern(3840 + 3840 + 100, 7);
    let mut parts = frame.chunks(3840).peekable();
    let mut first = true;
    while let Some(part) = parts.next() {
        let request = h.buffer();
        let page = pvio_grant_table::GrantMapper::map(
            &h.back,
            common::FRONT,
            &[request.gref],
            pvio_grant_table::Access::ReadWrite,
        );
        page.unwrap().write_bytes(0, &[&[0xaa; 256], part].concat()).unwrap();
        let mut flags = RxFlags::empty();
        flags.set(RxFlags::MORE_DATA, parts.peek().is_some());
        flags.set(RxFlags::EXTRA_INFO, first);
        let status = 256 + part.len() as i16;
        h.rx.push(&RxResponse { id: request.id, offset: 0, flags, status }.to_bytes()).unwrap();
        if core::mem::take(&mut first) {
            room(&mut h, 256, false);
        }
    }
    let _ = h.rx.publish();
    let got = h.front.receive_packet(|mut packet| {
        assert!(packet.frame() == frame);
        assert_eq!(packet.headroom(), 256);
        assert_eq!(packet.with_headroom()[..256], [0; 256], "headroom is zeroed");
    });
    assert_eq!(got, Ok(Some(())));
    // The next packet may have no headroom: the change is in progress.
    slot(&mut h, (0, 60), RxFlags::empty());
    let _ = h.rx.publish();
    let got = h.front.receive_packet(|packet| (packet.headroom(), packet.frame().len()));
    assert_eq!(got, Ok(Some((0, 60))));
}
