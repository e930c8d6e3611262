//! Grants between domains of one process.

mod support;

use pvio_grant_table::{
    Access, Busy, CopyBuf, CopyOp, DomId, GrantCopier, GrantError, GrantMapper, GrantRef,
    GrantStatus, Granter,
};
use pvio_hosted::DomainConfig;
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};
use support::Host;

#[test]
fn granted_page_is_same_memory_in_both_domains() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let pages = front.alloc_pages(3).unwrap();
    let gref = front.grant(back.id(), &pages, 1, Access::ReadWrite).unwrap();
    let mapping = back.map(front.id(), &[gref], Access::ReadWrite).unwrap();
    assert_eq!((mapping.len(), mapping.writable()), (PAGE_SIZE, true));
    mapping.write_bytes(4090, b"behind").unwrap();
    let mut seen = [0; 6];
    pages.read_bytes(PAGE_SIZE + 4090, &mut seen).unwrap();
    assert_eq!(&seen, b"behind");
    assert!(mapping.write_bytes(4090, b"too far").is_none());
}

#[test]
fn granted_page_is_busy_until_last_mapping_is_dropped() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let page = front.alloc_pages(1).unwrap();
    let gref = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
    let first = back.map(front.id(), &[gref], Access::ReadOnly).unwrap();
    let second = back.map(front.id(), &[gref], Access::ReadWrite).unwrap();
    assert_eq!(front.end_access(gref), Err(Busy(gref)));
    drop(second);
    assert_eq!(front.end_access(gref), Err(Busy(gref)));
    drop(first);
    assert_eq!(front.end_access(gref), Ok(()));
    assert_eq!(
        back.map(front.id(), &[gref], Access::ReadOnly).err(),
        Some(GrantStatus::BadGrantRef)
    );
}

#[test]
fn read_only_grant_cannot_be_mapped_writable() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let page = front.alloc_pages(2).unwrap();
    let grefs = [1, 0].map(|p| front.grant(back.id(), &page, p, Access::ReadOnly).unwrap());
    for grefs in [&grefs[..1], &grefs[..]] {
        assert_eq!(
            back.map(front.id(), grefs, Access::ReadWrite).err(),
            Some(GrantStatus::PermissionDenied)
        );
        let mapping = back.map(front.id(), grefs, Access::ReadOnly).unwrap();
        assert!(!mapping.writable());
        assert!(mapping.write_bytes(0, &[1]).is_none());
        assert!(mapping.range_mut(0, 1).is_none(), "no mutable range of a read-only mapping");
    }
    grefs.into_iter().for_each(|gref| front.end_access(gref).unwrap());
}

#[test]
fn scattered_grants_map_contiguously_in_order() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let pages = front.alloc_pages(6).unwrap();
    let order = [4, 1, 0, 5];
    let grefs = order.map(|page| {
        pages.write_bytes(page * PAGE_SIZE, &[page as u8; PAGE_SIZE]).unwrap();
        front.grant(back.id(), &pages, page, Access::ReadWrite).unwrap()
    });
    let ring = back.map(front.id(), &grefs, Access::ReadWrite).unwrap();
    assert_eq!(ring.len(), 4 * PAGE_SIZE);
    let mut all = vec![0; ring.len()];
    ring.read_bytes(0, &mut all).unwrap();
    for (chunk, page) in all.chunks(PAGE_SIZE).zip(order) {
        assert!(chunk.iter().all(|byte| *byte == page as u8), "page {page}");
    }
    ring.write_bytes(PAGE_SIZE - 1, &[77, 88]).unwrap();
    let mut seen = [0; 1];
    pages.read_bytes(5 * PAGE_SIZE - 1, &mut seen).unwrap();
    assert_eq!(seen, [77]);
    pages.read_bytes(PAGE_SIZE, &mut seen).unwrap();
    assert_eq!(seen, [88]);
    drop(ring);
    grefs.into_iter().for_each(|gref| front.end_access(gref).unwrap());
}

#[test]
fn map_of_several_grants_with_bad_one_maps_none() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let pages = front.alloc_pages(2).unwrap();
    let good = front.grant(back.id(), &pages, 0, Access::ReadWrite).unwrap();
    let strange = front.grant(DomId(999), &pages, 1, Access::ReadWrite).unwrap();
    for bad in [strange, GrantRef(0), GrantRef(4096), GrantRef(u32::MAX)] {
        let mapped = back.map(front.id(), &[good, bad], Access::ReadWrite);
        assert_eq!(mapped.err(), Some(GrantStatus::BadGrantRef));
    }
    assert_eq!(back.map(front.id(), &[], Access::ReadOnly).err(), Some(GrantStatus::NoSpace));
    assert_eq!(front.end_access(good), Ok(()), "valid grant is not left in use");
}

#[test]
fn map_each_reports_status_per_grant() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let pages = front.alloc_pages(2).unwrap();
    let grefs = [0, 1].map(|p| front.grant(back.id(), &pages, p, Access::ReadWrite).unwrap());
    let asked = [grefs[1], GrantRef(77), grefs[0]];
    let mut told = Vec::new();
    back.map_each(front.id(), &asked, Access::ReadWrite, &mut |i, mapped| {
        told.push((i, mapped.map(|mapping| mapping.len())));
    });
    let bad = Err(GrantStatus::BadGrantRef);
    assert_eq!(told, [(0, Ok(PAGE_SIZE)), (1, bad), (2, Ok(PAGE_SIZE))]);
    told.clear();
    back.map_each(DomId(500), &asked, Access::ReadWrite, &mut |i, mapped| {
        told.push((i, mapped.map(|mapping| mapping.len())));
    });
    assert_eq!(told, [0, 1, 2].map(|i| (i, Err(GrantStatus::BadDomain))));
}

#[test]
fn grant_copies_stay_within_page_and_report_status_each() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let pages = front.alloc_pages(2).unwrap();
    pages.write_bytes(100, b"from the front").unwrap();
    let gref = front.grant(back.id(), &pages, 0, Access::ReadWrite).unwrap();
    let fixed = front.grant(back.id(), &pages, 1, Access::ReadOnly).unwrap();
    let (mut buf, mut far) = ([0; 14], [0; 2]);
    let op = |domain, gref, offset, with| CopyOp {
        domain,
        gref,
        offset,
        with,
        status: GrantStatus::GeneralError,
    };
    let mut ops = [
        op(front.id(), gref, 100, CopyBuf::FromGrant(&mut buf)),
        op(front.id(), gref, 4095, CopyBuf::FromGrant(&mut far)),
        op(front.id(), gref, usize::MAX, CopyBuf::ToGrant(b"x")),
        op(front.id(), gref, 4095, CopyBuf::ToGrant(b"x")),
        op(front.id(), fixed, 0, CopyBuf::ToGrant(b"x")),
        op(DomId(300), gref, 0, CopyBuf::ToGrant(b"x")),
        op(front.id(), GrantRef(9999), 0, CopyBuf::ToGrant(b"x")),
    ];
    back.copy(&mut ops);
    use GrantStatus::{BadCopyArgument, BadDomain, BadGrantRef, Okay, PermissionDenied};
    assert_eq!(
        ops.map(|op| op.status),
        [Okay, BadCopyArgument, BadCopyArgument, Okay, PermissionDenied, BadDomain, BadGrantRef]
    );
    assert_eq!(&buf, b"from the front");
    let mut last = [0; 2];
    pages.read_bytes(4095, &mut last).unwrap();
    assert_eq!(last, [b'x', 0], "copy does not reach the next page");
    front.end_access(gref).unwrap();
    front.end_access(fixed).unwrap();
}

#[test]
fn freed_pages_are_reused_only_after_grant_ends_and_zeroed() {
    let host = Host::new();
    let id = host.hypervisor.create_domain(DomainConfig::new("small").memory_pages(2)).unwrap();
    let (front, back) = (host.join(id), host.domain("back"));
    let pages = front.alloc_pages(2).unwrap();
    pages.write_bytes(PAGE_SIZE, b"secret").unwrap();
    let gref = front.grant(back.id(), &pages, 1, Access::ReadOnly).unwrap();
    let mapping = back.map(id, &[gref], Access::ReadOnly).unwrap();
    let clone = pages.clone();
    drop(pages);
    drop(clone);
    assert_eq!(front.alloc_pages(1).err(), Some(GrantError::OutOfPages));
    assert!(front.end_access(gref).is_err());
    drop(mapping);
    front.end_access(gref).unwrap();
    let again = front.alloc_pages(2).unwrap();
    let mut seen = [9; 6];
    again.read_bytes(PAGE_SIZE, &mut seen).unwrap();
    assert_eq!(seen, [0; 6], "zeroed");
    assert_eq!(front.alloc_pages(1).err(), Some(GrantError::OutOfPages));
    assert!(front.alloc_pages(0).is_err() && front.alloc_pages(usize::MAX).is_err());
}

#[test]
fn grant_of_foreign_page_or_beyond_table_size_fails() {
    let host = Host::new();
    let config = DomainConfig::new("small").memory_pages(2).grant_frames(1);
    let front = host.join(host.hypervisor.create_domain(config).unwrap());
    let back = host.domain("back");
    let page = front.alloc_pages(1).unwrap();
    assert_eq!(back.grant(front.id(), &page, 0, Access::ReadOnly), Err(GrantError::NotOurs));
    assert_eq!(front.grant(back.id(), &page, 1, Access::ReadOnly), Err(GrantError::NotOurs));
    let grefs: Vec<_> =
        (8..512).map(|_| front.grant(back.id(), &page, 0, Access::ReadOnly).unwrap()).collect();
    assert!(grefs.iter().all(|gref| *gref >= GrantRef::FIRST_FREE));
    assert_eq!(front.grant(back.id(), &page, 0, Access::ReadOnly), Err(GrantError::OutOfEntries));
    front.end_access(grefs[100]).unwrap();
    front.end_access(grefs[100]).unwrap();
    front.end_access(GrantRef(u32::MAX)).unwrap();
    front.grant(back.id(), &page, 0, Access::ReadOnly).unwrap();
    assert_eq!(front.grant(back.id(), &page, 0, Access::ReadOnly), Err(GrantError::OutOfEntries));
}

#[test]
fn concurrent_mappings_of_page_leave_it_unused() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let page = front.alloc_pages(1).unwrap();
    let gref = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..50_000 {
                    let mapping = back.map(front.id(), &[gref], Access::ReadWrite).unwrap();
                    assert_eq!(front.end_access(gref), Err(Busy(gref)), "mapped page is busy");
                    drop(mapping);
                }
            });
        }
    });
    front.end_access(gref).unwrap();
}

#[test]
fn mapping_of_dead_domain_stays_readable() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let id = front.id();
    let pages = front.alloc_pages(3).unwrap();
    pages.write_bytes(2 * PAGE_SIZE, b"last words").unwrap();
    let grefs = [2, 0].map(|p| front.grant(back.id(), &pages, p, Access::ReadWrite).unwrap());
    let ring = back.map(id, &grefs, Access::ReadWrite).unwrap();
    let one = back.map(id, &grefs[..1], Access::ReadOnly).unwrap();
    drop((pages, front));
    host.wait_death(id);
    for mapping in [&ring, &one] {
        let mut seen = [0; 10];
        mapping.read_bytes(0, &mut seen).unwrap();
        assert_eq!(&seen, b"last words");
    }
    assert_eq!(back.map(id, &grefs, Access::ReadOnly).err(), Some(GrantStatus::BadDomain));
    // A domain with the same id is a different domain.
    host.hypervisor.create_domain(DomainConfig::new("front").id(id)).unwrap();
    let front = host.join(id);
    assert_eq!(back.map(id, &grefs, Access::ReadOnly).err(), Some(GrantStatus::BadGrantRef));
    let page = front.alloc_pages(1).unwrap();
    page.write_bytes(0, b"new").unwrap();
    let gref = front.grant(back.id(), &page, 0, Access::ReadOnly).unwrap();
    let mapping = back.map(id, &[gref], Access::ReadOnly).unwrap();
    let mut seen = [0; 3];
    mapping.read_bytes(0, &mut seen).unwrap();
    assert_eq!(&seen, b"new");
    drop((ring, one));
    assert_eq!(front.end_access(gref), Err(Busy(gref)), "uses of the dead domain are not counted");
}

#[test]
fn destroyed_domain_releases_its_mappings_of_peers() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let page = front.alloc_pages(1).unwrap();
    let gref = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
    let mapping = back.map(front.id(), &[gref], Access::ReadWrite).unwrap();
    let id = back.id();
    drop(back);
    assert!(
        host.hypervisor.domains().iter().any(|domain| domain.id == id),
        "domain exists while it has a mapping"
    );
    host.hypervisor.destroy_domain(id).unwrap();
    front.end_access(gref).unwrap();
    // A later grant of the same entry stays valid when the mapping of the destroyed domain is
    // dropped.
    let next = host.domain("next");
    assert_eq!(front.grant(next.id(), &page, 0, Access::ReadWrite), Ok(gref));
    let theirs = next.map(front.id(), &[gref], Access::ReadWrite).unwrap();
    drop(mapping);
    assert_eq!(front.end_access(gref), Err(Busy(gref)));
    drop(theirs);
    front.end_access(gref).unwrap();
}
