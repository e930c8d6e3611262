//! Event channels between domains of one process.

mod support;

use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::{Access, DomId, GrantMapper, Granter};
use pvio_hosted::DomainConfig;
use pvio_ring::shm::{PAGE_SIZE, Part};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use support::{Host, LOST, flood, lockstep};

fn readable(channel: &impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&now)).unwrap() == 1
}

#[test]
fn event_wakes_once_and_is_taken_once() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let a = front.alloc_unbound(back.id()).unwrap();
    let b = back.bind_interdomain(front.id(), a.port()).unwrap();
    assert!(readable(&b) && b.take().unwrap(), "event is pending after bind");
    assert!(!readable(&b) && !b.take().unwrap());
    for _ in 0..3 {
        a.notify().unwrap();
    }
    assert!(readable(&b) && b.take().unwrap());
    assert!(!readable(&b) && !b.take().unwrap());
    b.notify().unwrap();
    assert!(a.wait(Some(LOST)).unwrap());
    assert!(!a.wait(Some(std::time::Duration::ZERO)).unwrap());
}

#[test]
fn unbound_port_is_bound_only_by_named_domain_and_once() {
    let host = Host::new();
    let [front, back, third] = ["front", "back", "third"].map(|name| host.domain(name));
    let a = front.alloc_unbound(back.id()).unwrap();
    let bad = |bound: Result<_, EventError>| bound.err().unwrap();
    assert_eq!(bad(third.bind_interdomain(front.id(), a.port())), EventError::BadPort);
    for port in [0, a.port().0 + 1, 4095, 4096, u32::MAX] {
        assert_eq!(bad(back.bind_interdomain(front.id(), Port(port))), EventError::BadPort);
    }
    assert_eq!(bad(back.bind_interdomain(DomId(300), a.port())), EventError::NoDomain);
    assert_eq!(bad(back.bind_interdomain(DomId::SELF, a.port())), EventError::NoDomain);
    assert_eq!(bad(front.alloc_unbound(DomId(300))), EventError::NoDomain);
    let b = back.bind_interdomain(front.id(), a.port()).unwrap();
    assert_eq!(bad(back.bind_interdomain(front.id(), a.port())), EventError::BadPort);
    assert_eq!(bad(front.bind_interdomain(back.id(), b.port())), EventError::BadPort);
}

#[test]
fn closed_channel_peer_ignores_events_and_can_be_rebound() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let a = front.alloc_unbound(back.id()).unwrap();
    assert!(!a.is_bound());
    a.notify().unwrap();
    for _ in 0..3 {
        let b = back.bind_interdomain(front.id(), a.port()).unwrap();
        assert!(a.is_bound() && b.is_bound());
        assert!(b.take().unwrap());
        a.notify().unwrap();
        b.notify().unwrap();
        assert!(a.wait(Some(LOST)).unwrap());
        drop(b);
        assert!(!a.is_bound());
        a.notify().unwrap();
    }
    // Conversely: the end that was allocated is closed, and the bound one can be bound to.
    let b = back.bind_interdomain(front.id(), a.port()).unwrap();
    drop(a);
    assert!(!b.is_bound());
    b.notify().unwrap();
    let a = front.bind_interdomain(back.id(), b.port()).unwrap();
    assert!(a.take().unwrap());
    b.take().unwrap();
    b.notify().unwrap();
    a.notify().unwrap();
    assert!(a.wait(Some(LOST)).unwrap() && b.wait(Some(LOST)).unwrap());
}

#[test]
fn channels_of_destroyed_domain_are_closed() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let a = front.alloc_unbound(back.id()).unwrap();
    let b = back.bind_interdomain(front.id(), a.port()).unwrap();
    host.hypervisor.destroy_domain(back.id()).unwrap();
    assert!(!a.is_bound());
    a.notify().unwrap();
    // The process of the destroyed domain can still make calls, which return errors.
    assert_eq!(back.alloc_unbound(front.id()).err(), Some(EventError::Hypervisor));
    drop(b);
    a.notify().unwrap();
}

#[test]
fn domain_binds_channel_to_itself() {
    let host = Host::new();
    let alone = host.domain("alone");
    let a = alone.alloc_unbound(alone.id()).unwrap();
    let b = alone.bind_interdomain(alone.id(), a.port()).unwrap();
    assert!(b.take().unwrap());
    a.notify().unwrap();
    assert!(b.take().unwrap() && !a.take().unwrap());
}

#[test]
fn ports_are_limited_by_configuration_and_reused_last() {
    let host = Host::new();
    let few =
        host.join(host.hypervisor.create_domain(DomainConfig::new("few").max_ports(3)).unwrap());
    let ends: Vec<_> = (0..3).map(|_| few.alloc_unbound(few.id()).unwrap()).collect();
    assert_eq!(few.alloc_unbound(few.id()).err(), Some(EventError::NoPorts));
    assert_eq!(few.bind_interdomain(few.id(), ends[0].port()).err(), Some(EventError::NoPorts));
    drop(ends);
    // Every number is used once before one is reused.
    let mut seen = std::collections::BTreeSet::from([1, 2, 3]);
    for _ in 0..4092 {
        assert!(seen.insert(few.alloc_unbound(few.id()).unwrap().port().0));
    }
    assert_eq!((seen.first(), seen.last(), seen.len()), (Some(&1), Some(&4095), 4095));
    assert_eq!(few.alloc_unbound(few.id()).unwrap().port(), Port(1));
}

#[test]
fn no_wakeup_is_lost_between_threads() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let page = front.alloc_pages(1).unwrap();
    let gref = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
    let a = front.alloc_unbound(back.id()).unwrap();
    let b = back.bind_interdomain(front.id(), a.port()).unwrap();
    let theirs = back.map(front.id(), &[gref], Access::ReadWrite).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| lockstep(&page, &a, true, 20_000));
        scope.spawn(|| lockstep(&theirs, &b, false, 20_000));
    });
}

#[test]
fn no_wakeup_is_lost_with_more_threads_than_cpus() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let page = front.alloc_pages(4).unwrap();
    // More threads than processors, so that they are preempted at every step.
    std::thread::scope(|scope| {
        for i in 0..4 {
            let part = Part::new(page.clone(), i * PAGE_SIZE, PAGE_SIZE).unwrap();
            let a = front.alloc_unbound(back.id()).unwrap();
            let b = back.bind_interdomain(front.id(), a.port()).unwrap();
            let theirs = part.clone();
            scope.spawn(move || flood(&part, &a, true, 2_000_000));
            scope.spawn(move || flood(&theirs, &b, false, 2_000_000));
        }
    });
}

#[test]
fn no_wakeup_is_lost_while_channel_is_rebound() {
    let host = Host::new();
    let (front, back) = (host.domain("front"), host.domain("back"));
    let a = front.alloc_unbound(back.id()).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    use std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                a.notify().unwrap();
            }
        });
        for _ in 0..2_000 {
            let b = back.bind_interdomain(front.id(), a.port()).unwrap();
            assert!(b.wait(Some(LOST)).unwrap(), "the first event");
            assert!(b.wait(Some(LOST)).unwrap(), "event of a later notification");
        }
        stop.store(true, SeqCst);
    });
}
