//! Staging grants: pages that are mapped once, used for every packet, and unmapped on request.

#[path = "common/control.rs"]
mod control;

mod common;

use common::{ALL, pattern};
use control::{Many, many, many_with};
use pvio_grant_table::{Access, GrantRef, Granter};
use pvio_netback::port::Offload;
use pvio_netback::queue::STAGED_MAX;
use pvio_ring::proto::netif::{CtrlAsk, CtrlStatus, GrefEntry, GrefList, rsp};
use pvio_sim::local::memory::LocalPages;

const OKAY: CtrlStatus = CtrlStatus::Success;
const INVALID: CtrlStatus = CtrlStatus::InvalidParameter;

fn entry(gref: GrantRef, read_only: bool) -> GrefEntry {
    // The backend ignores the status in a request.
    GrefEntry { gref, read_only, status: 0xbeef }
}

fn list(m: &Many, queue: u32, len: u32) -> GrefList {
    GrefList { queue, page: m.control.gref, len }
}

fn add(m: &mut Many, queue: u32, entries: &[GrefEntry]) -> CtrlStatus {
    m.write_list(entries);
    let list = list(m, queue, entries.len() as u32);
    m.set(CtrlAsk::AddGrefMapping(list))
}

/// Removes pages. Returns the status of each, and the number of unmapped pages that the backend
/// reports.
fn remove(m: &mut Many, queue: u32, grefs: &[GrantRef]) -> (Vec<u16>, u32) {
    m.write_list(&grefs.iter().map(|gref| entry(*gref, false)).collect::<Vec<_>>());
    let list = list(m, queue, grefs.len() as u32);
    let (status, count) = m.ask(CtrlAsk::DelGrefMapping(list));
    assert_eq!(status, OKAY);
    (m.read_list(grefs.len()).iter().map(|entry| entry.status).collect(), count)
}

/// Returns entries for the guest's data pages, the first half of them read-only.
fn all(m: &Many, queue: usize) -> Vec<GrefEntry> {
    let grefs = m.queues[queue].guest.grefs.iter().enumerate();
    grefs.map(|(page, gref)| entry(*gref, page < 32)).collect()
}

/// Sends and receives a packet of two pages each. Returns the number of copies through staged
/// pages.
fn both_ways(m: &mut Many, queue: usize) -> u64 {
    let setup = &mut m.queues[queue];
    let before = setup.stats.staged();
    let frame = pattern(5000, 1);
    let packet = setup.guest.packet(0, &[&frame[..4096], &frame[4096..]]);
    setup.guest.send(&packet);
    setup.guest.post(40..42);
    setup.inject(&frame, Offload::default());
    setup.poll();
    assert_eq!(setup.guest.answers(), [(0, rsp::OKAY), (1, rsp::OKAY)]);
    assert_eq!(setup.sent(), [(frame.clone(), Offload::default())]);
    let got = setup.guest.received();
    assert_eq!(got.iter().map(|r| r.status).collect::<Vec<_>>(), [4096, 904]);
    let whole = [setup.guest.page(40, 4096), setup.guest.page(41, 904)].concat();
    assert_eq!(whole, frame);
    setup.stats.staged() - before
}

#[test]
fn staged_pages_are_mapped_once_and_used_for_tx_and_rx() {
    let mut m = many(ALL, 2);
    for queue in [0, 1] {
        assert_eq!(m.ask(CtrlAsk::GetGrefMappingSize { queue }), (OKAY, STAGED_MAX as u32));
    }
    assert_eq!(m.ask(CtrlAsk::GetGrefMappingSize { queue: 2 }), (INVALID, 0));
    assert_eq!(both_ways(&mut m, 1), 0, "grant copy before staging");
    let mapped = m.queues[1].guest.domain.clone();
    let before = m.queues[0].back.pages_mapped();
    let entries = all(&m, 1);
    assert_eq!(add(&mut m, 1, &entries), OKAY);
    assert_eq!((m.queues[0].queue.staged(), m.queues[1].queue.staged()), (0, 64));
    assert_eq!(m.queues[0].back.pages_mapped(), before + 64);
    for _ in 0..3 {
        assert_eq!(both_ways(&mut m, 1), 4);
        assert_eq!(
            m.queues[0].back.pages_mapped(),
            before + 64,
            "number of mapped pages is unchanged"
        );
    }
    assert_eq!(both_ways(&mut m, 0), 0, "staging of one queue does not affect another");
    // While they are mapped, the guest cannot end their grants.
    let gref = entries[0].gref;
    assert!(mapped.end_access(gref).is_err());
    assert_eq!(remove(&mut m, 1, &[gref]), (vec![0], 1));
    mapped.end_access(gref).expect("page can be revoked after unstaging");
    assert_eq!(m.queues[1].queue.staged(), 63);
}

#[test]
fn del_gref_mapping_removes_only_staged_pages() {
    let mut m = many(ALL, 1);
    let entries = all(&m, 0);
    assert_eq!(add(&mut m, 0, &entries[..4]), OKAY);
    let grefs: Vec<_> = entries.iter().map(|entry| entry.gref).collect();
    let asked = [grefs[1], grefs[9], grefs[1], GrantRef(u32::MAX), grefs[3]];
    let (ok, bad) = (OKAY as u16, INVALID as u16);
    assert_eq!(remove(&mut m, 0, &asked), (vec![ok, bad, bad, bad, ok], 2));
    assert_eq!(m.queues[0].queue.staged(), 2);
    // A page that is no longer staged is copied with the policy, in a packet with one that is
    // staged.
    assert_eq!(both_ways(&mut m, 0), 1);
    assert_eq!(add(&mut m, 0, &entries[1..2]), OKAY);
    assert_eq!(both_ways(&mut m, 0), 2);
    assert_eq!(remove(&mut m, 0, &[]), (vec![], 0));
}

#[test]
fn add_gref_mapping_with_bad_entry_maps_nothing() {
    let mut m = many(ALL, 1);
    let entries = all(&m, 0);
    let nowhere = entry(GrantRef(4000), false);
    let before = m.queues[0].back.pages_mapped();
    for bad in [
        vec![entries[0], entries[1], nowhere],
        vec![entries[0], entries[1], entries[0]],
        vec![nowhere],
    ] {
        assert_eq!(add(&mut m, 0, &bad), INVALID);
        assert_eq!(m.queues[0].queue.staged(), 0);
        assert_eq!(m.queues[0].back.pages_mapped(), before);
    }
    assert_eq!(add(&mut m, 0, &entries[..2]), OKAY);
    assert_eq!(add(&mut m, 0, &entries[1..3]), INVALID, "entry that is already staged is rejected");
    assert_eq!(m.queues[0].queue.staged(), 2, "staged pages are unchanged");
    assert_eq!(m.queues[0].stats.controls(INVALID), 4);
}

#[test]
fn add_gref_mapping_beyond_limit_is_invalid() {
    let mut m = many(ALL, 1);
    let domain = m.queues[0].guest.domain.clone();
    let pages: LocalPages = domain.alloc_pages(STAGED_MAX + 1).unwrap();
    let grant = |page| domain.grant(common::BACK, &pages, page, Access::ReadWrite).unwrap();
    let entries: Vec<_> = (0..=STAGED_MAX).map(|page| entry(grant(page), false)).collect();
    assert_eq!(add(&mut m, 0, &entries[..STAGED_MAX]), OKAY);
    assert_eq!(m.queues[0].queue.staged(), STAGED_MAX);
    assert_eq!(add(&mut m, 0, &entries[STAGED_MAX..]), INVALID);
    for len in [513, 514, u32::MAX / 8 + 1, u32::MAX] {
        let list = list(&m, 0, len);
        assert_eq!(m.set(CtrlAsk::AddGrefMapping(list)), INVALID, "{len}");
        assert_eq!(m.ask(CtrlAsk::DelGrefMapping(list)), (INVALID, 0), "{len}");
    }
    assert_eq!(m.queues[0].queue.staged(), STAGED_MAX);
}

#[test]
fn gref_list_that_cannot_be_read_or_written_is_invalid() {
    let mut m = many(ALL, 1);
    let bad = GrefList { queue: 0, page: GrantRef(4000), len: 1 };
    assert_eq!(m.set(CtrlAsk::AddGrefMapping(bad)), INVALID);
    assert_eq!(m.ask(CtrlAsk::DelGrefMapping(bad)), (INVALID, 0));
    let no_queue = list(&m, 1, 1);
    assert_eq!(m.set(CtrlAsk::AddGrefMapping(no_queue)), INVALID);
    // A read-only list cannot hold the statuses; the pages are removed nevertheless.
    let entries = all(&m, 0);
    assert_eq!(add(&mut m, 0, &entries[..1]), OKAY);
    m.write_list(&entries[..1]);
    let domain = m.queues[0].guest.domain.clone();
    let page = domain.grant(common::BACK, &m.control.page, 0, Access::ReadOnly).unwrap();
    let list = GrefList { queue: 0, page, len: 1 };
    assert_eq!(m.ask(CtrlAsk::DelGrefMapping(list)), (INVALID, 1));
    assert_eq!(m.queues[0].queue.staged(), 0);
}

#[test]
fn page_staged_read_only_is_never_written() {
    let mut m = many(ALL, 1);
    let domain = m.queues[0].guest.domain.clone();
    let data = m.queues[0].guest.data.clone();
    let gref = domain.grant(common::BACK, &data, 5, Access::ReadOnly).unwrap();
    assert_eq!(
        add(&mut m, 0, &[entry(gref, false)]),
        INVALID,
        "writable staging of a read-only grant is rejected"
    );
    assert_eq!(add(&mut m, 0, &[entry(gref, true)]), OKAY);
    let setup = &mut m.queues[0];
    setup.guest.grefs[5] = gref;
    setup.guest.post(5..6);
    setup.inject(&pattern(60, 1), Offload::default());
    setup.poll();
    assert_eq!(setup.guest.received()[0].status, rsp::ERROR);
    assert_eq!(setup.guest.page(5, 60), [0; 60]);
    assert_eq!(setup.stats.staged(), 0);
}

#[test]
fn dropped_vif_unmaps_all_staged_pages() {
    let mut m = many(ALL, 2);
    for queue in 0..2 {
        let entries = all(&m, queue as usize);
        assert_eq!(add(&mut m, queue, &entries), OKAY);
    }
    let (back, front) = (m.queues[0].back.clone(), m.queues[0].guest.domain.clone());
    assert!(back.pages_mapped() >= 128);
    let grefs: Vec<_> = m.queues.iter().flat_map(|setup| setup.guest.grefs.clone()).collect();
    for setup in m.queues {
        drop(setup.queue);
    }
    assert_eq!(back.pages_mapped(), 0);
    grefs.iter().for_each(|gref| front.end_access(*gref).expect("page can be revoked"));
}

#[test]
fn staging_requests_if_disabled_are_not_supported() {
    let mut m = many_with(ALL, 1, false);
    let list = list(&m, 0, 1);
    for ask in [
        CtrlAsk::GetGrefMappingSize { queue: 0 },
        CtrlAsk::AddGrefMapping(list),
        CtrlAsk::DelGrefMapping(list),
    ] {
        assert_eq!(m.ask(ask), (CtrlStatus::NotSupported, 0));
    }
}
