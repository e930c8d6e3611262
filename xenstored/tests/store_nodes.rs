//! The store's nodes: permissions, creation, removal, lists, domains.
#![cfg(feature = "std")]

mod common;

use common::{ask, guest};
use pvio_ring::DomId;
use pvio_xenbus::wire::{Header, Op, XsErrno};
use pvio_xenstored::{ConnId, Store};

const OK: &[u8] = b"OK\0";

fn store() -> (Store, ConnId) {
    let mut store = Store::default();
    let dom0 = store.connect(DomId::DOM0);
    (store, dom0)
}

#[test]
fn write_stores_bytes_and_creates_parents() {
    let (mut s, dom0) = store();
    assert_eq!(ask(&mut s, dom0, Op::Write, 0, b"/a/b/c\0v\0\xff\n").unwrap(), OK);
    assert_eq!(ask(&mut s, dom0, Op::Read, 0, b"/a/b/c\0").unwrap(), b"v\0\xff\n");
    assert_eq!(ask(&mut s, dom0, Op::Read, 0, b"/a/b\0").unwrap(), b"");
    assert_eq!(ask(&mut s, dom0, Op::Directory, 0, b"/a\0").unwrap(), b"b\0");
    assert_eq!(ask(&mut s, dom0, Op::Mkdir, 0, b"/a/b/c\0").unwrap(), OK);
    assert_eq!(
        ask(&mut s, dom0, Op::Read, 0, b"/a/b/c\0").unwrap(),
        b"v\0\xff\n",
        "mkdir of an existing node keeps its value"
    );
    assert_eq!(ask(&mut s, dom0, Op::Read, 0, b"/none\0"), Err(XsErrno::NoEnt));
    s.check().unwrap();
}

#[test]
fn removal_deletes_subtree_and_ignores_missing_node() {
    let (mut s, dom0) = store();
    ask(&mut s, dom0, Op::Write, 0, b"/a/b/c\0v").unwrap();
    assert_eq!(ask(&mut s, dom0, Op::Rm, 0, b"/a/x\0").unwrap(), OK);
    assert_eq!(
        ask(&mut s, dom0, Op::Rm, 0, b"/x/y\0"),
        Err(XsErrno::NoEnt),
        "parent does not exist"
    );
    assert_eq!(ask(&mut s, dom0, Op::Rm, 0, b"/\0"), Err(XsErrno::Inval));
    assert_eq!(ask(&mut s, dom0, Op::Rm, 0, b"/a\0").unwrap(), OK);
    assert_eq!(ask(&mut s, dom0, Op::Read, 0, b"/a/b/c\0"), Err(XsErrno::NoEnt));
    assert_eq!(ask(&mut s, dom0, Op::Directory, 0, b"/\0").unwrap(), b"tool\0");
    s.check().unwrap();
}

#[test]
fn malformed_request_is_rejected() {
    let (mut s, dom0) = store();
    for (op, payload) in [
        (Op::Read, &b"/a"[..]),
        (Op::Read, b""),
        (Op::Read, b"/a\0b\0"),
        (Op::Read, b"/a//b\0"),
        (Op::Read, b"/a/\0"),
        (Op::Read, b"\0"),
        (Op::Read, b"@releaseDomain\0"),
        (Op::Write, b"/a"),
        (Op::Write, b"/ a\0x"),
        (Op::SetPerms, b"/tool\0"),
        (Op::SetPerms, b"/tool\0x5\0"),
        (Op::SetPerms, b"/tool\0r65536\0"),
        (Op::Watch, b"/a\0"),
        (Op::Watch, b"/a/\0t\0"),
        (Op::Watch, b"/a\0t\0deep\0"),
        (Op::TransactionEnd, b"X\0"),
        (Op::TransactionEnd, b"T"),
        (Op::Introduce, b"0\x001\x002\0"),
        (Op::Introduce, b"32752\x001\x002\0"),
        (Op::Introduce, b"5\0"),
        (Op::GetDomainPath, b"x\0"),
        (Op::DirectoryPart, b"/\0"),
        (Op::DirectoryPart, b"/\0-1\0"),
        (Op::Control, b"nothing\0"),
    ] {
        assert_eq!(ask(&mut s, dom0, op, 0, payload), Err(XsErrno::Inval), "{op:?} {payload:?}");
    }
    for op in [Op::WatchEvent, Op::Error, Op::GetFeature, Op::SetQuota] {
        assert_eq!(ask(&mut s, dom0, op, 0, b"/\0"), Err(XsErrno::NoSys));
    }
}

#[test]
fn unknown_operation_gets_enosys() {
    let (mut s, dom0) = store();
    for kind in [20, 27, 0xffff, u32::MAX] {
        s.handle(dom0, &Header { kind, req_id: 5, tx_id: 9, len: 0 }, b"").unwrap();
        let mut out = Vec::new();
        s.take_output(dom0, &mut out, 0);
        let mut expected = Header { kind: 16, req_id: 5, tx_id: 9, len: 7 }.emit().to_vec();
        expected.extend_from_slice(b"ENOSYS\0");
        assert_eq!(out, expected);
    }
}

#[test]
fn permissions_deny_access_and_hide_absence() {
    let (mut s, dom0) = store();
    let d1 = guest(&mut s, dom0, 1);
    let d2 = guest(&mut s, dom0, 2);
    ask(&mut s, d1, Op::Write, 0, b"data/x\0mine").unwrap();
    assert_eq!(ask(&mut s, dom0, Op::GetPerms, 0, b"/local/domain/1/data/x\0").unwrap(), b"n1\0");
    // Behind a parent without read permission, neither a node nor its absence is visible.
    assert_eq!(ask(&mut s, d2, Op::Read, 0, b"/local/domain/1/data/x\0"), Err(XsErrno::Acces));
    assert_eq!(ask(&mut s, d2, Op::Read, 0, b"/local/domain/1/data/none\0"), Err(XsErrno::Acces));
    assert_eq!(ask(&mut s, d2, Op::Write, 0, b"/local/domain/1/y\0"), Err(XsErrno::Acces));
    assert_eq!(ask(&mut s, d1, Op::SetPerms, 0, b"data/x\0n1\0r2\0").unwrap(), OK);
    assert_eq!(ask(&mut s, d2, Op::Read, 0, b"/local/domain/1/data/x\0").unwrap(), b"mine");
    assert_eq!(ask(&mut s, d2, Op::Write, 0, b"/local/domain/1/data/x\0no"), Err(XsErrno::Acces));
    ask(&mut s, d1, Op::SetPerms, 0, b"data/x\0n1\0w2\0").unwrap();
    assert_eq!(ask(&mut s, d2, Op::Read, 0, b"/local/domain/1/data/x\0"), Err(XsErrno::Acces));
    assert_eq!(ask(&mut s, d2, Op::Write, 0, b"/local/domain/1/data/x\0yes").unwrap(), OK);
    assert_eq!(
        ask(&mut s, d2, Op::SetPerms, 0, b"/local/domain/1/data/x\0n2\0"),
        Err(XsErrno::Acces)
    );
    // The first entry's letter is for domains that are not listed; the owner always has full
    // access.
    ask(&mut s, d1, Op::SetPerms, 0, b"data/x\0r1\0n2\0").unwrap();
    let d3 = guest(&mut s, dom0, 3);
    assert_eq!(ask(&mut s, d3, Op::Read, 0, b"/local/domain/1/data/x\0").unwrap(), b"yes");
    assert_eq!(ask(&mut s, d2, Op::Read, 0, b"/local/domain/1/data/x\0"), Err(XsErrno::Acces));
    assert_eq!(ask(&mut s, d1, Op::Write, 0, b"data/x\0still").unwrap(), OK);
    assert_eq!(
        ask(&mut s, d1, Op::SetPerms, 0, b"data/x\0n2\0"),
        Err(XsErrno::Perm),
        "owner cannot change the owner"
    );
    assert_eq!(ask(&mut s, dom0, Op::SetPerms, 0, b"/local/domain/1/data/x\0n2\0").unwrap(), OK);
    assert_eq!(ask(&mut s, d1, Op::Read, 0, b"data/x\0"), Err(XsErrno::Acces));
    s.check().unwrap();
}

#[test]
fn node_created_by_dom0_belongs_to_owner_of_parent_and_by_guest_to_guest() {
    let (mut s, dom0) = store();
    let d1 = guest(&mut s, dom0, 1);
    ask(&mut s, dom0, Op::SetPerms, 0, b"/local/domain/1\0n1\0b2\0").unwrap();
    ask(&mut s, dom0, Op::Write, 0, b"/local/domain/1/by0\0").unwrap();
    assert_eq!(ask(&mut s, d1, Op::GetPerms, 0, b"by0\0").unwrap(), b"n1\0b2\0");
    let d2 = s.connect(DomId(2));
    ask(&mut s, d2, Op::Write, 0, b"/local/domain/1/by2/deep\0").unwrap();
    assert_eq!(ask(&mut s, d2, Op::GetPerms, 0, b"/local/domain/1/by2\0").unwrap(), b"n2\0b2\0");
}

#[test]
fn administrative_operations_are_denied_to_guests() {
    let (mut s, dom0) = store();
    let d1 = guest(&mut s, dom0, 1);
    for (op, payload) in [
        (Op::Control, &b"check\0"[..]),
        (Op::Introduce, b"5\x001\x002\0"),
        (Op::Release, b"1\0"),
        (Op::IsDomainIntroduced, b"1\0"),
        (Op::Resume, b"1\0"),
        (Op::SetTarget, b"1\x002\0"),
        (Op::SetPerms, b"@releaseDomain\0n0\0r1\0"),
    ] {
        assert_eq!(ask(&mut s, d1, op, 0, payload), Err(XsErrno::Acces), "{op:?}");
    }
    assert_eq!(ask(&mut s, d1, Op::GetDomainPath, 0, b"7\0").unwrap(), b"/local/domain/7\0");
    assert_eq!(ask(&mut s, dom0, Op::Control, 0, b"check\0").unwrap(), OK);
    assert!(ask(&mut s, dom0, Op::Control, 0, b"help\0").unwrap().starts_with(b"check\n"));
    let quota = ask(&mut s, dom0, Op::Control, 0, b"quota\x001\0").unwrap();
    assert!(quota.starts_with(b"nodes 1\nwatches 0\n"), "{}", String::from_utf8_lossy(&quota));
}

#[test]
fn directory_part_returns_long_list_in_parts() {
    let (mut s, dom0) = store();
    let names: Vec<String> = (0..700).map(|i| format!("child-{i:05}")).collect();
    for name in &names {
        ask(&mut s, dom0, Op::Mkdir, 0, format!("/big/{name}\0").as_bytes()).unwrap();
    }
    assert_eq!(ask(&mut s, dom0, Op::Directory, 0, b"/big\0"), Err(XsErrno::TooBig));
    let mut list = Vec::new();
    let mut generation = None;
    let mut parts = 0;
    loop {
        let part =
            ask(&mut s, dom0, Op::DirectoryPart, 0, format!("/big\0{}\0", list.len()).as_bytes())
                .unwrap();
        let at = part.iter().position(|&b| b == 0).unwrap();
        assert_eq!(*generation.get_or_insert_with(|| part[..at].to_vec()), part[..at]);
        parts += 1;
        let body = &part[at + 1..];
        if let Some(last) = body.strip_suffix(b"\0\0") {
            list.extend_from_slice(last);
            list.push(0);
            break;
        }
        list.extend_from_slice(body);
    }
    assert_eq!(parts, 3);
    assert_eq!(list, names.iter().flat_map(|n| [n.as_bytes(), b"\0"].concat()).collect::<Vec<_>>());
    let beyond = ask(&mut s, dom0, Op::DirectoryPart, 0, b"/big\x00999999\0").unwrap();
    assert!(beyond.ends_with(b"\0\0"));
    ask(&mut s, dom0, Op::Mkdir, 0, b"/big/new\0").unwrap();
    let after = ask(&mut s, dom0, Op::DirectoryPart, 0, b"/big\x000\0").unwrap();
    assert!(!after.starts_with(&generation.unwrap()));
}

#[test]
fn released_domain_leaves_no_nodes_watches_or_permissions() {
    let (mut s, dom0) = store();
    let d1 = guest(&mut s, dom0, 1);
    let d2 = guest(&mut s, dom0, 2);
    ask(&mut s, d1, Op::Write, 0, b"device/vbd/1/state\x001").unwrap();
    ask(&mut s, d2, Op::Write, 0, b"backend/vbd/1/1/state\x001").unwrap();
    ask(&mut s, d2, Op::SetPerms, 0, b"backend/vbd/1/1/state\0n2\0r1\0").unwrap();
    ask(&mut s, d1, Op::Watch, 0, b"device\0t\0").unwrap();
    ask(&mut s, d1, Op::TransactionStart, 0, b"\0").unwrap();
    ask(&mut s, dom0, Op::SetTarget, 0, b"2\x001\0").unwrap();
    assert!(s.release(DomId(1)));
    assert_eq!(s.take_dropped(), [d1]);
    assert!(s.take_dropped().is_empty());
    assert!(!s.is_introduced(DomId(1)) && s.is_introduced(DomId(2)));
    assert_eq!(ask(&mut s, dom0, Op::Read, 0, b"/local/domain/1\0"), Err(XsErrno::NoEnt));
    let state = b"/local/domain/2/backend/vbd/1/1/state\0";
    assert_eq!(
        ask(&mut s, dom0, Op::GetPerms, 0, state).unwrap(),
        b"n2\0",
        "permission of a released domain is removed"
    );
    assert_eq!(ask(&mut s, dom0, Op::Control, 0, b"quota\x001\0"), Err(XsErrno::NoEnt));
    assert!(!s.release(DomId(1)));
    assert!(!s.release(DomId::DOM0));
    assert_eq!(ask(&mut s, dom0, Op::Release, 0, b"1\0"), Err(XsErrno::NoEnt));
    assert_eq!(ask(&mut s, dom0, Op::Release, 0, b"2\0").unwrap(), OK);
    assert_eq!(s.take_dropped(), [d2]);
    s.check().unwrap();
}

#[test]
fn set_target_grants_permissions_of_target() {
    let (mut s, dom0) = store();
    let d1 = guest(&mut s, dom0, 1);
    let d2 = guest(&mut s, dom0, 2);
    ask(&mut s, d1, Op::Write, 0, b"x\0v").unwrap();
    assert_eq!(ask(&mut s, d2, Op::Read, 0, b"/local/domain/1/x\0"), Err(XsErrno::Acces));
    assert_eq!(ask(&mut s, dom0, Op::SetTarget, 0, b"2\x009\0"), Err(XsErrno::NoEnt));
    assert_eq!(ask(&mut s, dom0, Op::SetTarget, 0, b"2\x001\0").unwrap(), OK);
    assert_eq!(ask(&mut s, d2, Op::Read, 0, b"/local/domain/1/x\0").unwrap(), b"v");
    assert_eq!(
        ask(&mut s, d1, Op::Read, 0, b"/local/domain/2\0"),
        Err(XsErrno::Acces),
        "target does not get permissions of its domain"
    );
}

#[test]
fn first_permission_entry_of_domain_applies() {
    let (mut s, dom0) = store();
    ask(&mut s, dom0, Op::Mkdir, 0, b"/x\0").unwrap();
    ask(&mut s, dom0, Op::SetPerms, 0, b"/x\0n0\0r1\0b1\0").unwrap();
    let d1 = s.connect(DomId(1));
    assert_eq!(ask(&mut s, d1, Op::Read, 0, b"/x\0").unwrap(), b"");
    assert_eq!(ask(&mut s, d1, Op::Write, 0, b"/x\0v"), Err(XsErrno::Acces));
}
