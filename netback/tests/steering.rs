//! The control ring: hashes, mappings, and packets steered to the queue that the guest selects.

#[path = "common/control.rs"]
mod control;

mod common;

use common::{ALL, pattern, tcp};
use control::{Many, many};
use pvio_grant_table::GrantRef;
use pvio_netback::fault::{DropReason, Fault, QueueError};
use pvio_netback::port::Offload;
use pvio_netback::queue::LENT_MAX;
use pvio_ring::RingFault;
use pvio_ring::proto::netif::{
    CtrlAsk, CtrlRequest, CtrlStatus, Extra, ExtraKind, HASH_KEY_MAX, HashKind, HashTypes, RxFlags,
    RxResponse, hash_frame,
};
use pvio_ring::shm::Region;
use std::sync::atomic::Ordering;

/// Every byte differs from the others.
const KEY: [u8; HASH_KEY_MAX] = {
    let mut key = [0; HASH_KEY_MAX];
    let mut at = 0;
    while at < HASH_KEY_MAX {
        key[at] = (at * 59 + 109) as u8;
        at += 1;
    }
    key
};
const OKAY: CtrlStatus = CtrlStatus::Success;
const INVALID: CtrlStatus = CtrlStatus::InvalidParameter;

/// Enables hashing with `KEY` for these types of packets.
fn hash(m: &mut Many, types: HashTypes) {
    assert_eq!(m.set(CtrlAsk::SetHashAlgorithm(1)), OKAY);
    m.write(&KEY);
    let page = m.control.gref;
    assert_eq!(m.set(CtrlAsk::SetHashKey { page, len: 40 }), OKAY);
    assert_eq!(m.set(CtrlAsk::SetHashFlags(types.bits())), OKAY);
}

fn map(m: &mut Many, offset: u32, queues: &[u32]) -> CtrlStatus {
    let bytes: Vec<u8> = queues.iter().flat_map(|queue| queue.to_le_bytes()).collect();
    m.write(&bytes);
    let page = m.control.gref;
    m.set(CtrlAsk::SetHashMapping { page, len: queues.len() as u32, offset })
}

#[test]
fn hash_flags_without_algorithm_are_not_supported() {
    let mut m = many(ALL, 2);
    assert_eq!(m.ask(CtrlAsk::GetHashFlags), (CtrlStatus::NotSupported, 0));
    assert_eq!(m.set(CtrlAsk::SetHashFlags(1)), INVALID);
    assert_eq!(m.set(CtrlAsk::SetHashAlgorithm(2)), INVALID);
    assert_eq!(m.ask(CtrlAsk::GetHashMappingSize), (OKAY, 128));
    assert_eq!(m.set(CtrlAsk::SetHashAlgorithm(1)), OKAY);
    assert_eq!(m.ask(CtrlAsk::GetHashFlags), (OKAY, 15));
    assert_eq!(m.set(CtrlAsk::SetHashFlags(16)), INVALID);
    assert_eq!(m.set(CtrlAsk::SetHashFlags(15)), OKAY);
    assert_eq!(m.set(CtrlAsk::SetHashAlgorithm(0)), OKAY);
    assert_eq!(m.ask(CtrlAsk::GetHashFlags), (CtrlStatus::NotSupported, 0));
    let stats = &m.queues[0].stats;
    assert_eq!(stats.controls(OKAY), 5);
    assert_eq!(stats.controls(INVALID), 3);
    assert_eq!(stats.controls(CtrlStatus::NotSupported), 2);
}

#[test]
fn hash_key_longer_than_40_bytes_is_buffer_overflow() {
    let mut m = many(ALL, 1);
    let page = m.control.gref;
    for (len, status) in [
        (0, OKAY),
        (1, OKAY),
        (40, OKAY),
        (41, CtrlStatus::BufferOverflow),
        (4097, CtrlStatus::BufferOverflow),
        (u32::MAX, CtrlStatus::BufferOverflow),
    ] {
        assert_eq!(m.set(CtrlAsk::SetHashKey { page, len }), status, "{len}");
    }
    let nowhere = GrantRef(4000);
    assert_eq!(m.set(CtrlAsk::SetHashKey { page: nowhere, len: 40 }), INVALID);
    assert_eq!(
        m.set(CtrlAsk::SetHashKey { page: nowhere, len: 0 }),
        OKAY,
        "empty key clears the key"
    );
}

#[test]
fn xsa_270_hash_mapping_out_of_bounds_is_invalid() {
    let mut m = many(ALL, 2);
    let page = m.control.gref;
    assert_eq!(map(&mut m, 0, &[0]), INVALID, "there is no mapping yet");
    assert_eq!(m.set(CtrlAsk::SetHashMappingSize(129)), INVALID);
    assert_eq!(m.set(CtrlAsk::SetHashMappingSize(u32::MAX)), INVALID);
    assert_eq!(m.set(CtrlAsk::SetHashMappingSize(10)), OKAY);
    for (offset, len) in [
        (0, 11),
        (10, 1),
        (11, 0),
        (9, 2),
        (u32::MAX, 1),
        (1, u32::MAX),
        (u32::MAX, u32::MAX),
        (1 << 31, 1 << 31),
        (0, 1025),
        (0, 0x4000_0001),
    ] {
        let status = m.set(CtrlAsk::SetHashMapping { page, len, offset });
        assert_eq!(status, INVALID, "{len} entries at {offset}");
    }
    assert_eq!(map(&mut m, 0, &[0, 2]), INVALID, "there is no queue 2");
    assert_eq!(map(&mut m, 0, &[u32::MAX]), INVALID);
    assert_eq!(map(&mut m, 9, &[1]), OKAY);
    assert_eq!(map(&mut m, 10, &[]), OKAY);
    assert_eq!(map(&mut m, 0, &[1; 10]), OKAY);
    // A smaller table replaces the larger one.
    assert_eq!(m.set(CtrlAsk::SetHashMappingSize(4)), OKAY);
    assert_eq!(map(&mut m, 4, &[1]), INVALID);
    let nowhere = GrantRef(4000);
    assert_eq!(m.set(CtrlAsk::SetHashMapping { page: nowhere, len: 1, offset: 0 }), INVALID);
    assert_eq!(m.set(CtrlAsk::SetHashMappingSize(128)), OKAY);
    assert_eq!(map(&mut m, 0, &[1; 128]), OKAY);
}

#[test]
fn undefined_control_requests_are_not_supported() {
    let mut m = many(ALL, 1);
    for kind in [0, 11, u16::MAX] {
        let request = CtrlRequest { id: u16::MAX, kind, data: [u32::MAX; 3] };
        assert_eq!(m.raw(request), (CtrlStatus::NotSupported, 0));
    }
}

#[test]
fn hashed_packets_go_to_queue_of_guest_mapping() {
    let mut m = many(ALL, 3);
    hash(&mut m, HashTypes::all());
    let frame = tcp(false, 100);
    let (kind, value) = hash_frame(&frame, HashTypes::all(), &KEY).unwrap();
    assert_eq!(kind, HashKind::V4Tcp);
    for to in [1, 2, 0] {
        assert_eq!(m.set(CtrlAsk::SetHashMappingSize(64)), OKAY);
        assert_eq!(map(&mut m, value % 64, &[to]), OKAY);
        for setup in &mut m.queues {
            setup.guest.post(0..3);
        }
        m.queues[0].inject(&frame, Offload::default());
        m.poll();
        for (index, setup) in m.queues.iter_mut().enumerate() {
            let got = setup.guest.received_raw();
            if index != to as usize {
                assert!(got.is_empty(), "queue {index} of {to}");
                continue;
            }
            let (flags, status) = (RxFlags::EXTRA_INFO, frame.len() as i16);
            let first = RxResponse { id: 0, offset: 0, flags, status };
            let kind = ExtraKind::Hash { kind: 1, algorithm: 1, value };
            let hash = Extra { kind, more: false };
            assert_eq!(got, [first.to_bytes(), hash.to_bytes()]);
            assert_eq!(setup.guest.page(0, frame.len()), frame);
        }
        m = again(m);
        hash(&mut m, HashTypes::all());
    }
}

/// Creates a new vif after dropping the old one.
fn again(m: Many) -> Many {
    let count = m.queues.len();
    drop(m);
    many(ALL, count)
}

#[test]
fn hash_without_mapping_selects_queue_by_modulo_and_unhashed_queue_0() {
    let mut m = many(ALL, 2);
    hash(&mut m, HashTypes::IPV6);
    for setup in &mut m.queues {
        setup.guest.post(0..20);
    }
    let mut frame = tcp(true, 10);
    let mut expected = [0, 0];
    for last in 0..8 {
        frame[53] = last;
        let (kind, value) = hash_frame(&frame, HashTypes::IPV6, &KEY).unwrap();
        assert_eq!(kind, HashKind::V6);
        expected[value as usize % 2] += 2;
        m.queues[1].inject(&frame, Offload::default());
        m.poll();
    }
    // A packet that is not hashed has no such segment.
    m.queues[1].inject(&tcp(false, 10), Offload::default());
    m.queues[1].inject(&pattern(60, 1), Offload::default());
    expected[0] += 2;
    m.poll();
    assert_ne!(expected[1], 0, "each queue gets some packets");
    let got = m.queues.iter_mut().map(|setup| setup.guest.received().len());
    assert_eq!(got.collect::<Vec<_>>(), expected);
    assert_eq!(m.queues[1].stats.steered() as usize, (expected[0] - 2) / 2 + 2);
    // Without hashing, each packet stays with the queue that received it.
    assert_eq!(m.set(CtrlAsk::SetHashFlags(0)), OKAY);
    m.queues[1].inject(&pattern(60, 1), Offload::default());
    m.poll();
    assert_eq!(m.queues[1].guest.received().len(), 1);
}

#[test]
fn hash_extra_segment_follows_gso_extra_segment() {
    let mut m = many(pvio_netback::Features { gso_v4: true, ..ALL }, 1);
    hash(&mut m, HashTypes::all());
    let setup = &mut m.queues[0];
    setup.guest.post(0..4);
    let frame = tcp(false, 3000);
    let gso = pvio_netback::port::Gso { size: 1000, kind: pvio_ring::proto::netif::GsoKind::TcpV4 };
    let checksum = pvio_netback::port::Checksum::Partial { start: 34, offset: 16 };
    setup.inject(&frame, Offload { checksum, gso: Some(gso) });
    m.poll();
    let got = m.queues[0].guest.received_raw();
    assert_eq!(got.len(), 3);
    assert_eq!(got[0][4] & 8, 8);
    let (_, value) = hash_frame(&frame, HashTypes::all(), &KEY).unwrap();
    let gso = ExtraKind::Gso { size: 1000, kind: gso.kind };
    assert_eq!(got[1], Extra { kind: gso, more: true }.to_bytes());
    let hash = ExtraKind::Hash { kind: 1, algorithm: 1, value };
    assert_eq!(got[2], Extra { kind: hash, more: false }.to_bytes());
}

#[test]
fn stalled_queue_holds_bounded_number_of_steered_packets() {
    let mut m = many(ALL, 2);
    hash(&mut m, HashTypes::all());
    assert_eq!(m.set(CtrlAsk::SetHashMappingSize(1)), OKAY);
    assert_eq!(map(&mut m, 0, &[1]), OKAY);
    let frame = tcp(false, 60);
    for _ in 0..100 {
        m.queues[0].inject(&frame, Offload::default());
    }
    m.poll();
    let stats = &m.queues[0].stats;
    assert_eq!(stats.steered() as usize, LENT_MAX);
    assert_eq!(stats.dropped(DropReason::RxSteered) as usize, 100 - LENT_MAX);
    assert_eq!(m.queues[1].queue.backlog(), LENT_MAX);
    // When the second queue takes them, the buffers are returned, so as many more packets can be
    // steered.
    m.queues[1].guest.post(0..64);
    m.poll();
    for _ in 0..10 {
        m.queues[0].inject(&frame, Offload::default());
    }
    m.poll();
    assert_eq!(m.queues[1].guest.received().len(), 64, "two slots a packet");
    m.queues[1].guest.post(0..20);
    m.poll();
    assert_eq!(m.queues[1].guest.received().len(), 20);
    assert_eq!(m.queues[0].stats.dropped_in_all() as usize, 100 - LENT_MAX);
    // The first queue's guest is served independently of the second queue.
    assert_eq!(map(&mut m, 0, &[0]), OKAY);
    m.queues[0].guest.post(0..2);
    m.queues[0].inject(&frame, Offload::default());
    m.poll();
    assert_eq!(m.queues[0].guest.received().len(), 2);
}

#[test]
fn steered_packets_wake_sleeping_queue_once() {
    let mut m = many(ALL, 2);
    hash(&mut m, HashTypes::all());
    assert_eq!(m.set(CtrlAsk::SetHashMappingSize(1)), OKAY);
    assert_eq!(map(&mut m, 0, &[1]), OKAY);
    let woken = |m: &Many| m.woken[1].load(Ordering::Relaxed);
    assert_eq!(m.queues[1].queue.final_check(), Ok(false));
    let before = woken(&m);
    m.queues[0].inject(&tcp(false, 60), Offload::default());
    m.queues[0].inject(&tcp(false, 60), Offload::default());
    m.queues[0].poll();
    assert_eq!(woken(&m), before + 1, "one wakeup for several packets");
    assert_eq!(m.queues[1].queue.has_work(), Ok(true));
    assert_eq!(m.queues[1].queue.final_check(), Ok(true), "a message waits");
    m.queues[1].poll();
    assert_eq!(m.queues[1].queue.backlog(), 2);
}

#[test]
fn control_ring_producer_overflow_ends_vif() {
    let mut m = many(ALL, 1);
    assert!(m.control.ring_page.store_u32(0, 200, Ordering::SeqCst));
    let fault = Fault::CtrlRing(RingFault::ProducerOverflow { prod: 200, ahead: 200, most: 128 });
    let setup = &mut m.queues[0];
    assert_eq!(setup.queue.poll(&mut setup.port, 64), Err(QueueError::Fault(fault)));
    assert_eq!(fault.code(), "ctrl-ring-producer-overflow");
}

#[test]
fn full_control_ring_gets_one_response_per_request() {
    let mut m = many(ALL, 1);
    for id in 0..128 {
        let request = CtrlRequest::new(id, CtrlAsk::GetHashMappingSize);
        m.control.ring.push(&request.to_bytes()).unwrap();
    }
    let _ = m.control.ring.publish();
    while m.queues[0].queue.has_work().unwrap() {
        m.queues[0].poll();
    }
    assert_eq!(m.queues[0].queue.final_check(), Ok(false));
    assert_eq!(m.control.ring.look(), Ok(128));
    assert!(m.control.channel.is_pending());
}

proptest::proptest! {
    /// Every request of a guest gets one response, and has no other effect.
    #[test]
    fn random_control_requests_get_one_response_each(
        asked in proptest::collection::vec(
            (0_u16..12, proptest::array::uniform3(number()), 0_u8..4), 1..40),
        seed in 0_usize..256,
    ) {
        let mut m = many(ALL, 2);
        m.write(&pattern(4096, seed));
        for (kind, mut data, real) in asked {
            // Sometimes a page that exists, at the position where each type has it.
            data[usize::from(kind >= 9)] = match real {
                0 => data[0],
                _ => m.control.gref.0,
            };
            let (status, _) = m.raw(CtrlRequest { id: 3, kind, data });
            proptest::prop_assert!(kind != 0 && kind != 11 || status == CtrlStatus::NotSupported);
            m.queues[0].inject(&tcp(false, 60), Offload::default());
            m.poll();
        }
        // Every packet is accounted for, or was dropped for a reason.
        let waits = m.queues.iter().map(|setup| setup.queue.backlog()).sum::<usize>();
        proptest::prop_assert!(waits <= 256);
    }
}

/// Small numbers, large ones and boundary values.
fn number() -> impl proptest::strategy::Strategy<Value = u32> {
    use proptest::prelude::*;
    prop_oneof![0..3_u32, 0..520_u32, any::<u32>(), Just(u32::MAX), Just(1 << 31)]
}
