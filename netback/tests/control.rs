//! Limit of a guest's transmit rate, and selection of its multicast groups. The test sets the
//! queue's clock.

mod common;

use common::{ALL, Setup, pattern, setup, tcp};
use pvio_netback::Features;
use pvio_netback::fault::DropReason;
use pvio_netback::port::Offload;
use pvio_ring::proto::netif::{Extra, ExtraKind, GsoKind, RxFlags, TxFlags, TxRequest, rsp};
use pvio_xenbus::handshake::vif::VifRate;
use std::sync::Arc;
use std::time::Duration;

/// Keeps the ring full of packets of one page for a time. Returns the number of bytes sent.
fn flood(s: &mut Setup, from: Duration, time: Duration) -> usize {
    let (mut now, mut bytes) = (from, 0);
    while now < from + time {
        s.queue.set_clock(now);
        loop {
            while s.guest.tx.free() > 0 {
                let slot = s.guest.slot(0, 0, &pattern(1000, 0));
                s.guest.push(&[slot]);
            }
            let _ = s.guest.tx.publish();
            if s.poll().tx == 0 {
                break;
            }
            bytes += s.sent().iter().map(|(frame, _)| frame.len()).sum::<usize>();
            s.guest.answers();
        }
        assert_eq!(s.queue.has_work(), Ok(false), "rate-limited requests count as no work");
        assert_eq!(s.queue.final_check(), Ok(false));
        let next = s.queue.deadline().expect("deadline for the next credit");
        assert!(next > now);
        now = next;
    }
    bytes
}

#[test]
fn rate_limited_transmit_reaches_rate_and_drops_nothing() {
    let mut s = setup(ALL);
    let begin = Duration::from_secs(1);
    s.queue.limit().set(Some(VifRate { bytes: 10_000, usec: 10_000 }));
    let ten = Duration::from_secs(10);
    // One megabyte per second, plus a burst at the start.
    let bytes = flood(&mut s, begin, ten);
    assert!((9_900_000..10_200_000).contains(&bytes), "{bytes}");
    // The limit is changed while the queue runs.
    s.queue.limit().set(Some(VifRate { bytes: 1_000_000, usec: 100_000 }));
    let bytes = flood(&mut s, begin + ten, ten);
    assert!((99_000_000..102_000_000).contains(&bytes), "{bytes}");
    assert_eq!(s.stats.dropped_in_all(), 0);
    assert!(s.stats.limited() > 100);
    // Reception is not limited.
    s.guest.post(1..2);
    s.inject(&pattern(60, 1), Offload::default());
    s.poll();
    assert_eq!(s.guest.received().len(), 1);
    // The guest sends immediately after the limit is removed.
    s.queue.limit().set(None);
    s.poll();
    s.guest.answers();
    assert_eq!(s.queue.deadline(), None);
}

/// Pushes a packet of 4,000 bytes of data and 20 of options with a segment size of 8 bytes. Returns
/// its size on the wire.
fn push_shredded(s: &mut Setup) -> usize {
    const HEADERS: usize = 74;
    let mut frame = tcp(false, 4000);
    frame[34 + 12] = 0xa0;
    let mut slot = s.guest.slot(0, 0, &frame);
    slot.flags = TxFlags::EXTRA_INFO | TxFlags::CSUM_BLANK;
    s.guest.push(&[slot]);
    let kind = ExtraKind::Gso { size: 8, kind: GsoKind::TcpV4 };
    s.guest.tx.push(&Extra { kind, more: false }.to_bytes()).unwrap();
    let _ = s.guest.tx.publish();
    frame.len() + ((frame.len() - HEADERS).div_ceil(8) - 1) * HEADERS
}

#[test]
fn rate_limit_charges_gso_packet_as_its_segments() {
    let mut s = setup(Features { sends_gso_v4: true, ..ALL });
    s.queue.limit().set(Some(VifRate { bytes: 10_000, usec: 10_000 }));
    let (begin, time) = (Duration::from_secs(1), Duration::from_secs(10));
    let (mut now, mut bytes, mut size) = (begin, 0, 0);
    while now < begin + time {
        s.queue.set_clock(now);
        loop {
            while s.guest.tx.free() > 1 {
                size = push_shredded(&mut s);
            }
            if s.poll().tx == 0 {
                break;
            }
            bytes += s.sent().len() * size;
            s.guest.answers();
        }
        // Before its headers are read, a packet counts with the least possible size.
        assert!(now > begin || bytes <= 128 * 1024 + 2 * size, "{bytes} bytes sent in one burst");
        now = s.queue.deadline().expect("deadline for the next credit");
    }
    assert!((9_900_000..10_200_000).contains(&bytes), "{bytes}");
    assert_eq!(s.stats.dropped_in_all(), 0);
}

#[test]
fn queues_with_common_limit_stay_within_one_rate() {
    let mut queues = [setup(ALL), setup(ALL), setup(ALL)];
    let limit = Arc::clone(queues[0].queue.limit());
    limit.set(Some(VifRate { bytes: 10_000, usec: 10_000 }));
    queues.iter_mut().for_each(|s| s.queue.share_limit(&limit));
    let begin = Duration::from_secs(1);
    let mut bytes = 0;
    for tick in 0..10_000 {
        for s in &mut queues {
            s.queue.set_clock(begin + tick * Duration::from_millis(1));
            while s.guest.tx.free() > 0 {
                let slot = s.guest.slot(0, 0, &pattern(1000, 0));
                s.guest.push(&[slot]);
            }
            let _ = s.guest.tx.publish();
            s.poll();
            bytes += s.sent().iter().map(|(frame, _)| frame.len()).sum::<usize>();
            s.guest.answers();
        }
    }
    assert!((9_900_000..10_200_000).contains(&bytes), "{bytes}");
}

const GROUP: [u8; 6] = [1, 0, 0x5e, 1, 2, 3];

fn tell(s: &mut Setup, kind: ExtraKind) -> Vec<(u16, i16)> {
    let flags = TxFlags::EXTRA_INFO;
    s.guest.push(&[TxRequest { id: 5, flags, ..TxRequest::default() }]);
    s.guest.tx.push(&Extra { kind, more: false }.to_bytes()).unwrap();
    let _ = s.guest.tx.publish();
    s.poll();
    s.guest.answers()
}

/// Whether the guest receives a frame to this address.
fn hears(s: &mut Setup, to: [u8; 6]) -> bool {
    let mut frame = pattern(60, 1);
    frame[..6].copy_from_slice(&to);
    s.guest.post(1..2);
    s.inject(&frame, Offload::default());
    s.poll();
    let got = s.guest.received();
    assert!(got.iter().all(|r| r.flags == RxFlags::empty()));
    got.len() == 1
}

#[test]
fn multicast_with_filter_enabled_reaches_guest_only_if_group_was_added() {
    let done = [(5, rsp::OKAY), (0, rsp::NULL)];
    let mut s = setup(Features { names_groups: true, ..ALL });
    assert!(hears(&mut s, GROUP));
    assert_eq!(tell(&mut s, ExtraKind::McastAdd(GROUP)), done);
    s.queue.groups().set_filter(true);
    let other = [1, 0, 0x5e, 1, 2, 4];
    assert!(hears(&mut s, GROUP) && !hears(&mut s, other));
    assert!(hears(&mut s, [0xff; 6]) && hears(&mut s, [2, 0, 0, 0, 0, 1]));
    assert_eq!(s.stats.dropped(DropReason::RxGroup), 1);
    assert_eq!(tell(&mut s, ExtraKind::McastDel(GROUP)), done);
    assert_eq!(tell(&mut s, ExtraKind::McastDel(GROUP)), done, "group already removed");
    assert!(!hears(&mut s, GROUP));
    s.queue.groups().set_filter(false);
    assert!(hears(&mut s, GROUP));
    assert_eq!(s.sent(), [], "multicast requests are not sent as packets");
}

#[test]
fn multicast_add_beyond_64_groups_gets_error_response() {
    let mut s = setup(Features { names_groups: true, ..ALL });
    for n in 0..64 {
        let added = tell(&mut s, ExtraKind::McastAdd([1, 0, 0, 0, 0, n]));
        assert_eq!(added, [(5, rsp::OKAY), (0, rsp::NULL)]);
    }
    let one_more = tell(&mut s, ExtraKind::McastAdd(GROUP));
    assert_eq!(one_more, [(5, rsp::ERROR), (0, rsp::NULL)]);
    assert_eq!(s.stats.dropped(DropReason::TxGroups), 1);
}
