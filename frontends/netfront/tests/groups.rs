//! Multicast groups that a queue sends to its backend, and backends with arbitrary responses.

mod common;

use common::{BACK, FRONT, Hostile, Vif, hostile, pattern};
use pvio_event_channel::EventChannel;
use pvio_netback::fault::DropReason;
use pvio_netback::port::memory::pair;
use pvio_netback::port::{NetPort, Offload, Packet};
use pvio_netfront::{BackendFault, Checksum, Queue, SendError};
use pvio_ring::proto::netif::{Extra, ExtraKind, TxFlags, TxRequest, TxResponse, rsp};
use pvio_sim::LocalMachine;
use std::sync::Arc;

const GROUP: [u8; 6] = [1, 0, 0x5e, 1, 2, 3];
const OTHER: [u8; 6] = [1, 0, 0x5e, 1, 2, 4];

#[test]
fn netback_delivers_only_added_groups() {
    let machine = LocalMachine::new();
    let (port, mut far) = pair(64);
    let mut front = Queue::new(&machine.domain(FRONT), BACK).unwrap();
    front.set_features(common::FRONT_FEATURES);
    let stats = Arc::default();
    let features = pvio_netback::Features { names_groups: true, ..common::BACK_FEATURES };
    let back = common::attach(machine.domain(BACK), FRONT, &front, features, &stats);
    let mut vif = Vif { front, back, port, stats };
    vif.back.groups().set_filter(true);
    let mut hears = |vif: &mut Vif, to: [u8; 6]| {
        let mut buf = far.reserve().unwrap();
        let frame = [&to[..], &pattern(60, 1)].concat();
        buf[..66].copy_from_slice(&frame);
        far.send(Packet { buf, start: 0, len: 66, offload: Offload::default() }).unwrap();
        vif.poll();
        let got = vif.front.receive(|got, _| got == frame).unwrap();
        vif.front.publish().unwrap();
        got == Some(true)
    };
    let tell = |vif: &mut Vif, group, joins| {
        vif.front.tell_group(group, joins).unwrap();
        assert_eq!(vif.front.group_answer(), Ok(None));
        assert_eq!(
            vif.front.tell_group(OTHER, true),
            Err(SendError::Full),
            "second request while one is outstanding"
        );
        vif.front.publish().unwrap();
        vif.poll();
        let answer = vif.front.group_answer().unwrap();
        assert_eq!(vif.front.group_answer(), Ok(None), "result is reported once");
        answer
    };
    assert!(!hears(&mut vif, GROUP) && hears(&mut vif, [0xff; 6]));
    // More often than the ring has slots.
    for _ in 0..300 {
        assert_eq!(tell(&mut vif, GROUP, true), Some(true));
        assert_eq!(tell(&mut vif, GROUP, false), Some(true));
    }
    assert_eq!(tell(&mut vif, GROUP, true), Some(true));
    assert!(hears(&mut vif, GROUP) && !hears(&mut vif, OTHER));
    for n in 0..63 {
        assert_eq!(tell(&mut vif, [3, 0, 0, 0, 0, n], true), Some(true));
    }
    assert_eq!(
        tell(&mut vif, OTHER, true),
        Some(false),
        "backend rejects a group beyond its limit"
    );
    assert_eq!(vif.stats.dropped(DropReason::TxGroups), 1);
    assert_eq!(tell(&mut vif, GROUP, false), Some(true));
    assert!(!hears(&mut vif, GROUP));
    let c = vif.front.counters();
    assert_eq!(
        (c.tx_packets, c.tx_errors),
        (0, 0),
        "multicast requests are not counted as packets"
    );
}

/// Returns a queue with an outstanding group request, which was taken off the ring.
fn named() -> (Hostile, u16) {
    let mut h = hostile();
    h.front.tell_group(GROUP, true).unwrap();
    h.front.publish().unwrap();
    let mut slot = h.tx.pop().unwrap().unwrap();
    let request = TxRequest::read(&mut slot).unwrap();
    assert_eq!((request.flags, request.size), (TxFlags::EXTRA_INFO, 0));
    let mut slot = h.tx.pop().unwrap().unwrap();
    let extra = Extra::read(&mut slot).unwrap();
    assert_eq!(extra, Ok(Extra { kind: ExtraKind::McastAdd(GROUP), more: false }));
    assert!(h.tx.pop().unwrap().is_none());
    (h, request.id)
}

fn answer(h: &mut Hostile, id: u16, status: i16) {
    h.tx.push(&TxResponse { id, status }.to_bytes()).unwrap();
    if h.tx.publish() {
        h.channel.notify().unwrap();
    }
}

#[test]
fn multicast_response_status_is_reported_and_wrong_id_is_fault() {
    for (status, done) in [
        (rsp::OKAY, true),
        (rsp::ERROR, false),
        (rsp::DROPPED, false),
        (2, false),
        (i16::MIN, false),
    ] {
        let (mut h, id) = named();
        answer(&mut h, id, status);
        assert_eq!(h.front.group_answer(), Ok(Some(done)), "{status}");
        answer(&mut h, 0, rsp::NULL);
        // The next request is sent when the previous one is completed.
        h.front.tell_group(GROUP, false).unwrap();
    }
    // Twice, and with the wrong kind; one response too many.
    let lies: [&[(u16, i16)]; 4] =
        [&[(0, 0), (0, 0)], &[(0, rsp::NULL), (0, rsp::NULL)], &[(1, 0)], &[(999, -1)]];
    for lie in lies {
        let (mut h, id) = named();
        for &(wrong, status) in lie {
            answer(&mut h, id.wrapping_add(wrong), status);
        }
        let fault = BackendFault::TxId(id.wrapping_add(lie[0].0));
        assert_eq!(h.front.group_answer(), Err(fault), "{lie:?}");
        assert_eq!(h.front.tell_group(GROUP, true), Err(SendError::Fault(fault)));
    }
}

#[test]
fn multicast_request_without_response_blocks_no_packet() {
    let (mut h, _) = named();
    for _ in 0..2000 {
        assert_eq!(h.front.group_answer(), Ok(None));
        h.front.send(&pattern(60, 0), Checksum::Unknown).unwrap();
        h.front.publish().unwrap();
        let mut slot = h.tx.pop().unwrap().unwrap();
        let id = TxRequest::read(&mut slot).unwrap().id;
        answer(&mut h, id, rsp::OKAY);
        // Responses to other requests do not prevent sleeping.
        assert_eq!(h.front.final_check(), Ok(false));
        assert_eq!(h.front.has_work(), Ok(false));
    }
    assert_eq!(h.front.tell_group(OTHER, true), Err(SendError::Full));
}

#[test]
fn multicast_response_sends_event_to_sleeping_queue() {
    let (mut h, id) = named();
    let _ = h.front.channel().take();
    assert_eq!(h.front.final_check(), Ok(false));
    answer(&mut h, id, rsp::OKAY);
    assert!(h.front.channel().is_pending());
    assert_eq!(h.front.final_check(), Ok(true));
    assert_eq!(h.front.final_check(), Ok(false), "result is reported once");
    assert_eq!(h.front.group_answer(), Ok(Some(true)));
}

#[test]
fn multicast_request_on_full_ring_is_rejected_as_full() {
    let mut h = hostile();
    while h.front.send(&pattern(60, 0), Checksum::Unknown).is_ok() {}
    assert_eq!(h.front.tell_group(GROUP, true), Err(SendError::Full));
    assert_eq!(h.front.group_answer(), Ok(None));
}
