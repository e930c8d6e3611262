//! The wire formats: whatever a peer writes is parsed to a well-formed value or rejected, and what
//! we emit is parsed to the same value, in every ABI.
#![forbid(unsafe_code)]

use proptest::prelude::*;
use pvio_ring::proto::{blkif, netif};
use pvio_ring::shm::HeapMemory;
use pvio_ring::{BackRing, FrontRing, GrantRef, Slot};

const ABIS: [blkif::Abi; 2] = [blkif::Abi::X86_64, blkif::Abi::X86_32];

/// Writes `bytes` into a ring's slot and passes that slot to `parse`. The slot is filled with ones
/// first, so that reading beyond the written bytes is detected.
fn through_slot<T>(
    slot_size: usize,
    bytes: &[u8],
    parse: impl FnOnce(&mut Slot<'_, HeapMemory>) -> T,
) -> T {
    let mem = HeapMemory::pages(1);
    let mut front = FrontRing::init(mem.clone(), slot_size).unwrap();
    let mut back = BackRing::attach(mem.clone(), slot_size).unwrap();
    pvio_ring::shm::Region::fill(&mem, 64, 4096 - 64, 0xff).unwrap();
    front.push(bytes).unwrap();
    let _ = front.publish();
    parse(&mut back.pop().unwrap().unwrap())
}

fn segments() -> impl Strategy<Value = blkif::Segments> {
    let segment = (any::<u32>(), 0_u8..8, 0_u8..8).prop_map(|(gref, a, b)| blkif::Segment {
        gref: GrantRef(gref),
        first: a.min(b),
        last: a.max(b),
    });
    proptest::collection::vec(segment, 0..=11)
        .prop_map(|all| blkif::Segments::from_slice(&all).expect("at most 11"))
}

fn indirect() -> impl Strategy<Value = blkif::Indirect> {
    (1_usize..=4096, any::<[u32; 8]>()).prop_map(|(segments, refs)| {
        let pages = &refs.map(GrantRef)[..segments.div_ceil(512)];
        blkif::Indirect::new(segments, pages).expect("as many pages as it takes")
    })
}

fn blkif_request() -> impl Strategy<Value = blkif::Request> {
    use blkif::{DataOp, Request};
    let ops = vec![DataOp::Read, DataOp::Write, DataOp::WriteBarrier, DataOp::Flush];
    prop_oneof![
        3 => (prop::sample::select(ops), any::<u64>(), any::<u64>(), segments())
            .prop_filter("data needs segments", |(op, _, _, s)| {
                matches!(op, DataOp::WriteBarrier | DataOp::Flush) || !s.is_empty()
            })
            .prop_map(|(op, id, sector, segments)| Request::Data { op, id, sector, segments }),
        1 => (any::<bool>(), any::<u64>(), any::<u64>(), indirect()).prop_map(
            |(write, id, sector, indirect)| {
                let op = if write { DataOp::Write } else { DataOp::Read };
                Request::Indirect { op, id, sector, indirect }
            }
        ),
        1 => (any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
            |(id, sector, sectors, secure)| Request::Discard { id, sector, sectors, secure }
        ),
    ]
}

fn extra() -> impl Strategy<Value = netif::Extra> {
    use netif::{ExtraKind, GsoKind};
    let kind = prop_oneof![
        (1_u16.., any::<bool>()).prop_map(|(size, six)| ExtraKind::Gso {
            size,
            kind: if six { GsoKind::TcpV6 } else { GsoKind::TcpV4 },
        }),
        any::<[u8; 6]>().prop_map(ExtraKind::McastAdd),
        any::<[u8; 6]>().prop_map(ExtraKind::McastDel),
        any::<(u8, u8, u32)>().prop_map(|(kind, algorithm, value)| ExtraKind::Hash {
            kind,
            algorithm,
            value,
        }),
        any::<u16>().prop_map(|headroom| ExtraKind::Xdp { headroom }),
    ];
    (kind, any::<bool>()).prop_map(|(kind, more)| netif::Extra { kind, more })
}

/// Random bytes of which the first two (operation, segment count) are often valid.
fn blkif_slot() -> impl Strategy<Value = Vec<u8>> {
    let plausible = prop_oneof![any::<(u8, u8)>(), (0_u8..8, 0_u8..13)];
    let seg = prop_oneof![any::<(u8, u8)>(), (0_u8..8, 0_u8..9)];
    (
        proptest::collection::vec(any::<u8>(), 112),
        plausible,
        proptest::collection::vec(seg, 11),
        any::<bool>(),
    )
        .prop_map(|(mut raw, (op, count), segs, native)| {
            raw[0] = op;
            raw[1] = count;
            // The number of segments of an indirect request: usually within the limit.
            raw[3] &= 0x1f;
            for (i, (first, last)) in segs.into_iter().enumerate() {
                let at = if native { 24 } else { 20 } + i * 8;
                raw[at + 4] = first;
                raw[at + 5] = last;
            }
            raw
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn blkif_requests_round_trip(request in blkif_request(), handle: u16) {
        for abi in ABIS {
            let mut raw = [0xee; 112];
            let bytes = request.write(abi, handle, &mut raw);
            prop_assert!(bytes.len() <= abi.slot_size());
            let parsed = through_slot(abi.slot_size(), bytes, |s| blkif::Request::read(s, abi));
            prop_assert_eq!(parsed, Ok(Ok(request)));
        }
    }

    #[test]
    fn blkif_responses_round_trip(id: u64, op: u8, status in -2_i16..=0) {
        let response = blkif::Response { id, op, status: blkif::Status::from_wire(status) };
        for abi in ABIS {
            let mut raw = [0xee; 16];
            let bytes = response.write(abi, &mut raw);
            prop_assert_eq!(bytes.len(), abi.response_size());
            let parsed = through_slot(abi.slot_size(), bytes, blkif::Response::read);
            prop_assert_eq!(parsed, Ok(response));
        }
    }

    #[test]
    fn indirect_segment_outside_its_page_is_rejected(raw: [u8; 8]) {
        let inside = raw[4] <= raw[5] && raw[5] < 8;
        let read = blkif::Segment::read(raw);
        prop_assert_eq!(read.is_some(), inside);
        if let Some(segment) = read {
            prop_assert_eq!(segment.write()[..6].to_vec(), raw[..6].to_vec());
        }
    }

    #[test]
    fn random_blkif_slot_is_valid_request_or_rejected(raw in blkif_slot()) {
        for abi in ABIS {
            let bytes = &raw[..abi.slot_size()];
            let parsed = through_slot(abi.slot_size(), bytes, |s| blkif::Request::read(s, abi));
            let id_at = abi.slot_size() - 104;
            let id = u64::from_le_bytes(raw[id_at..id_at + 8].try_into().unwrap());
            match parsed.expect("a slot of the ABI's own size is never short") {
                Ok(blkif::Request::Data { op, id: got, segments, .. }) => {
                    prop_assert_eq!((op.code(), got), (raw[0], id));
                    prop_assert_eq!(segments.len(), usize::from(raw[1]));
                    for s in segments.iter() {
                        prop_assert!(s.first <= s.last && s.last < 8);
                        prop_assert!(s.offset() + s.len() <= 4096 && !s.is_empty());
                    }
                }
                Ok(blkif::Request::Discard { id: got, secure, .. }) => {
                    prop_assert_eq!((raw[0], got), (blkif::op::DISCARD, id));
                    prop_assert_eq!(secure, raw[1] & 1 == 1);
                }
                Ok(blkif::Request::Indirect { op, id: got, indirect, .. }) => {
                    prop_assert_eq!((raw[0], got), (blkif::op::INDIRECT, id));
                    prop_assert_eq!(op.code(), raw[1]);
                    prop_assert!(raw[1] <= 1, "a read or a write");
                    let count = u16::from_le_bytes([raw[2], raw[3]]);
                    prop_assert_eq!(indirect.segments(), usize::from(count));
                    prop_assert!((1..=4096).contains(&count));
                    let pages: usize = indirect.pages().map(|(_, segments)| segments).sum();
                    prop_assert_eq!(pages, usize::from(count));
                }
                Err(refusal) => {
                    let inner = raw[0] == blkif::op::INDIRECT;
                    let echo = if inner { raw[1] } else { raw[0] };
                    prop_assert_eq!((refusal.op, refusal.id), (echo, id), "the echo");
                    let unknown = !matches!(raw[0], 0..=3 | 5 | 6);
                    prop_assert_eq!(refusal.status == blkif::Status::NotSupported, unknown);
                    prop_assert_ne!(refusal.status, blkif::Status::Okay);
                }
            }
            through_slot(abi.slot_size(), bytes, blkif::Response::read).unwrap();
        }
    }

    #[test]
    fn netif_messages_round_trip(
        gref: u32, offset: u16, flags: u16, id: u16, size: u16, status: i16, extra in extra(),
    ) {
        let tx = netif::TxRequest {
            gref: GrantRef(gref), offset, flags: netif::TxFlags::from_bits_truncate(flags), id, size,
        };
        let parsed = through_slot(netif::TX_SLOT_SIZE, &tx.to_bytes(), netif::TxRequest::read);
        prop_assert_eq!(parsed, Ok(tx));
        let tx = netif::TxResponse { id, status };
        let parsed = through_slot(netif::TX_SLOT_SIZE, &tx.to_bytes(), netif::TxResponse::read);
        prop_assert_eq!(parsed, Ok(tx));
        let rx = netif::RxRequest { id, gref: GrantRef(gref) };
        let parsed = through_slot(netif::RX_SLOT_SIZE, &rx.to_bytes(), netif::RxRequest::read);
        prop_assert_eq!(parsed, Ok(rx));
        let rx = netif::RxResponse {
            id, offset, flags: netif::RxFlags::from_bits_truncate(flags), status,
        };
        let parsed = through_slot(netif::RX_SLOT_SIZE, &rx.to_bytes(), netif::RxResponse::read);
        prop_assert_eq!(parsed, Ok(rx));
        for slot in [netif::TX_SLOT_SIZE, netif::RX_SLOT_SIZE] {
            let parsed = through_slot(slot, &extra.to_bytes(), netif::Extra::read);
            prop_assert_eq!(parsed, Ok(Ok(extra)));
        }
    }

    #[test]
    fn control_messages_round_trip(
        id: u16, kind in 0_u16..12, data: [u32; 3], status: u32, entry: [u8; 8],
    ) {
        let request = netif::CtrlRequest { id, kind, data };
        let slot = netif::CTRL_SLOT_SIZE;
        prop_assert_eq!(through_slot(slot, &request.to_bytes(), netif::CtrlRequest::read), Ok(request));
        let ask = request.ask();
        prop_assert_eq!(ask.is_some(), (1..=10).contains(&kind));
        if let Some(ask) = ask {
            // Fields without meaning for this kind are dropped; all others are preserved.
            let back = netif::CtrlRequest::new(id, ask);
            prop_assert_eq!((back.id, back.kind, back.ask()), (id, kind, Some(ask)));
        }
        let response = netif::CtrlResponse { id, kind, status, data: data[0] };
        let parsed = through_slot(slot, &response.to_bytes(), netif::CtrlResponse::read);
        prop_assert_eq!(parsed, Ok(response));
        prop_assert_eq!(netif::CtrlStatus::from_number(status).is_some(), status <= 3);
        let mut same = entry;
        (same[4], same[5]) = (same[4] & 1, 0);
        prop_assert_eq!(netif::GrefEntry::from_bytes(entry).to_bytes(), same);
    }

    #[test]
    fn random_netif_slot_is_parsed_or_rejected(raw: [u8; 12], kind in 0_u8..7, gso in 0_u8..4) {
        let tx = through_slot(12, &raw, netif::TxRequest::read).unwrap();
        // Undefined bits are dropped; all others are preserved.
        let mut same = raw;
        same[6] &= 0x0f;
        same[7] = 0;
        prop_assert_eq!(tx.to_bytes(), same);
        let rx = through_slot(8, &raw[..8], netif::RxResponse::read).unwrap();
        let mut same: [u8; 8] = raw[..8].try_into().unwrap();
        same[4] &= 0x1f;
        same[5] = 0;
        prop_assert_eq!(rx.to_bytes(), same);
        through_slot(12, &raw, netif::TxResponse::read).unwrap();
        through_slot(8, &raw[..8], netif::RxRequest::read).unwrap();

        let mut raw = raw;
        raw[0] = kind;
        raw[4] = gso;
        let good = match kind {
            1 => (1..=2).contains(&gso) && raw[2..4] != [0, 0],
            other => (2..=5).contains(&other),
        };
        let parsed = through_slot(12, &raw, netif::Extra::read).unwrap();
        prop_assert_eq!(parsed.is_ok(), good, "{:?}", parsed);
    }
}

#[test]
fn indirect_request_needs_one_page_per_512_segments() {
    let grefs: Vec<GrantRef> = (100..109).map(GrantRef).collect();
    for (segments, pages) in [(0, 0), (1, 0), (1, 2), (512, 2), (513, 1), (4097, 9), (4097, 8)] {
        assert_eq!(blkif::Indirect::new(segments, &grefs[..pages]), None, "{segments} in {pages}");
    }
    for (segments, expected) in
        [(1, vec![1]), (512, vec![512]), (513, vec![512, 1]), (4096, vec![512; 8])]
    {
        let indirect = blkif::Indirect::new(segments, &grefs[..expected.len()]).unwrap();
        let (seen, counts): (Vec<_>, Vec<_>) = indirect.pages().unzip();
        assert_eq!((seen.as_slice(), counts), (&grefs[..expected.len()], expected));
    }
}
