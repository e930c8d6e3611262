//! The store's quotas.
#![cfg(feature = "std")]

mod common;

use common::{ask, guest};
use pvio_ring::DomId;
use pvio_xenbus::wire::{Header, Op, XsErrno};
use pvio_xenstored::{Quota, Store, StoreError};

fn small() -> Quota {
    Quota {
        nodes: 5,
        watches: 2,
        transactions: 2,
        transaction_nodes: 6,
        node_size: 64,
        perms: 2,
        ..Quota::default()
    }
}

#[test]
fn quotas_limit_guests_but_not_dom0_and_are_released() {
    let mut s = Store::new(small());
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    // The home directory is one of the five nodes.
    assert_eq!(ask(&mut s, d1, Op::Write, 0, b"a/b/c/d/e\0"), Err(XsErrno::NoSpc));
    assert_eq!(
        ask(&mut s, d1, Op::Read, 0, b"a\0"),
        Err(XsErrno::NoEnt),
        "rejected write creates no parent"
    );
    ask(&mut s, d1, Op::Write, 0, b"a/b/c/d\0").unwrap();
    assert_eq!(ask(&mut s, d1, Op::Mkdir, 0, b"e\0"), Err(XsErrno::NoSpc));
    ask(&mut s, d1, Op::Rm, 0, b"a/b\0").unwrap();
    ask(&mut s, d1, Op::Mkdir, 0, b"e\0").unwrap();

    assert_eq!(
        ask(&mut s, d1, Op::Write, 0, &[b"e\0", &[b'x'; 57][..]].concat()),
        Err(XsErrno::NoSpc)
    );
    ask(&mut s, d1, Op::Write, 0, &[b"e\0", &[b'x'; 56][..]].concat()).unwrap();
    assert_eq!(ask(&mut s, d1, Op::SetPerms, 0, b"e\0n1\0r2\0r3\0"), Err(XsErrno::NoSpc));

    ask(&mut s, d1, Op::Watch, 0, b"a\0t\0").unwrap();
    ask(&mut s, d1, Op::Watch, 0, b"a\0u\0").unwrap();
    assert_eq!(ask(&mut s, d1, Op::Watch, 0, b"a\0t\0"), Err(XsErrno::Exist));
    assert_eq!(ask(&mut s, d1, Op::Watch, 0, b"a\0v\0"), Err(XsErrno::TooBig));
    // Another connection of the same domain has the same quota.
    let other = s.connect(DomId(1));
    assert_eq!(ask(&mut s, other, Op::Watch, 0, b"a\0v\0"), Err(XsErrno::TooBig));
    ask(&mut s, d1, Op::Unwatch, 0, b"a\0u\0").unwrap();
    assert_eq!(ask(&mut s, d1, Op::Unwatch, 0, b"a\0u\0"), Err(XsErrno::NoEnt));
    ask(&mut s, other, Op::Watch, 0, b"a\0v\0").unwrap();

    ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    ask(&mut s, other, Op::TransactionStart, 0, b"\0").unwrap();
    assert_eq!(ask(&mut s, d1, Op::TransactionStart, 0, b"\0"), Err(XsErrno::NoSpc));
    s.disconnect(other);
    ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    ask(&mut s, d1, Op::Watch, 0, b"a\0w\0").unwrap();
    ask(&mut s, d1, Op::ResetWatches, 0, b"\0").unwrap();
    for _ in 0..2 {
        ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    }

    for i in 0..20 {
        ask(&mut s, dom0, Op::Write, 0, &[format!("/n{i}\0").as_bytes(), &[b'x'; 100]].concat())
            .unwrap();
        ask(&mut s, dom0, Op::Watch, 0, format!("/n{i}\0t\0").as_bytes()).unwrap();
        ask(&mut s, dom0, Op::TransactionStart, 0, b"\0").unwrap();
    }
    s.check().unwrap();
}

#[test]
fn transaction_is_limited_in_nodes_and_by_owner_quota() {
    let mut s = Store::new(small());
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    let seen = (0..10).take_while(|i| {
        ask(&mut s, d1, Op::Read, 1, format!("x{i}\0").as_bytes()) == Err(XsErrno::NoEnt)
    });
    assert_eq!(seen.count(), 5, "home and five absent nodes make six");
    ask(&mut s, d1, Op::TransactionEnd, 1, b"F\0").unwrap();

    ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    for name in ["a", "b", "c", "d"] {
        ask(&mut s, d1, Op::Mkdir, 2, format!("{name}\0").as_bytes()).unwrap();
    }
    assert_eq!(ask(&mut s, d1, Op::Mkdir, 2, b"e\0"), Err(XsErrno::NoSpc));
    // The quota is used up by nodes that the transaction does not access.
    ask(&mut s, dom0, Op::Mkdir, 0, b"/elsewhere\0").unwrap();
    ask(&mut s, dom0, Op::SetPerms, 0, b"/elsewhere\0n1\0").unwrap();
    assert_eq!(ask(&mut s, d1, Op::TransactionEnd, 2, b"T\0"), Err(XsErrno::NoSpc));
    assert_eq!(ask(&mut s, d1, Op::Directory, 0, b"/local/domain/1\0").unwrap(), b"");
    s.check().unwrap();
}

#[test]
fn memory_quota_covers_nodes_transactions_and_watches() {
    let mut s = Store::new(Quota { memory: 20_000, ..Quota::default() });
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    let value = [b'x'; 1500];
    let wrote = (0..100).take_while(|i| {
        ask(&mut s, d1, Op::Write, 0, &[format!("n{i}\0").as_bytes(), &value].concat()).is_ok()
    });
    assert_eq!(wrote.count(), 11);
    assert_eq!(
        ask(&mut s, d1, Op::Write, 0, &[b"more\0", &value[..]].concat()),
        Err(XsErrno::NoMem)
    );
    // Copying all of it into a transaction does not circumvent the quota.
    ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    assert_eq!(ask(&mut s, d1, Op::Read, 1, b"n1\0"), Err(XsErrno::NoMem));
    ask(&mut s, d1, Op::TransactionEnd, 1, b"F\0").unwrap();
    let token = "t".repeat(1000);
    let watched = (0..100).take_while(|i| {
        ask(&mut s, d1, Op::Watch, 0, format!("w{i}\0{token}\0").as_bytes()).is_ok()
    });
    assert!(watched.count() < 3);
    ask(&mut s, d1, Op::Rm, 0, b"n1\0").unwrap();
    ask(&mut s, d1, Op::Write, 0, &[b"n1\0", &value[..1000]].concat()).unwrap();
    s.check().unwrap();
}

#[test]
fn responses_not_taken_block_further_requests() {
    let mut s = Store::new(Quota { outstanding: 3, ..Quota::default() });
    let dom0 = s.connect(DomId::DOM0);
    let header = Header::new(Op::Read, 1, 0, 2).unwrap();
    for _ in 0..3 {
        assert!(s.can_accept(dom0));
        s.handle(dom0, &header, b"/\0").unwrap();
    }
    assert!(!s.can_accept(dom0));
    assert_eq!(s.handle(dom0, &header, b"/\0"), Err(StoreError::Backpressure));
    s.take_output(dom0, &mut Vec::new(), 0);
    assert!(s.can_accept(dom0) && !s.has_output(dom0));
    s.disconnect(dom0);
    assert_eq!(s.handle(dom0, &header, b"/\0"), Err(StoreError::Closed));
}

#[test]
fn repeated_write_in_transaction_is_charged_once() {
    let mut s = Store::new(Quota { memory: 10_000, ..Quota::default() });
    let dom0 = s.connect(DomId::DOM0);
    let d1 = guest(&mut s, dom0, 1);
    ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    for _ in 0..100 {
        ask(&mut s, d1, Op::Write, 1, &[b"a\0", &[b'x'; 1000][..]].concat()).unwrap();
    }
    ask(&mut s, d1, Op::Write, 1, b"b\0more").unwrap();
    ask(&mut s, d1, Op::TransactionEnd, 1, b"T\0").unwrap();
    s.check().unwrap();
}
