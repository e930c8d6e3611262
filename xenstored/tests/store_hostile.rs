//! Hostile guests: whatever they send, the store remains usable, within its limits and consistent.
#![cfg(feature = "std")]

mod common;

use common::ask;
use proptest::prelude::*;
use pvio_ring::DomId;
use pvio_xenbus::wire::{Header, Op, PAYLOAD_MAX};
use pvio_xenstored::{Quota, Store};

/// Requests of a guest, mostly well-formed so that they reach most code.
fn request() -> impl Strategy<Value = (u8, u32, u32, Vec<u8>)> {
    let path = prop_oneof![
        Just("a"),
        Just("a/b"),
        Just("a/b/c"),
        Just("a/d"),
        Just("e"),
        Just("/local/domain/1/a"),
        Just("/local/domain/2/a"),
        Just("/local/domain"),
        Just("/"),
        Just("/shared/x"),
        Just("@releaseDomain"),
    ];
    let tail = prop_oneof![
        3 => Just(Vec::new()),
        2 => Just(b"n1\0".to_vec()),
        1 => Just(b"b2\0r1\0".to_vec()),
        2 => Just(b"token\0".to_vec()),
        1 => Just(b"token\x001\0".to_vec()),
        2 => proptest::collection::vec(any::<u8>(), 0..300),
    ];
    let sane = (
        0_u8..3,
        prop_oneof![
            Just(1_u32),
            Just(2),
            Just(11),
            Just(12),
            Just(13),
            Just(14),
            Just(4),
            Just(5),
            Just(22)
        ],
        prop_oneof![3 => Just(0_u32), 2 => 1_u32..5],
        path,
        tail,
    )
        .prop_map(|(who, kind, tx, path, tail)| {
            (who, kind, tx, [path.as_bytes(), b"\0", &tail].concat())
        });
    let tx =
        (0_u8..3, 1_u32..5, any::<bool>(), any::<bool>()).prop_map(|(who, tx, start, commit)| {
            if start {
                (who, 6, 0, b"\0".to_vec())
            } else {
                (who, 7, tx, if commit { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
        });
    let wild = (0_u8..3, 0_u32..40, 0_u32..5, proptest::collection::vec(any::<u8>(), 0..100));
    prop_oneof![8 => sane, 3 => tx, 1 => wild]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_requests_of_three_domains_keep_store_consistent(requests in proptest::collection::vec(request(), 1..120), release_at in 0_usize..120) {
        let quota = Quota { nodes: 8, watches: 4, transactions: 3, memory: 6000, events: 8, ..Quota::default() };
        let mut s = Store::new(quota);
        let dom0 = s.connect(DomId::DOM0);
        for d in [1, 2] {
            ask(&mut s, dom0, Op::Mkdir, 0, format!("/local/domain/{d}\0").as_bytes()).unwrap();
            ask(&mut s, dom0, Op::SetPerms, 0, format!("/local/domain/{d}\0n{d}\0").as_bytes()).unwrap();
        }
        ask(&mut s, dom0, Op::Mkdir, 0, b"/shared\0").unwrap();
        ask(&mut s, dom0, Op::SetPerms, 0, b"/shared\0b0\0").unwrap();
        let mut conns = [dom0, s.connect(DomId(1)), s.connect(DomId(2))];
        for (i, (who, kind, tx_id, payload)) in requests.iter().enumerate() {
            if i == release_at {
                s.release(DomId(1));
                conns[1] = s.connect(DomId(1));
                s.take_dropped();
            }
            let conn = conns[usize::from(*who)];
            let header = Header { kind: *kind, req_id: 1, tx_id: *tx_id, len: payload.len() as u32 };
            // A guest's RELEASE is rejected, and dom0's may release a guest.
            if s.handle(conn, &header, payload).is_err() {
                conns[1] = s.connect(DomId(1));
                conns[2] = s.connect(DomId(2));
            }
            let mut out = Vec::new();
            s.take_output(conn, &mut out, 0);
            prop_assert!(out.len() <= 16 + PAYLOAD_MAX);
            if let Err(fault) = s.check() {
                prop_assert!(false, "store inconsistent at {fault} after request {i}");
            }
        }
        for conn in conns {
            s.disconnect(conn);
        }
        s.release(DomId(1));
        s.release(DomId(2));
        prop_assert_eq!(s.check(), Ok(()));
        let dom0 = s.connect(DomId::DOM0);
        prop_assert!(ask(&mut s, dom0, Op::Control, 0, b"quota\x001\0").is_err(), "quota of a released domain");
    }

    #[test]
    fn random_request_gets_exactly_one_response(kind in 0_u32..40, tx_id in 0_u32..3, payload in proptest::collection::vec(any::<u8>(), 0..=PAYLOAD_MAX)) {
        let mut s = Store::default();
        let conn = s.connect(DomId(7));
        let header = Header { kind, req_id: 3, tx_id, len: payload.len() as u32 };
        s.handle(conn, &header, &payload).unwrap();
        let mut out = Vec::new();
        s.take_output(conn, &mut out, 0);
        let answer = pvio_xenbus::wire::decode(&out).unwrap().unwrap();
        prop_assert_eq!(answer.wire_len(), out.len());
        prop_assert_eq!(answer.header.req_id, 3);
    }
}

/// A guest that uses all of its quotas.
#[test]
fn greedy_guest_uses_at_most_its_quota() {
    let mut s = Store::default();
    let dom0 = s.connect(DomId::DOM0);
    ask(&mut s, dom0, Op::Mkdir, 0, b"/local/domain/1\0").unwrap();
    ask(&mut s, dom0, Op::SetPerms, 0, b"/local/domain/1\0n1\0").unwrap();
    let conn = s.connect(DomId(1));
    for i in 0..2000 {
        let _ = ask(
            &mut s,
            conn,
            Op::Write,
            0,
            &[format!("d{}/{i}\0", i % 40).as_bytes(), &[b'x'; 2000]].concat(),
        );
        let _ = ask(&mut s, conn, Op::Watch, 0, format!("d{}\0{i}\0", i % 40).as_bytes());
        let _ = ask(&mut s, conn, Op::TransactionStart, 0, b"\0");
        for tx in 1..=10 {
            let _ = ask(
                &mut s,
                conn,
                Op::Write,
                tx,
                &[format!("t{i}\0").as_bytes(), &[b'y'; 2000]].concat(),
            );
        }
    }
    let held = ask(&mut s, dom0, Op::Control, 0, b"quota\x001\0").unwrap();
    let text = String::from_utf8(held).unwrap();
    let figure = |name: &str| -> usize {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap();
        line[name.len()..].trim_matches(['\0', ' ']).parse().unwrap()
    };
    assert!(figure("nodes") <= s.quota().nodes, "{text}");
    assert!(figure("watches") <= s.quota().watches, "{text}");
    // A node in a transaction may be copied before it is written to: one more of the maximum size.
    assert!(figure("memory") <= s.quota().memory + 2 * s.quota().node_size, "{text}");
    assert!(figure("memory") > s.quota().memory / 2, "the test does not reach the bound: {text}");
    s.check().unwrap();
}
