//! Backends that violate the protocol: the device fails, the guest is not affected.

mod common;

use common::{Hostile, hostile, pattern};
use pvio_grant_table::{Access, GrantMapper};
use pvio_netfront::{BackendFault, Checksum, SendError};
use pvio_ring::RingFault;
use pvio_ring::proto::netif::{
    Extra, ExtraFault, ExtraKind, GsoKind, RxFlags, RxResponse, TxRequest, TxResponse, rsp,
};
use pvio_ring::shm::Region;
use std::sync::atomic::Ordering;

fn receive(h: &mut Hostile) -> Result<Option<Vec<u8>>, BackendFault> {
    h.front.receive(|frame, _| frame.to_vec())
}

/// Checks that the queue has failed with this fault, permanently.
fn assert_dead(h: &mut Hostile, fault: BackendFault) {
    assert_eq!(h.front.fault(), Some(fault));
    assert_eq!(receive(h), Err(fault));
    assert_eq!(h.front.publish(), Err(fault));
    assert_eq!(h.front.final_check(), Err(fault));
    let again = h.front.send(&pattern(60, 0), Checksum::Unknown);
    assert_eq!(again, Err(SendError::Fault(fault)));
    assert!(!fault.code().is_empty() && !fault.code().contains(' '));
}

/// Completes the next receive buffers with these responses, in order.
fn answer(h: &mut Hostile, responses: &[RxResponse]) {
    for response in responses {
        h.buffer();
        h.rx.push(&response.to_bytes()).unwrap();
    }
    let _ = h.rx.publish();
}

const MORE: RxFlags = RxFlags::MORE_DATA;

fn good(id: u16, size: i16, flags: RxFlags) -> RxResponse {
    RxResponse { id, offset: 0, flags, status: size }
}

#[test]
fn malformed_rx_response_is_backend_fault() {
    use BackendFault as F;
    let none = RxFlags::empty();
    let lies: &[(&str, Vec<RxResponse>, F)] = &[
        ("another's id", vec![good(1, 60, none)], F::RxId { expected: 0, got: 1 }),
        ("id out of range", vec![good(999, 60, none)], F::RxId { expected: 0, got: 999 }),
        (
            "the same id twice",
            vec![good(0, 60, MORE), good(0, 60, none)],
            F::RxId { expected: 1, got: 0 },
        ),
        (
            "an offset beyond the page",
            vec![RxResponse { offset: 5000, ..good(0, 60, none) }],
            F::RxCrossesPage { offset: 5000, size: 60 },
        ),
        (
            "data beyond the page",
            vec![RxResponse { offset: 4037, ..good(0, 60, none) }],
            F::RxCrossesPage { offset: 4037, size: 60 },
        ),
        (
            "the largest offset and size",
            vec![RxResponse { offset: u16::MAX, ..good(0, i16::MAX, none) }],
            F::RxCrossesPage { offset: u16::MAX, size: 32767 },
        ),
        ("more than a page", vec![good(0, 4097, none)], F::RxCrossesPage { offset: 0, size: 4097 }),
        (
            "a packet that is too long",
            (0..17).map(|id| good(id, 4096, MORE)).collect(),
            F::RxTooLong,
        ),
        (
            "endless packet of empty slots",
            (0..30).map(|id| good(id, if id == 0 { 60 } else { 0 }, MORE)).collect(),
            F::RxSlots,
        ),
        (
            "endless failed packet",
            (0..30).map(|id| good(id, rsp::ERROR, MORE)).collect(),
            F::RxSlots,
        ),
    ];
    for (name, responses, fault) in lies {
        let mut h = hostile();
        answer(&mut h, responses);
        assert_eq!(receive(&mut h), Err(*fault), "{name}");
        assert_dead(&mut h, *fault);
    }
}

#[test]
fn xsa_522_first_slot_shorter_than_ethernet_header_is_backend_fault() {
    for size in 0..14 {
        for rest in [RxFlags::empty(), MORE] {
            let mut h = hostile();
            answer(&mut h, &[good(0, size, rest), good(1, 60, RxFlags::empty())]);
            let fault = BackendFault::RxShort(size as u16);
            assert_eq!(receive(&mut h), Err(fault), "{size}");
            assert_dead(&mut h, fault);
            assert_eq!(fault.code(), "rx-short-first-slot");
        }
    }
    let mut h = hostile();
    answer(&mut h, &[good(0, 14, RxFlags::empty())]);
    assert_eq!(receive(&mut h).unwrap().unwrap().len(), 14);
}

#[test]
fn extra_segment_not_negotiated_is_backend_fault() {
    let gso = Extra { kind: ExtraKind::Gso { size: 9, kind: GsoKind::TcpV4 }, more: false };
    let hash = ExtraKind::Hash { kind: 1, algorithm: 1, value: 7 };
    let cases: &[(Vec<[u8; 8]>, BackendFault)] = &[
        (vec![gso.to_bytes()], BackendFault::RxGso),
        (vec![[0; 8]], BackendFault::RxExtra(ExtraFault::Type(0))),
        (vec![[9, 0, 0, 0, 0, 0, 0, 0]], BackendFault::RxExtra(ExtraFault::Type(9))),
        (vec![Extra { kind: hash, more: true }.to_bytes(); 40], BackendFault::RxSlots),
    ];
    for (extras, fault) in cases {
        let mut h = hostile();
        answer(&mut h, &[good(0, 60, RxFlags::EXTRA_INFO)]);
        for extra in extras {
            h.buffer();
            h.rx.push(extra).unwrap();
        }
        let _ = h.rx.publish();
        assert_eq!(receive(&mut h), Err(*fault));
        assert_dead(&mut h, *fault);
    }
    // A hash is allowed; it is ignored, and its buffer is posted again.
    let mut h = hostile();
    answer(&mut h, &[good(0, 60, RxFlags::EXTRA_INFO | MORE)]);
    h.buffer();
    h.rx.push(&Extra { kind: hash, more: false }.to_bytes()).unwrap();
    answer(&mut h, &[good(2, 40, RxFlags::empty())]);
    assert_eq!(receive(&mut h).unwrap().unwrap().len(), 100);
}

#[test]
fn packet_received_in_parts_is_joined_and_failed_one_is_dropped() {
    let mut h = hostile();
    answer(&mut h, &[good(0, 4096, MORE)]);
    assert_eq!(receive(&mut h), Ok(None));
    answer(&mut h, &[good(1, 0, MORE)]);
    assert_eq!(receive(&mut h), Ok(None));
    answer(&mut h, &[RxResponse { offset: 4000, ..good(2, 96, RxFlags::empty()) }]);
    assert_eq!(receive(&mut h).unwrap().unwrap().len(), 4192);
    let dropped = good(4, rsp::DROPPED, MORE);
    let rest = [good(3, 60, MORE), dropped, good(5, 60, RxFlags::empty())];
    answer(&mut h, &rest);
    answer(&mut h, &[good(6, 77, RxFlags::empty())]);
    assert_eq!(receive(&mut h).unwrap().unwrap().len(), 77);
    assert_eq!(h.front.counters().rx_errors, 1);
    // Every buffer was posted again.
    h.front.publish().unwrap();
    assert_eq!(h.rx.look(), Ok(256));
}

#[test]
fn malformed_tx_response_is_backend_fault() {
    type Lie = (&'static str, &'static [(u16, i16)], BackendFault);
    let answers: &[Lie] = &[
        ("id never used", &[(77, rsp::OKAY)], BackendFault::TxId(77)),
        ("an id out of range", &[(256, rsp::OKAY)], BackendFault::TxId(256)),
        ("the largest id", &[(u16::MAX, rsp::ERROR)], BackendFault::TxId(u16::MAX)),
        ("the same id twice", &[(0, rsp::OKAY), (0, rsp::OKAY)], BackendFault::TxId(0)),
        ("NULL response to a packet", &[(0, rsp::NULL)], BackendFault::TxId(0)),
    ];
    for (name, answers, fault) in answers {
        let mut h = hostile();
        for _ in 0..2 {
            h.front.send(&pattern(60, 0), Checksum::Unknown).unwrap();
        }
        h.front.publish().unwrap();
        for &(id, status) in *answers {
            h.tx.pop().unwrap().unwrap();
            h.tx.push(&TxResponse { id, status }.to_bytes()).unwrap();
        }
        let _ = h.tx.publish();
        // Responses are read when room is needed.
        assert_eq!(h.front.has_room(255), Err(*fault), "{name}");
        assert_dead(&mut h, *fault);
    }
}

#[test]
fn tx_error_response_is_counted_and_frees_page() {
    let mut h = hostile();
    let mut slots = 0;
    while h.front.send(&pattern(5000, 0), Checksum::Unknown).is_ok() {
        slots += 2;
    }
    assert_eq!(slots, 256);
    h.front.publish().unwrap();
    for _ in 0..4 {
        let mut slot = h.tx.pop().unwrap().unwrap();
        let id = TxRequest::read(&mut slot).unwrap().id;
        h.tx.push(&TxResponse { id, status: rsp::DROPPED }.to_bytes()).unwrap();
    }
    let _ = h.tx.publish();
    assert_eq!(h.front.has_room(4), Ok(true));
    assert_eq!(h.front.has_room(5), Ok(false));
    assert_eq!(h.front.counters().tx_errors, 4);
}

#[test]
fn response_producer_overflow_is_backend_fault() {
    const RSP_PROD: usize = 8;
    for prod in [257, 1 << 31, u32::MAX] {
        let mut h = hostile();
        h.rx_page.store_u32(RSP_PROD, prod, Ordering::SeqCst);
        let overflow = RingFault::ProducerOverflow { prod, ahead: prod, most: 256 };
        assert_eq!(receive(&mut h), Err(BackendFault::RxRing(overflow)));
        assert_dead(&mut h, BackendFault::RxRing(overflow));

        // Responses to requests that were never sent.
        let mut h = hostile();
        h.front.send(&pattern(60, 0), Checksum::Unknown).unwrap();
        h.front.publish().unwrap();
        h.tx_page.store_u32(RSP_PROD, prod, Ordering::SeqCst);
        let overflow = RingFault::ProducerOverflow { prod, ahead: prod, most: 1 };
        assert_eq!(h.front.has_room(256), Err(BackendFault::TxRing(overflow)));
        assert_dead(&mut h, BackendFault::TxRing(overflow));
    }
}

#[test]
fn sent_packet_has_total_size_in_first_slot_and_zeroed_padding() {
    // The first slot has the total size, later ones their own; each page contains only packet data.
    let mut h = hostile();
    let frame = pattern(9000, 3);
    h.front.send(&frame, Checksum::Validated).unwrap();
    h.front.publish().unwrap();
    let mut slots = Vec::new();
    while let Some(mut slot) = h.tx.pop().unwrap() {
        slots.push(TxRequest::read(&mut slot).unwrap());
    }
    let sizes: Vec<_> = slots.iter().map(|s| s.size).collect();
    assert_eq!(sizes, [9000, 4096, 808]);
    let flags: Vec<_> = slots.iter().map(|s| s.flags.bits()).collect();
    assert_eq!(flags, [2 | 4, 4, 0]);
    assert!(slots.iter().all(|s| s.offset == 0));
    // The backend may read the whole page: bytes outside the packet are zero (XSA-403).
    let pages = slots.iter().map(|slot| {
        let page = h.back.map(common::FRONT, &[slot.gref], Access::ReadOnly).unwrap();
        let mut bytes = vec![0; 4096];
        page.read_bytes(0, &mut bytes).unwrap();
        bytes
    });
    let mut whole = frame.clone();
    whole.resize(3 * 4096, 0);
    assert!(pages.collect::<Vec<_>>().concat() == whole);
}

#[test]
fn vanished_backend_never_panics_frontend() {
    let mut h = hostile();
    h.machine.kill(common::BACK);
    for _ in 0..300 {
        let _ = h.front.send(&pattern(60, 0), Checksum::Unknown);
    }
    assert_eq!(h.front.publish(), Ok(()));
    assert_eq!(receive(&mut h), Ok(None));
    let front = h.machine.domain(common::FRONT);
    h.front.dismantle().expect("dead backend has no mapping");
    assert_eq!((front.pages_granted(), front.pages_allocated()), (0, 0));
}

#[test]
fn random_backend_slots_yield_packet_fault_or_nothing() {
    use proptest::prelude::*;
    // Random bytes as slots, with ids that are usually correct, and in batches.
    let slot = (any::<[u8; 8]>(), 0_u8..4, 0_u8..6);
    let config = ProptestConfig::with_cases(512);
    proptest!(config, |(slots in proptest::collection::vec(slot, 1..200), asks in any::<bool>())| {
        let mut h = hostile();
        if asks {
            h.front.take_hashes(pvio_ring::proto::netif::HashTypes::all());
            h.front.take_headroom(2048);
        }
        let mut got = 0_usize;
        for (at, (mut bytes, strange, publish)) in slots.into_iter().enumerate() {
            h.buffer();
            if strange > 0 {
                // A valid response, except for the flags and, sometimes, its size and offset.
                let status = i16::from_le_bytes([bytes[6], bytes[7]]) & 0x1fff;
                let offset = u16::from(bytes[2]) << 4;
                let flags = RxFlags::from_bits_truncate(bytes[4].into());
                bytes = RxResponse { id: at as u16, offset, flags, status }.to_bytes();
            }
            h.rx.push(&bytes).unwrap();
            if publish == 0 {
                let _ = h.rx.publish();
                let taken = h.front.receive_packet(|mut packet| {
                    let len = packet.frame().len();
                    prop_assert!((14..=65_553).contains(&len));
                    prop_assert_eq!(packet.with_headroom().len() - packet.headroom(), len);
                    let most = if asks { 2048 } else { 0 };
                    prop_assert!(packet.headroom() <= most);
                    Ok(())
                });
                match taken {
                    Ok(Some(checked)) => { checked?; got += 1; }
                    Ok(None) => {}
                    Err(fault) => {
                        prop_assert_eq!(h.front.fault(), Some(fault));
                        return Ok(());
                    }
                }
            }
        }
        prop_assert!(got <= 200);
    });
}
