//! The control ring: staging grants, and backends with invalid responses.

mod common;
#[path = "common/control.rs"]
mod ctrl;

use common::{BACK, BACK_FEATURES, FRONT, pattern};
use ctrl::{good, hostile, pair};
use pvio_event_channel::EventChannel;
use pvio_grant_table::{Access, GrantMapper};
use pvio_netback::port::memory::loopback;
use pvio_netback::{Queue as Back, Stats};
use pvio_netfront::control::PATIENCE;
use pvio_netfront::{BackendFault, Checksum, Queue};
use pvio_ring::RingFault;
use pvio_ring::proto::netif::{CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, GrefEntry};
use pvio_ring::shm::Region;
use pvio_sim::LocalMachine;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[test]
fn all_pages_of_all_queues_are_staged_and_used() {
    let mut p = pair(true);
    p.echo();
    assert_eq!(p.stats.staged(), 0);
    p.settle();
    assert!(p.control.is_done());
    assert_eq!(p.control.staged(), 2 * 512);
    assert_eq!(p.backs[1].staged(), 512);
    let mapped = p.back.pages_mapped();
    for round in 1..100 {
        p.echo();
        // Three slots transmitted and three received, on two queues.
        assert_eq!(p.stats.staged(), round * 12);
        assert_eq!(p.back.pages_mapped(), mapped);
    }
    // A frontend cannot revoke grants that are mapped; it can when the backend is gone.
    let queue = p.fronts.remove(0).dismantle().unwrap_err();
    drop(p.backs);
    assert!(queue.dismantle().is_ok());
    drop((p.fronts, p.control));
    assert_eq!((p.front.pages_granted(), p.front.pages_allocated()), (0, 0));
}

#[test]
fn backend_without_staging_is_used_with_grant_copies() {
    let mut p = pair(false);
    p.settle();
    assert!(p.control.is_done());
    assert_eq!(p.control.staged(), 0);
    p.echo();
    assert_eq!(p.stats.staged(), 0);
}

#[test]
fn staging_request_lists_at_most_advertised_number_of_pages() {
    for (size, len) in [(1, 1), (511, 511), (512, 512), (513, 512), (u32::MAX, 512)] {
        let mut h = hostile();
        let request = h.asked();
        assert_eq!(request.ask(), Some(CtrlAsk::GetGrefMappingSize { queue: 0 }));
        h.answer(good(request, size)).unwrap();
        let request = h.asked();
        let Some(CtrlAsk::AddGrefMapping(list)) = request.ask() else { panic!("{request:?}") };
        assert_eq!((list.queue, list.len), (0, len));
        let page = h.back.map(FRONT, &[list.page], Access::ReadWrite).unwrap();
        let mut bytes = vec![0; len as usize * 8];
        page.read_bytes(0, &mut bytes).unwrap();
        let listed: Vec<_> =
            bytes.as_chunks().0.iter().map(|e| GrefEntry::from_bytes(*e)).collect();
        assert_eq!(listed, h.queues[0].staging_list().take(len as usize).collect::<Vec<_>>());
        h.answer(good(request, u32::MAX)).unwrap();
        assert!(h.control.is_done());
        assert_eq!(h.control.staged(), len as usize);
    }
}

#[test]
fn staging_stops_if_backend_rejects_it_or_reports_size_0() {
    for (status, data) in [(0, 0), (1, 5), (2, 5), (3, 5), (4, 5), (u32::MAX, 5)] {
        let mut h = hostile();
        let request = h.asked();
        h.answer(CtrlResponse { status, ..good(request, data) }).unwrap();
        assert!(h.control.is_done());
        assert_eq!(h.control.staged(), 0);
        assert!(h.ring.pop().unwrap().is_none());
    }
    let mut h = hostile();
    let request = h.asked();
    h.answer(good(request, 512)).unwrap();
    let request = h.asked();
    let status = CtrlStatus::InvalidParameter as u32;
    h.answer(CtrlResponse { status, ..good(request, 0) }).unwrap();
    assert!(h.control.is_done());
    assert_eq!(h.control.staged(), 0);
}

#[test]
fn malformed_control_response_is_backend_fault() {
    let lies: [fn(CtrlRequest) -> CtrlResponse; 3] = [
        |r| CtrlResponse { id: r.id.wrapping_add(1), ..good(r, 1) },
        |r| CtrlResponse { kind: 9, ..good(r, 1) },
        |_| CtrlResponse::default(),
    ];
    for lie in lies {
        let mut h = hostile();
        let answer = lie(h.asked());
        let fault = BackendFault::CtrlAnswer { id: answer.id, kind: answer.kind };
        assert_eq!(h.answer(answer), Err(fault));
        assert_eq!(h.control.step(&h.queues), Err(fault), "fault is permanent");
        assert_eq!((h.control.fault(), fault.code()), (Some(fault), "ctrl-wrong-answer"));
    }
    // The same response twice: no second request is outstanding.
    let mut h = hostile();
    let request = h.asked();
    h.push(good(request, 512));
    h.page.store_u32(8, 2, Ordering::SeqCst);
    let fault = RingFault::ProducerOverflow { prod: 2, ahead: 2, most: 1 };
    assert_eq!(h.control.step(&h.queues), Err(BackendFault::CtrlRing(fault)));
    // The response to the next request has another's id.
    let mut h = hostile();
    let request = h.asked();
    h.answer(good(request, 512)).unwrap();
    h.asked();
    let fault = BackendFault::CtrlAnswer { id: request.id, kind: request.kind };
    assert_eq!(h.answer(good(request, 512)), Err(fault));
    // More responses than requests.
    let mut h = hostile();
    h.asked();
    h.page.store_u32(8, 7, Ordering::SeqCst);
    let fault = RingFault::ProducerOverflow { prod: 7, ahead: 7, most: 1 };
    assert_eq!(h.control.step(&h.queues), Err(BackendFault::CtrlRing(fault)));
    assert_eq!(BackendFault::CtrlRing(fault).code(), "ctrl-ring-producer-overflow");
}

#[test]
fn unstage_releases_all_pages() {
    let mut p = pair(true);
    p.settle();
    let mapped = p.back.pages_mapped();
    p.echo();
    p.control.unstage();
    assert!(!p.control.is_done());
    p.settle();
    assert!(p.control.is_done());
    assert_eq!((p.control.staged(), p.control.not_unstaged()), (0, 0));
    assert_eq!(p.back.pages_mapped(), mapped - 2 * 512);
    let before = p.stats.staged();
    p.echo();
    assert_eq!(p.stats.staged(), before, "packet is received by grant copy");
    // All data pages are released, although the backend still exists.
    let queue = p.fronts.remove(0).dismantle().unwrap_err();
    assert_eq!(p.front.pages_granted(), 2 + (2 + 512) + 2, "rings, and the other queue");
    drop((p.backs, queue));
    // Unstaged while requests are sent: the pages staged until then are unstaged.
    let mut p = pair(true);
    p.control.step(&p.fronts).unwrap();
    let mut port = loopback(4);
    for _ in 0..3 {
        p.backs.iter_mut().for_each(|back| assert!(back.poll(&mut port, 8).is_ok()));
        p.control.step(&p.fronts).unwrap();
        p.control.unstage();
    }
    p.settle();
    assert!(p.control.is_done());
    assert_eq!(p.backs.iter().map(Back::staged).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(p.control.staged(), 0);
}

#[test]
fn failed_unstage_is_counted_and_not_retried() {
    type Lie = fn(&ctrl::Hostile, CtrlRequest) -> CtrlResponse;
    let cases: &[(Lie, usize)] = &[
        (|_, r| good(r, 512), 512),
        (|_, r| CtrlResponse { status: 2, ..good(r, 512) }, 512),
        (|_, r| CtrlResponse { status: u32::MAX, ..good(r, 0) }, 512),
        // Entries that report success, for some of the pages.
        (
            |h, r| {
                h.answer_entries(r, &[0; 512]);
                good(r, u32::MAX)
            },
            0,
        ),
        (
            |h, r| {
                h.answer_entries(r, &[0, 1, 2, 3, 4, u16::MAX]);
                good(r, 0)
            },
            511,
        ),
    ];
    for (at, (lie, left)) in cases.iter().enumerate() {
        let mut h = hostile();
        let request = h.asked();
        h.answer(good(request, 512)).unwrap();
        let request = h.asked();
        h.answer(good(request, 0)).unwrap();
        assert_eq!((h.control.is_done(), h.control.staged()), (true, 512));
        h.control.unstage();
        let request = h.asked();
        let Some(CtrlAsk::DelGrefMapping(list)) = request.ask() else { panic!("{request:?}") };
        assert_eq!((list.queue, list.len), (0, 512));
        let answer = lie(&h, request);
        h.answer(answer).unwrap();
        assert_eq!((h.control.staged(), h.control.not_unstaged()), (0, *left), "case {at}");
        assert!(h.control.is_done());
        assert!(h.ring.pop().unwrap().is_none());
    }
}

#[test]
fn missing_control_response_is_reported_after_timeout_and_blocks_nothing() {
    let mut h = hostile();
    h.control.set_clock(Duration::from_secs(100));
    let request = h.asked();
    for (at, silent) in [(0, false), (4999, false), (5000, true), (60_000, true)] {
        h.control.set_clock(Duration::from_secs(100) + Duration::from_millis(at));
        h.control.step(&h.queues).unwrap();
        assert_eq!((h.control.is_silent(), h.control.is_done()), (silent, false), "{at} ms");
    }
    assert_eq!(PATIENCE, Duration::from_secs(5));
    assert!(h.ring.pop().unwrap().is_none(), "no further request while one is outstanding");
    h.queues[0].send(&pattern(60, 1), Checksum::Unknown).unwrap();
    assert_eq!(h.queues[0].publish(), Ok(()));
    // A late response is accepted.
    h.answer(good(request, 512)).unwrap();
    assert!(!h.control.is_silent());
    assert!(matches!(h.asked().ask(), Some(CtrlAsk::AddGrefMapping(_))));
}

#[test]
fn control_response_sends_event_after_final_check() {
    let mut h = hostile();
    assert_eq!(h.control.final_check(), Ok(false), "final check without a request");
    for round in 0..2 {
        let request = h.asked();
        let _ = h.control.channel().take();
        assert_eq!(h.control.final_check(), Ok(false));
        h.push(good(request, 512));
        assert!(h.control.channel().is_pending(), "round {round}");
        assert_eq!(h.control.final_check(), Ok(true));
        h.control.step(&h.queues).unwrap();
    }
    h.page.store_u32(8, 77, Ordering::SeqCst);
    assert!(
        h.control.is_done() && h.control.final_check() == Ok(false),
        "ring is not read after the last response"
    );
}

#[test]
fn split_event_channels_wake_tx_and_rx_separately() {
    let machine = LocalMachine::new();
    let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
    let mut queue = Queue::with_channels(&front, BACK, true).unwrap();
    let rx_port = queue.rx_channel().expect("queue has its own rx channel").port();
    let refs = pvio_netback::queue::QueueRefs {
        tx_ring: queue.tx_gref(),
        rx_ring: queue.rx_gref(),
        events: pvio_netback::queue::EventPorts::Split { tx: queue.channel().port(), rx: rx_port },
    };
    let stats = Arc::new(Stats::default());
    let mut peer = Back::attach(back.clone(), FRONT, &refs, BACK_FEATURES, stats).unwrap();
    let mut port = loopback(8);
    queue.publish().unwrap();
    peer.take_events().unwrap();
    for round in 0..3 {
        assert_eq!(queue.final_check(), Ok(false));
        queue.send(&pattern(60, 1), Checksum::Unknown).unwrap();
        queue.publish().unwrap();
        while peer.poll(&mut port, 8).unwrap().any() {}
        assert!(queue.rx_channel().unwrap().is_pending(), "event for a received packet");
        // A new ring requests one event initially (ring.h); after that no notification is armed.
        assert_eq!(queue.channel().is_pending(), round == 0);
        for channel in queue.channels() {
            channel.take().unwrap();
        }
        assert_eq!(queue.receive(|frame, _| frame.len()), Ok(Some(60)));
    }
    assert_eq!(queue.channels().count(), 2);
}

#[test]
fn event_storm_without_responses_is_no_work() {
    let mut h = common::hostile();
    assert_eq!(h.front.final_check(), Ok(false));
    for _ in 0..10_000 {
        h.channel.notify().unwrap();
    }
    // Several events are merged into one: it is taken once, and no response is found.
    h.front.channel().take().unwrap();
    assert!(!h.front.channel().is_pending());
    assert_eq!(h.front.has_work(), Ok(false));
    assert_eq!(h.front.final_check(), Ok(false));
    assert_eq!(h.front.receive(|_, _| ()), Ok(None));
}
