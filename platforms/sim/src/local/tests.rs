use super::*;
use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, GrantCopier, GrantError, GrantMapper, GrantRef, GrantStatus, Granter,
};
use pvio_ring::shm::{Region, SharedMemory};

const FRONT: DomId = DomId(5);
const BACK: DomId = DomId(0);

fn machine() -> (LocalMachine, LocalDomain, LocalDomain) {
    let machine = LocalMachine::new();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    (machine, front, back)
}

fn read(back: &LocalDomain, gref: GrantRef, offset: usize, out: &mut [u8]) -> GrantStatus {
    let with = CopyBuf::FromGrant(out);
    let mut ops = [CopyOp { domain: FRONT, gref, offset, with, status: GrantStatus::GeneralError }];
    back.copy(&mut ops);
    ops[0].status
}

fn write(back: &LocalDomain, gref: GrantRef, offset: usize, from: &[u8]) -> GrantStatus {
    let with = CopyBuf::ToGrant(from);
    let mut ops = [CopyOp { domain: FRONT, gref, offset, with, status: GrantStatus::GeneralError }];
    back.copy(&mut ops);
    ops[0].status
}

#[test]
fn local_platform_types_are_send_and_sync() {
    fn is<T: Send + Sync>() {}
    is::<LocalMachine>();
    is::<LocalDomain>();
    is::<memory::LocalPages>();
    is::<memory::LocalMapping>();
    is::<events::LocalChannel>();
}

#[test]
fn grants_of_several_pages_map_contiguously() {
    let (_machine, front, back) = machine();
    let pages = front.alloc_pages(3).unwrap();
    let grefs: Vec<_> =
        (1..3).map(|p| front.grant(BACK, &pages, p, Access::ReadWrite).unwrap()).collect();
    let mapped = back.map(FRONT, &grefs, Access::ReadWrite).unwrap();
    assert_eq!(mapped.len(), 2 * 4096);
    mapped.write_bytes(4095, &[1, 2]).unwrap();
    let mut got = [0; 2];
    pages.read_bytes(4096 + 4095, &mut got).unwrap();
    assert_eq!(got, [1, 2]);
    let backwards = [grefs[1], grefs[0]];
    assert_eq!(back.map(FRONT, &backwards, Access::ReadWrite).unwrap_err(), GrantStatus::NoSpace);
    assert_eq!(back.pages_mapped(), 2, "failed map leaves no mapping");
}

#[test]
fn read_only_grant_is_neither_mapped_nor_copied_writable() {
    let (_machine, front, back) = machine();
    let pages = front.alloc_pages(1).unwrap();
    let gref = front.grant(BACK, &pages, 0, Access::ReadOnly).unwrap();
    let denied = back.map(FRONT, &[gref], Access::ReadWrite).unwrap_err();
    assert_eq!(denied, GrantStatus::PermissionDenied);
    assert_eq!(write(&back, gref, 0, &[1]), GrantStatus::PermissionDenied);
    let mapped = back.map(FRONT, &[gref], Access::ReadOnly).unwrap();
    assert!(!mapped.writable() && mapped.write_bytes(0, &[1]).is_none());
}

#[test]
fn grant_copies_are_checked_individually() {
    let (_machine, front, back) = machine();
    let pages = front.alloc_pages(1).unwrap();
    let gref = front.grant(BACK, &pages, 0, Access::ReadWrite).unwrap();
    let mut out = [0; 8];
    assert_eq!(write(&back, gref, 4088, &[9; 8]), GrantStatus::Okay);
    assert_eq!(read(&back, gref, 4088, &mut out), GrantStatus::Okay);
    assert_eq!(out, [9; 8]);
    assert_eq!(read(&back, gref, 4089, &mut out), GrantStatus::BadCopyArgument);
    assert_eq!(read(&back, gref, usize::MAX, &mut out), GrantStatus::BadCopyArgument);
    assert_eq!(read(&back, GrantRef(gref.0 + 1), 0, &mut out), GrantStatus::BadGrantRef);
    assert_eq!(front.end_access(gref), Ok(()), "copy leaves the grant unused");
    assert_eq!(read(&back, gref, 0, &mut out), GrantStatus::BadGrantRef);
}

#[test]
fn grant_copy_leaves_mapped_page_in_use() {
    let (_machine, front, back) = machine();
    let pages = front.alloc_pages(1).unwrap();
    let gref = front.grant(BACK, &pages, 0, Access::ReadWrite).unwrap();
    let first = back.map(FRONT, &[gref], Access::ReadOnly).unwrap();
    let second = back.map(FRONT, &[gref], Access::ReadWrite).unwrap();
    assert_eq!(write(&back, gref, 0, &[1]), GrantStatus::Okay);
    drop(first);
    assert!(front.end_access(gref).is_err());
    drop(second);
    assert_eq!(front.end_access(gref), Ok(()));
    assert_eq!(front.end_access(gref), Ok(()), "second end_access succeeds");
    assert_eq!(front.pages_granted(), 0);
}

#[test]
fn grant_of_foreign_page_fails_and_freed_pages_are_returned() {
    let (_machine, front, back) = machine();
    let pages = front.alloc_pages(2).unwrap();
    assert_eq!(back.grant(FRONT, &pages, 0, Access::ReadWrite), Err(GrantError::NotOurs));
    assert_eq!(front.grant(BACK, &pages, 2, Access::ReadWrite), Err(GrantError::NotOurs));
    assert_eq!(front.alloc_pages(1 << 20).unwrap_err(), GrantError::OutOfPages);
    assert_eq!(front.pages_allocated(), 2);
    drop(pages);
    assert_eq!(front.pages_allocated(), 0);
}

#[test]
fn grant_beyond_table_size_is_out_of_entries() {
    let (_machine, front, _back) = machine();
    let pages = front.alloc_pages(1).unwrap();
    let mut count = 0;
    let end = loop {
        match front.grant(BACK, &pages, 0, Access::ReadOnly) {
            Ok(_) => count += 1,
            Err(e) => break e,
        }
    };
    assert_eq!((end, count), (GrantError::OutOfEntries, 32768 - 8));
}

#[test]
fn event_is_taken_once_and_binding_raises_one() {
    let (_machine, front, back) = machine();
    let ours = front.alloc_unbound(BACK).unwrap();
    assert_eq!(ours.notify(), Ok(()), "notify of an unbound port succeeds");
    assert_eq!(
        front.bind_interdomain(FRONT, ours.port()).unwrap_err(),
        EventError::BadPort,
        "domain cannot bind its own unbound port"
    );
    let theirs = back.bind_interdomain(FRONT, ours.port()).unwrap();
    assert_eq!(back.bind_interdomain(FRONT, ours.port()).unwrap_err(), EventError::BadPort);
    assert_eq!((theirs.take(), theirs.take()), (Ok(true), Ok(false)));
    ours.notify().unwrap();
    ours.notify().unwrap();
    assert_eq!((theirs.take(), theirs.take()), (Ok(true), Ok(false)));
    theirs.notify().unwrap();
    assert_eq!(ours.take(), Ok(true));
    assert_eq!((front.events_sent(), back.events_sent()), (2, 1));
    drop(theirs);
    assert_eq!(ours.notify(), Ok(()));
    assert_eq!((front.ports_open(), back.ports_open()), (1, 0));
    assert!(back.bind_interdomain(FRONT, Port(99)).is_err());
    assert!(back.bind_interdomain(DomId(9), ours.port()).is_err());
}

#[test]
fn killed_domain_releases_grants_and_ports() {
    let (machine, front, back) = machine();
    let pages = front.alloc_pages(1).unwrap();
    let gref = front.grant(BACK, &pages, 0, Access::ReadWrite).unwrap();
    let mapped = back.map(FRONT, &[gref], Access::ReadWrite).unwrap();
    let ours = front.alloc_unbound(BACK).unwrap();
    let theirs = back.bind_interdomain(FRONT, ours.port()).unwrap();

    machine.kill(BACK);
    assert!(!back.is_alive());
    assert_eq!(front.end_access(gref), Ok(()));
    assert_eq!(
        (theirs.notify(), theirs.take()),
        (Err(EventError::Closed), Err(EventError::Closed))
    );
    assert_eq!(ours.notify(), Ok(()));
    assert!(back.map(FRONT, &[gref], Access::ReadWrite).is_err());

    // The id is reused; drops of the killed domain's resources do not affect the new domain.
    let again = machine.domain(BACK);
    let gref = front.grant(BACK, &pages, 0, Access::ReadWrite).unwrap();
    let fresh = again.map(FRONT, &[gref], Access::ReadWrite).unwrap();
    let bound = again.bind_interdomain(FRONT, ours.port()).unwrap();
    drop((mapped, theirs));
    assert!(front.end_access(gref).is_err());
    assert_eq!(again.pages_mapped(), 1);
    ours.notify().unwrap();
    assert_eq!(bound.take(), Ok(true));

    // Conversely, a killed frontend's pages stay readable while they are mapped, and no longer.
    machine.kill(FRONT);
    fresh.write_bytes(0, &[1]).unwrap();
    drop(fresh);
    let gone = again.map(FRONT, &[gref], Access::ReadWrite).unwrap_err();
    assert_eq!(gone, GrantStatus::BadDomain);
    assert_eq!(again.pages_mapped(), 0);
}
