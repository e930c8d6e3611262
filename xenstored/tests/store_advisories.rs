//! Vulnerabilities of other xenstore servers, tested on this one. Each test is named after its
//! advisory.
#![cfg(feature = "std")]

mod common;

use common::{ask, events, guest};
use pvio_ring::DomId;
use pvio_xenbus::wire::{Op, XsErrno};
use pvio_xenstored::{Quota, Store};

fn start(s: &mut Store, conn: pvio_xenstored::ConnId) -> u32 {
    let answer = ask(s, conn, Op::TransactionStart, 0, b"\0").unwrap();
    std::str::from_utf8(&answer).unwrap().trim_end_matches('\0').parse().unwrap()
}

/// A guest that updated one of its nodes in a loop made every transaction of other domains fail.
#[test]
fn xsa_206_endless_guest_writes_do_not_conflict_with_transactions() {
    let mut s = Store::new(Quota::default());
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    for _ in 0..100 {
        let tx = start(&mut s, dom0);
        ask(&mut s, dom0, Op::Write, tx, b"/local/domain/0/backend/x\x001").unwrap();
        ask(&mut s, d1, Op::Write, 0, b"data/x\x001").unwrap();
        ask(&mut s, d1, Op::Rm, 0, b"data/x\0").unwrap();
        assert!(ask(&mut s, dom0, Op::TransactionEnd, tx, b"T\0").is_ok());
    }
    s.check().unwrap();
}

/// The entries of a domain were not counted for every way to create one.
#[test]
fn xsa_272_node_created_in_any_way_counts_to_quota() {
    let mut s = Store::new(Quota { nodes: 5, ..Quota::default() });
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    ask(&mut s, d1, Op::Write, 0, b"a\x001").unwrap();
    ask(&mut s, d1, Op::Mkdir, 0, b"b\0").unwrap();
    let tx = start(&mut s, d1);
    ask(&mut s, d1, Op::Mkdir, tx, b"c/d\0").unwrap();
    ask(&mut s, d1, Op::TransactionEnd, tx, b"T\0").unwrap();
    for op in [Op::Write, Op::Mkdir] {
        assert_eq!(ask(&mut s, d1, op, 0, b"e\0"), Err(XsErrno::NoSpc), "{op:?}");
    }
    s.check().unwrap();
}

/// An unprivileged domain could give its nodes away, and with them its use of the quota.
#[test]
fn xsa_352_guest_cannot_change_node_owner() {
    let mut s = Store::new(Quota::default());
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    guest(&mut s, dom0, 2);
    ask(&mut s, d1, Op::Mkdir, 0, b"a\0").unwrap();
    for perms in [&b"a\0n2\0"[..], b"a\0b0\0", b"a\0r2\0n1\0"] {
        assert_eq!(ask(&mut s, d1, Op::SetPerms, 0, perms), Err(XsErrno::Perm));
    }
    let tx = start(&mut s, d1);
    assert_eq!(ask(&mut s, d1, Op::SetPerms, tx, b"a\0n2\0"), Err(XsErrno::Perm));
    assert_eq!(ask(&mut s, dom0, Op::GetPerms, 0, b"/local/domain/1/a\0").unwrap(), b"n1\0");
}

/// The root's own permissions were not checked.
#[test]
fn xsa_353_guest_access_to_root_node_is_denied() {
    let mut s = Store::new(Quota::default());
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    for (op, payload) in [
        (Op::Write, &b"/\0x"[..]),
        (Op::Mkdir, b"/mine\0"),
        (Op::Write, b"/mine\0x"),
        (Op::SetPerms, b"/\0n1\0"),
        (Op::Rm, b"/local\0"),
    ] {
        assert_eq!(ask(&mut s, d1, op, 0, payload), Err(XsErrno::Acces), "{op:?}");
    }
    assert!(ask(&mut s, d1, Op::Rm, 0, b"/\0").is_err());
    assert!(ask(&mut s, dom0, Op::Directory, 0, b"/local/domain\0").is_ok());
}

/// A path that ends in a slash crashed the server.
#[test]
fn xsa_481_malformed_path_is_rejected() {
    let mut s = Store::new(Quota::default());
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    for path in ["/local/domain/", "//", "/local//domain", "/local/domain/1/", "", "@", "/@x"] {
        for op in [Op::Read, Op::Write, Op::Mkdir, Op::Rm, Op::Directory, Op::GetPerms] {
            let payload = [path.as_bytes(), b"\0"].concat();
            assert!(ask(&mut s, d1, op, 0, &payload).is_err(), "{op:?} of {path:?}");
        }
        let watch = [path.as_bytes(), b"\0t\0"].concat();
        let _ = ask(&mut s, d1, Op::Watch, 0, &watch);
    }
    events(&mut s, d1);
    assert!(ask(&mut s, d1, Op::Write, 0, b"still\0there").is_ok());
    s.check().unwrap();
}

/// The quota usage of a destroyed domain was charged to the next one with its number.
#[test]
fn xsa_483_new_domain_starts_with_unused_quota() {
    let mut s = Store::new(Quota { nodes: 5, watches: 2, transactions: 2, ..Quota::default() });
    let dom0 = s.connect(DomId::DOM0);
    for _ in 0..10 {
        let d1 = guest(&mut s, dom0, 1);
        ask(&mut s, d1, Op::Write, 0, b"a/b/c/d\0").unwrap();
        assert_eq!(ask(&mut s, d1, Op::Mkdir, 0, b"e\0"), Err(XsErrno::NoSpc));
        for token in ["t", "u"] {
            ask(&mut s, d1, Op::Watch, 0, format!("a\0{token}\0").as_bytes()).unwrap();
            start(&mut s, d1);
        }
        assert!(s.release(DomId(1)));
        assert_eq!(s.take_dropped(), [d1]);
    }
    s.check().unwrap();
}

/// `XS_RESET_WATCHES` inside a transaction failed an assertion of the C server.
#[test]
fn xsa_484_reset_watches_inside_transaction_is_handled() {
    let mut s = Store::new(Quota::default());
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    ask(&mut s, d1, Op::Watch, 0, b"a\0t\0").unwrap();
    let tx = start(&mut s, d1);
    ask(&mut s, d1, Op::Write, tx, b"a\x001").unwrap();
    ask(&mut s, d1, Op::ResetWatches, tx, b"\0").unwrap();
    // The transaction ended with the watches, as for a guest that reconnects.
    assert_eq!(ask(&mut s, d1, Op::TransactionEnd, tx, b"T\0"), Err(XsErrno::NoEnt));
    assert_eq!(ask(&mut s, d1, Op::Read, 0, b"a\0"), Err(XsErrno::NoEnt));
    ask(&mut s, d1, Op::Write, 0, b"a\x002").unwrap();
    assert!(events(&mut s, d1).is_empty());
    s.check().unwrap();
}

/// Watches of a guest that reconnects remained in the OCaml server's index, without a limit.
#[test]
fn xsa_512_reconnected_guest_leaves_no_watch() {
    let mut s = Store::new(Quota { watches: 4, ..Quota::default() });
    let dom0 = s.connect(DomId::DOM0);
    let mut d1 = guest(&mut s, dom0, 1);
    for round in 0..300 {
        for token in 0..4 {
            let watch = format!("a/{}\0{round}-{token}\0", round % 7);
            ask(&mut s, d1, Op::Watch, 0, watch.as_bytes()).unwrap();
        }
        assert_eq!(ask(&mut s, d1, Op::Watch, 0, b"a\0more\0"), Err(XsErrno::TooBig));
        if round % 2 == 0 {
            ask(&mut s, d1, Op::ResetWatches, 0, b"\0").unwrap();
        } else {
            s.disconnect(d1);
            d1 = s.connect(DomId(1));
        }
        s.check().unwrap();
    }
    ask(&mut s, d1, Op::Write, 0, b"a/1\0x").unwrap();
    assert!(events(&mut s, d1).is_empty(), "event without a watch");
}
