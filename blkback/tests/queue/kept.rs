//! Grants that stay mapped.

use crate::rig::{Hostile, Mem, SECTORS, raw};
use pvio_blkback::DataPath;
use pvio_blkback::pages::{KEPT_LEAST, kept_most};
use pvio_grant_table::{Access, Granter};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Status};
use pvio_ring::shm::Region;
use std::time::Duration;

fn hostile() -> Hostile {
    Hostile::new(DataPath::Persistent, Abi::X86_64, Mem::zeroed(SECTORS))
}

#[test]
fn a_page_is_mapped_once_for_many_requests() {
    let mut h = hostile();
    let g = h.data.0;
    for op in [1, 0, 1, 0, 0] {
        assert_eq!(h.ask(&raw(op, 2, 0, &[(g, 0, 7), (g, 0, 0)])).status, Status::Okay);
    }
    let stats = h.back.stats();
    assert_eq!((stats.mapped_pages.get(), stats.reused_pages.get()), (1, 9));
    assert_eq!(h.driver.pages_mapped(), 2, "the ring and the page");
}

#[test]
fn what_is_kept_is_bounded_whatever_a_guest_grants() {
    let mut h = hostile();
    let pages = h.guest.alloc_pages(10 * KEPT_LEAST).unwrap();
    let back = crate::rig::BACK;
    let mut grefs = Vec::new();
    for page in 0..10 * KEPT_LEAST {
        grefs.push(h.guest.grant(back, &pages, page, Access::ReadWrite).unwrap());
    }
    assert_eq!(kept_most(32), KEPT_LEAST);
    for (n, eleven) in grefs.chunks(11).enumerate() {
        let segments: Vec<_> = eleven.iter().map(|gref| (gref.0, 0, 7)).collect();
        let request = raw((n % 2) as u8, segments.len() as u8, 0, &segments);
        assert_eq!(h.ask(&request).status, Status::Okay);
        assert!(h.back.kept_pages() <= KEPT_LEAST);
        assert!(h.driver.pages_mapped() <= KEPT_LEAST + 1, "besides the ring");
    }
    assert_eq!(h.back.kept_pages(), KEPT_LEAST);
    // The oldest are the guest's again, the newest are not.
    assert!(h.guest.end_access(grefs[0]).is_ok());
    assert!(h.guest.end_access(grefs[10 * KEPT_LEAST - 1]).is_err());
}

#[test]
fn a_page_nobody_used_for_a_minute_is_the_guests_again() {
    let mut h = hostile();
    let (one, other) = (h.page(), h.page());
    h.back.tick(Duration::from_secs(5));
    for (gref, _) in [&one, &other] {
        assert_eq!(h.ask(&raw(0, 1, 0, &[(gref.0, 0, 7)])).status, Status::Okay);
    }
    h.back.tick(Duration::from_secs(64));
    assert_eq!(h.back.kept_pages(), 2);
    assert_eq!(h.ask(&raw(0, 1, 0, &[(one.0.0, 0, 7)])).status, Status::Okay);
    h.back.tick(Duration::from_secs(65));
    assert_eq!((h.back.kept_pages(), h.back.stats().kept_pages.get()), (1, 1));
    assert!(h.guest.end_access(one.0).is_err(), "used a second ago");
    assert!(h.guest.end_access(other.0).is_ok());
    // The reference names nothing now; using it is refused, and only that.
    assert_eq!(h.ask(&raw(0, 1, 0, &[(other.0.0, 0, 7)])).status, Status::Error);
    assert_eq!(h.refused(RefusalReason::Grant), 1);
    assert_eq!(h.ask(&raw(0, 1, 0, &[(one.0.0, 0, 7)])).status, Status::Okay);
}

#[test]
fn a_kept_page_cannot_be_taken_back_and_data_goes_to_the_page_it_was() {
    let mut h = hostile();
    let (gref, page) = h.page();
    page.write_bytes(0, &[5; 4096]).unwrap();
    assert_eq!(h.ask(&raw(1, 1, 0, &[(gref.0, 0, 7)])).status, Status::Okay);
    assert!(h.guest.end_access(gref).is_err());
    page.fill(0, 4096, 0).unwrap();
    assert_eq!(h.ask(&raw(0, 1, 0, &[(gref.0, 0, 7)])).status, Status::Okay);
    let mut seen = [0; 4096];
    page.read_bytes(0, &mut seen).unwrap();
    assert_eq!(seen, [5; 4096]);
    drop(h.back);
    assert!(h.guest.end_access(gref).is_ok());
}
