//! Cached mappings of persistent grants.

use crate::rig::{BACK, Hostile, Mem, Pages, SECTORS, raw};
use pvio_blkback::DataPath;
use pvio_blkback::pages::{CACHED_MIN, cached_max};
use pvio_grant_table::{Access, GrantRef, Granter};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Status};
use pvio_ring::shm::Region;
use std::time::Duration;

const KEEPING: [DataPath; 2] = [DataPath::PersistentOrMap, DataPath::PersistentOrCopy];

fn hostile_by(path: DataPath) -> Hostile {
    Hostile::new(path, Abi::X86_64, Mem::zeroed(SECTORS))
}

fn hostile() -> Hostile {
    hostile_by(DataPath::PersistentOrMap)
}

#[test]
fn persistent_grant_is_mapped_once_for_many_requests() {
    let mut h = hostile();
    let g = h.data.0;
    for op in [1, 0, 1, 0, 0] {
        assert_eq!(h.ask(&raw(op, 2, 0, &[(g, 0, 7), (g, 0, 0)])).status, Status::Okay);
    }
    let stats = h.back.stats();
    assert_eq!((stats.mapped_pages.get(), stats.reused_pages.get()), (1, 9));
    assert_eq!(h.driver.pages_mapped(), 2, "the ring and the page");
}

/// Returns `count` pages that the guest grants.
fn many(h: &Hostile, count: usize) -> (Vec<GrantRef>, Pages) {
    let pages = h.guest.alloc_pages(count).unwrap();
    let grant = |page| h.guest.grant(BACK, &pages, page, Access::ReadWrite).unwrap();
    ((0..count).map(grant).collect(), pages)
}

/// Uses all of them once, eleven with each request, alternating between writes and reads.
fn use_all(h: &mut Hostile, grefs: &[GrantRef]) {
    for (n, eleven) in grefs.chunks(11).enumerate() {
        let segments: Vec<_> = eleven.iter().map(|gref| (gref.0, 0, 7)).collect();
        let request = raw((n % 2) as u8, segments.len() as u8, 0, &segments);
        assert_eq!(h.ask(&request).status, Status::Okay);
        assert!(h.back.cached_mappings() <= CACHED_MIN);
        assert!(h.driver.pages_mapped() <= CACHED_MIN + 1, "besides the ring");
    }
}

#[test]
fn cached_mappings_are_bounded_if_guest_grants_many_pages() {
    for path in KEEPING {
        let mut h = hostile_by(path);
        let (grefs, _pages) = many(&h, 10 * CACHED_MIN);
        assert_eq!(cached_max(32), CACHED_MIN);
        use_all(&mut h, &grefs);
        assert_eq!(h.back.cached_mappings(), CACHED_MIN);
        // The first ones have cached mappings, the last ones were unmapped.
        assert!(h.guest.end_access(grefs[0]).is_err());
        assert!(h.guest.end_access(grefs[10 * CACHED_MIN - 1]).is_ok());
    }
}

#[test]
fn pages_beyond_full_cache_use_fallback_path_and_evict_none() {
    for path in KEEPING {
        let mut h = hostile_by(path);
        let (grefs, _pages) = many(&h, 2 * CACHED_MIN);
        let counts = |h: &Hostile| {
            let stats = h.back.stats();
            [&stats.mapped_pages, &stats.reused_pages, &stats.copied_pages]
                .map(|c| c.get() as usize)
        };
        for round in 0..4 {
            let before = counts(&h);
            use_all(&mut h, &grefs);
            let after = counts(&h);
            let [mapped, reused, copied] = [0, 1, 2].map(|i| after[i] - before[i]);
            let (kept, beyond) = if round == 0 { (0, CACHED_MIN) } else { (CACHED_MIN, 0) };
            assert_eq!(reused, kept, "{path}, round {round}");
            let others =
                if path.copies() { [beyond, CACHED_MIN] } else { [beyond + CACHED_MIN, 0] };
            assert_eq!([mapped, copied], others, "{path}, round {round}");
        }
    }
}

#[test]
fn request_with_cached_and_uncached_pages_transfers_all_data() {
    for path in KEEPING {
        let mut h = hostile_by(path);
        let (kept, _pages) = many(&h, CACHED_MIN - 3);
        use_all(&mut h, &kept);
        // Three of these still have cached mappings, the others never had.
        let pages: Vec<_> = (0..8).map(|_| h.page()).collect();
        // Alternating, so that no two adjacent ones are of the same kind.
        let order = [0, 3, 1, 4, 2, 5, 6, 7];
        let warm: Vec<_> = pages[..3].iter().map(|(gref, _)| (gref.0, 0, 7)).collect();
        assert_eq!(h.ask(&raw(0, 3, 0, &warm)).status, Status::Okay);
        assert_eq!(h.back.cached_mappings(), CACHED_MIN);
        for (n, page) in order.iter().enumerate() {
            pages[*page].1.write_bytes(0, &[n as u8 + 1; 4096]).unwrap();
        }
        // The second and the last segment do not cover a whole page.
        let bounds = |n| {
            if n == 1 {
                (2, 7)
            } else if n == 7 {
                (0, 3)
            } else {
                (0, 7)
            }
        };
        let segments: Vec<_> = order
            .iter()
            .enumerate()
            .map(|(n, page)| (pages[*page].0.0, bounds(n).0, bounds(n).1))
            .collect();
        assert_eq!(h.ask(&raw(1, 8, 0, &segments)).status, Status::Okay);
        pages.iter().for_each(|(_, page)| page.fill(0, 4096, 0).unwrap());
        assert_eq!(h.ask(&raw(0, 8, 0, &segments)).status, Status::Okay);
        for (n, page) in order.iter().enumerate() {
            let mut seen = [0; 4096];
            pages[*page].1.read_bytes(0, &mut seen).unwrap();
            let (first, last) = bounds(n);
            let inside = usize::from(first) * 512..(usize::from(last) + 1) * 512;
            for (at, byte) in seen.iter().enumerate() {
                let expected = if inside.contains(&at) { n as u8 + 1 } else { 0 };
                assert_eq!(*byte, expected, "{path}, page {n}, byte {at}");
            }
        }
        assert_eq!(h.driver.pages_mapped(), CACHED_MIN + 1, "{path}");
    }
}

#[test]
fn bad_grant_beyond_full_cache_fails_only_its_request() {
    for path in KEEPING {
        let mut h = hostile_by(path);
        let (kept, _pages) = many(&h, CACHED_MIN);
        use_all(&mut h, &kept);
        let (GrantRef(good), _page) = h.page();
        let bad = u32::MAX;
        for op in [0, 1] {
            for pages in [[kept[0].0, bad, good], [bad, good, kept[1].0], [good, kept[2].0, bad]] {
                let request = raw(op, 3, 0, &pages.map(|gref| (gref, 0, 7)));
                assert_eq!(h.ask(&request).status, Status::Error, "{path}");
                assert_eq!(h.driver.pages_mapped(), CACHED_MIN + 1, "{path}");
                let request = raw(op, 2, 0, &[(kept[0].0, 0, 7), (good, 0, 7)]);
                assert_eq!(h.ask(&request).status, Status::Okay, "{path}");
            }
        }
        assert_eq!(h.refused(RefusalReason::Grant), 6);
    }
}

#[test]
fn idle_cached_mappings_are_evicted_gradually_for_new_pages() {
    for path in KEEPING {
        let mut h = hostile_by(path);
        let (grefs, _pages) = many(&h, CACHED_MIN + 11);
        let (old, new) = grefs.split_at(CACHED_MIN);
        use_all(&mut h, old);
        let stats = |h: &Hostile| h.back.stats().reused_pages.get();
        let mut served = Vec::new();
        for look in 1..=4 {
            h.back.tick(Duration::from_millis(100 * look));
            assert!(h.back.cached_mappings() >= CACHED_MIN - CACHED_MIN.div_ceil(20));
            let before = stats(&h);
            use_all(&mut h, new);
            served.push(stats(&h) - before);
        }
        // Not cached at first; then there is room, because no other page was used since; then
        // cached.
        assert_eq!(served, [0, 0, 11, 11], "{path}");
        assert!(new.iter().all(|gref| h.guest.end_access(*gref).is_err()), "{path}");
        assert!(h.back.cached_mappings() < CACHED_MIN, "no more mappings are evicted than needed");
    }
}

#[test]
fn cached_mapping_unused_for_a_minute_is_unmapped() {
    let mut h = hostile();
    let (one, other) = (h.page(), h.page());
    h.back.tick(Duration::from_secs(5));
    for (gref, _) in [&one, &other] {
        assert_eq!(h.ask(&raw(0, 1, 0, &[(gref.0, 0, 7)])).status, Status::Okay);
    }
    h.back.tick(Duration::from_secs(64));
    assert_eq!(h.back.cached_mappings(), 2);
    assert_eq!(h.ask(&raw(0, 1, 0, &[(one.0.0, 0, 7)])).status, Status::Okay);
    h.back.tick(Duration::from_secs(65));
    assert_eq!((h.back.cached_mappings(), h.back.stats().cached_mappings.get()), (1, 1));
    assert!(h.guest.end_access(one.0).is_err(), "mapping used a second ago is still cached");
    assert!(h.guest.end_access(other.0).is_ok());
    // The reference is no longer valid; only the request that uses it is rejected.
    assert_eq!(h.ask(&raw(0, 1, 0, &[(other.0.0, 0, 7)])).status, Status::Error);
    assert_eq!(h.refused(RefusalReason::Grant), 1);
    assert_eq!(h.ask(&raw(0, 1, 0, &[(one.0.0, 0, 7)])).status, Status::Okay);
}

#[test]
fn cached_page_cannot_be_revoked_and_still_receives_data() {
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
