//! The store's watches and transactions.
#![cfg(feature = "std")]

mod common;

use common::{ask, events};
use pvio_ring::DomId;
use pvio_xenbus::wire::{Op, XsErrno};
use pvio_xenstored::{ConnId, Quota, Store};

fn store() -> (Store, ConnId) {
    let mut store = Store::default();
    let dom0 = store.connect(DomId::DOM0);
    (store, dom0)
}

fn seen(store: &mut Store, conn: ConnId) -> Vec<String> {
    events(store, conn).into_iter().map(|(path, _)| path).collect()
}

fn write(
    store: &mut Store,
    conn: ConnId,
    tx: u32,
    path: &str,
    value: &str,
) -> Result<Vec<u8>, XsErrno> {
    ask(store, conn, Op::Write, tx, format!("{path}\0{value}").as_bytes())
}

fn start(store: &mut Store, conn: ConnId) -> u32 {
    let id = ask(store, conn, Op::TransactionStart, 0, b"\0").unwrap();
    std::str::from_utf8(&id).unwrap().trim_end_matches('\0').parse().unwrap()
}

fn commit(store: &mut Store, conn: ConnId, tx: u32) -> Result<(), XsErrno> {
    ask(store, conn, Op::TransactionEnd, tx, b"T\0").map(drop)
}

#[test]
fn watch_fires_on_registration_and_for_node_and_descendants() {
    let (mut s, dom0) = store();
    ask(&mut s, dom0, Op::Watch, 0, b"/a\0tok\0").unwrap();
    assert_eq!(events(&mut s, dom0), [("/a".into(), "tok".into())]);
    write(&mut s, dom0, 0, "/a/b/c", "1").unwrap();
    assert_eq!(seen(&mut s, dom0), ["/a/b/c"], "created parents fire no event");
    write(&mut s, dom0, 0, "/ab", "1").unwrap();
    ask(&mut s, dom0, Op::Mkdir, 0, b"/a/b\0").unwrap();
    assert!(seen(&mut s, dom0).is_empty(), "nothing changed below /a");
    ask(&mut s, dom0, Op::SetPerms, 0, b"/a/b\0n0\0").unwrap();
    write(&mut s, dom0, 0, "/a", "2").unwrap();
    assert_eq!(seen(&mut s, dom0), ["/a/b", "/a"]);
    ask(&mut s, dom0, Op::Unwatch, 0, b"/a\0tok\0").unwrap();
    write(&mut s, dom0, 0, "/a", "3").unwrap();
    assert!(!s.has_output(dom0));
}

#[test]
fn removal_fires_ancestor_watch_with_root_and_descendant_watch_with_own_path() {
    let (mut s, dom0) = store();
    write(&mut s, dom0, 0, "/a/b/c", "").unwrap();
    for path in ["/", "/a/b", "/a/b/c", "/a/b/none"] {
        ask(&mut s, dom0, Op::Watch, 0, format!("{path}\0t\0").as_bytes()).unwrap();
    }
    seen(&mut s, dom0);
    ask(&mut s, dom0, Op::Rm, 0, b"/a\0").unwrap();
    let mut all = seen(&mut s, dom0);
    all.sort();
    assert_eq!(all, ["/a", "/a/b", "/a/b/c"]);
}

#[test]
fn watch_honours_depth_and_relative_path() {
    let (mut s, dom0) = store();
    ask(&mut s, dom0, Op::Mkdir, 0, b"/local/domain/4\0").unwrap();
    ask(&mut s, dom0, Op::SetPerms, 0, b"/local/domain/4\0n4\0").unwrap();
    let d4 = s.connect(DomId(4));
    ask(&mut s, d4, Op::Watch, 0, b"device\0t\0").unwrap();
    ask(&mut s, d4, Op::Watch, 0, b"/local/domain/4/device\0abs\0").unwrap();
    ask(&mut s, d4, Op::Watch, 0, b"device\0shallow\x001\0").unwrap();
    assert_eq!(seen(&mut s, d4), ["device", "/local/domain/4/device", "device"]);
    write(&mut s, d4, 0, "device/vbd/1", "").unwrap();
    let e = |path: &str, token: &str| (path.to_string(), token.to_string());
    let expected = [e("device/vbd/1", "t"), e("/local/domain/4/device/vbd/1", "abs")];
    assert_eq!(events(&mut s, d4), expected);
    write(&mut s, dom0, 0, "/local/domain/4/device/vbd", "x").unwrap();
    assert_eq!(events(&mut s, d4).len(), 3);
    assert_eq!(ask(&mut s, d4, Op::Unwatch, 0, b"/local/domain/4/device\0t\0").unwrap(), b"OK\0");
}

#[test]
fn watch_events_need_read_permission_and_report_its_loss() {
    let (mut s, dom0) = store();
    write(&mut s, dom0, 0, "/secret/x", "").unwrap();
    let d3 = s.connect(DomId(3));
    ask(&mut s, d3, Op::Watch, 0, b"/secret\0t\0").unwrap();
    assert_eq!(seen(&mut s, d3), ["/secret"], "first event fires without read permission");
    write(&mut s, dom0, 0, "/secret/x", "1").unwrap();
    ask(&mut s, dom0, Op::Rm, 0, b"/secret/x\0").unwrap();
    write(&mut s, dom0, 0, "/secret/x", "2").unwrap();
    assert!(!s.has_output(d3));
    ask(&mut s, dom0, Op::SetPerms, 0, b"/secret/x\0n0\0r3\0").unwrap();
    write(&mut s, dom0, 0, "/secret/x", "3").unwrap();
    assert_eq!(seen(&mut s, d3), ["/secret/x"], "two equal events are merged");
    ask(&mut s, dom0, Op::SetPerms, 0, b"/secret/x\0n0\0").unwrap();
    assert_eq!(seen(&mut s, d3), ["/secret/x"]);
    write(&mut s, dom0, 0, "/secret/x", "4").unwrap();
    assert!(!s.has_output(d3));
}

#[test]
fn domain_watches_fire_only_for_dom0_and_permitted_domains() {
    let (mut s, dom0) = store();
    let d3 = s.connect(DomId(3));
    for conn in [dom0, d3] {
        for watch in [
            &b"@introduceDomain\0i\0"[..],
            b"@releaseDomain\0r\0",
            b"@releaseDomain\0deep\x001\0",
            b"@releaseDomain/9\0nine\0",
        ] {
            ask(&mut s, conn, Op::Watch, 0, watch).unwrap();
        }
        seen(&mut s, conn);
    }
    ask(&mut s, dom0, Op::Introduce, 0, b"9\x001\x002\0").unwrap();
    ask(&mut s, dom0, Op::Introduce, 0, b"9\x001\x002\0").unwrap();
    assert_eq!(ask(&mut s, dom0, Op::IsDomainIntroduced, 0, b"9\0").unwrap(), b"T\0");
    assert_eq!(seen(&mut s, dom0), ["@introduceDomain"]);
    ask(&mut s, dom0, Op::SetPerms, 0, b"@releaseDomain\0n0\0r3\0").unwrap();
    s.introduce(DomId(8));
    s.release(DomId(8));
    s.release(DomId(9));
    assert_eq!(ask(&mut s, dom0, Op::IsDomainIntroduced, 0, b"9\0").unwrap(), b"F\0");
    let told = ["@releaseDomain", "@releaseDomain/8", "@releaseDomain/9", "@releaseDomain/9"];
    assert_eq!(seen(&mut s, d3), told);
    assert_eq!(seen(&mut s, dom0)[1..], told);
}

#[test]
fn event_overflow_is_merged_into_watched_path() {
    let mut s = Store::new(Quota { events: 10, ..Quota::default() });
    let dom0 = s.connect(DomId::DOM0);
    for path in ["/flood", "/other"] {
        ask(&mut s, dom0, Op::Watch, 0, format!("{path}\0t\0").as_bytes()).unwrap();
    }
    seen(&mut s, dom0);
    for i in 0..1000 {
        write(&mut s, dom0, 0, &format!("/flood/{i}"), "").unwrap();
        write(&mut s, dom0, 0, &format!("/other/{i}"), "").unwrap();
    }
    let all = seen(&mut s, dom0);
    assert_eq!(all.len(), 12);
    assert_eq!(all[10..], ["/flood", "/other"]);
    write(&mut s, dom0, 0, "/flood/1", "").unwrap();
    assert_eq!(seen(&mut s, dom0), ["/flood/1"]);
}

#[test]
fn event_too_long_for_message_carries_watched_path() {
    let (mut s, dom0) = store();
    let token = "t".repeat(3000);
    ask(&mut s, dom0, Op::Watch, 0, format!("/deep\0{token}\0").as_bytes()).unwrap();
    seen(&mut s, dom0);
    write(&mut s, dom0, 0, &format!("/deep/{}", "x".repeat(2000)), "").unwrap();
    assert_eq!(seen(&mut s, dom0), ["/deep"]);
}

#[test]
fn transaction_sees_own_writes_and_others_only_after_commit() {
    let (mut s, dom0) = store();
    let other = s.connect(DomId::DOM0);
    write(&mut s, dom0, 0, "/t/old", "0").unwrap();
    ask(&mut s, other, Op::Watch, 0, b"/t\0t\0").unwrap();
    seen(&mut s, other);
    let tx = start(&mut s, dom0);
    write(&mut s, dom0, tx, "/t/new/deep", "1").unwrap();
    write(&mut s, dom0, tx, "/t/new/deep", "2").unwrap();
    ask(&mut s, dom0, Op::Rm, tx, b"/t/old\0").unwrap();
    assert_eq!(ask(&mut s, dom0, Op::Read, tx, b"/t/new/deep\0").unwrap(), b"2");
    assert_eq!(ask(&mut s, dom0, Op::Read, tx, b"/t/old\0"), Err(XsErrno::NoEnt));
    assert_eq!(ask(&mut s, dom0, Op::Directory, tx, b"/t\0").unwrap(), b"new\0");
    assert_eq!(ask(&mut s, other, Op::Directory, 0, b"/t\0").unwrap(), b"old\0");
    assert!(!s.has_output(other));
    commit(&mut s, dom0, tx).unwrap();
    assert_eq!(ask(&mut s, other, Op::Directory, 0, b"/t\0").unwrap(), b"new\0");
    assert_eq!(seen(&mut s, other), ["/t/new/deep", "/t/old"]);
    assert_eq!(commit(&mut s, dom0, tx), Err(XsErrno::NoEnt));
    s.check().unwrap();
}

#[test]
fn transactions_conflict_only_over_accessed_nodes() {
    let (mut s, dom0) = store();
    write(&mut s, dom0, 0, "/a/x", "0").unwrap();
    write(&mut s, dom0, 0, "/b/y", "0").unwrap();

    let tx = start(&mut s, dom0);
    assert_eq!(ask(&mut s, dom0, Op::Read, tx, b"/a/x\0").unwrap(), b"0");
    write(&mut s, dom0, 0, "/a/x", "outside").unwrap();
    assert_eq!(
        ask(&mut s, dom0, Op::Read, tx, b"/a/x\0").unwrap(),
        b"0",
        "read in a transaction is repeatable"
    );
    write(&mut s, dom0, tx, "/b/y", "1").unwrap();
    assert_eq!(commit(&mut s, dom0, tx), Err(XsErrno::Again));
    assert_eq!(ask(&mut s, dom0, Op::Read, 0, b"/b/y\0").unwrap(), b"0");

    let tx = start(&mut s, dom0);
    write(&mut s, dom0, tx, "/b/y", "1").unwrap();
    write(&mut s, dom0, 0, "/a/x", "unrelated").unwrap();
    write(&mut s, dom0, 0, "/b/z", "a sibling").unwrap();
    commit(&mut s, dom0, tx).unwrap();

    // The absence of a node counts as an access, too, and so does a list.
    let tx = start(&mut s, dom0);
    assert_eq!(ask(&mut s, dom0, Op::Read, tx, b"/c\0"), Err(XsErrno::NoEnt));
    write(&mut s, dom0, 0, "/c", "").unwrap();
    assert_eq!(commit(&mut s, dom0, tx), Err(XsErrno::Again));
    let tx = start(&mut s, dom0);
    ask(&mut s, dom0, Op::Directory, tx, b"/b\0").unwrap();
    ask(&mut s, dom0, Op::Rm, 0, b"/b/z\0").unwrap();
    assert_eq!(commit(&mut s, dom0, tx), Err(XsErrno::Again));

    // Removed and created again: it is another node, even with the same value.
    let tx = start(&mut s, dom0);
    ask(&mut s, dom0, Op::Read, tx, b"/a/x\0").unwrap();
    ask(&mut s, dom0, Op::Rm, 0, b"/a/x\0").unwrap();
    write(&mut s, dom0, 0, "/a/x", "unrelated").unwrap();
    assert_eq!(commit(&mut s, dom0, tx), Err(XsErrno::Again));
    s.check().unwrap();
}

#[test]
fn subtree_removed_and_recreated_in_transaction_is_empty() {
    let (mut s, dom0) = store();
    write(&mut s, dom0, 0, "/a/b/c", "old").unwrap();
    let tx = start(&mut s, dom0);
    ask(&mut s, dom0, Op::Rm, tx, b"/a\0").unwrap();
    write(&mut s, dom0, tx, "/a/b", "new").unwrap();
    commit(&mut s, dom0, tx).unwrap();
    assert_eq!(ask(&mut s, dom0, Op::Directory, 0, b"/a/b\0").unwrap(), b"");
    assert_eq!(ask(&mut s, dom0, Op::Read, 0, b"/a/b\0").unwrap(), b"new");
    s.check().unwrap();
}

#[test]
fn transaction_id_is_valid_only_on_its_connection() {
    let (mut s, dom0) = store();
    let other = s.connect(DomId::DOM0);
    let tx = start(&mut s, dom0);
    assert_eq!(ask(&mut s, other, Op::Read, tx, b"/\0"), Err(XsErrno::NoEnt));
    assert_eq!(commit(&mut s, other, tx), Err(XsErrno::NoEnt));
    assert_eq!(ask(&mut s, dom0, Op::TransactionStart, tx, b"\0"), Err(XsErrno::Busy));
    assert_eq!(commit(&mut s, dom0, 0), Err(XsErrno::NoEnt));
    // Watches are not part of it: the transaction number is ignored, even a wrong one.
    ask(&mut s, dom0, Op::Watch, 999, b"/\0t\0").unwrap();
    ask(&mut s, dom0, Op::ResetWatches, 0, b"\0").unwrap();
    assert_eq!(commit(&mut s, dom0, tx), Err(XsErrno::NoEnt));
    assert!(!s.has_output(dom0));
}
