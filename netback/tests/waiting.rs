//! A guest that posts no buffers: which packets wait, for how long, and what is reported to the
//! host. The test sets the queue's clock.

mod common;

use common::{ALL, Setup, drain, pattern, setup};
use pvio_netback::Features;
use pvio_netback::fault::DropReason;
use pvio_netback::port::Offload;
use pvio_netback::queue::{DRAIN, DRAIN_UNSEEN, Reception, STALL};
use std::time::Duration;

const MOMENT: Duration = Duration::from_millis(1);

fn at(s: &mut Setup, now: Duration) -> Option<Reception> {
    s.queue.set_clock(now);
    while s.poll().any() {}
    s.queue.tick(&mut s.port).unwrap()
}

fn send(s: &mut Setup, len: usize) {
    s.inject(&pattern(len, 1), Offload::default());
}

#[test]
fn backlogged_packet_is_dropped_after_drain_timeout() {
    for (rx_notify, patience) in [(true, DRAIN), (false, DRAIN_UNSEEN)] {
        let mut s = setup(Features { rx_notify, ..ALL });
        assert_eq!(s.queue.deadline(), None);
        send(&mut s, 60);
        at(&mut s, MOMENT);
        send(&mut s, 61);
        at(&mut s, 2 * MOMENT);
        assert_eq!(s.queue.deadline(), Some(MOMENT + patience));
        at(&mut s, patience);
        assert_eq!(s.queue.backlog(), 2);
        at(&mut s, MOMENT + patience);
        assert_eq!((s.queue.backlog(), s.stats.dropped(DropReason::RxNoBuffers)), (1, 1));
        assert_eq!(s.queue.deadline(), Some(2 * MOMENT + patience));
        // Buffers are posted before the deadline.
        s.guest.post(0..1);
        at(&mut s, 2 * MOMENT + patience);
        assert_eq!(s.guest.received()[0].status, 61);
        assert_eq!((s.queue.deadline(), s.stats.dropped_in_all()), (None, 1));
    }
}

/// Sends a packet every second until a change is reported.
fn until_told(s: &mut Setup, from: u64) -> (u64, Reception) {
    for second in from..from + 1000 {
        drain(&mut s.port);
        send(s, 9000);
        if let Some(told) = at(s, Duration::from_secs(second)) {
            return (second, told);
        }
    }
    panic!("no reception state is reported");
}

#[test]
fn guest_without_buffers_for_stall_timeout_is_stalled_until_it_posts() {
    let mut s = setup(ALL);
    let begin = 5;
    assert_eq!(until_told(&mut s, begin), (begin + STALL.as_secs(), Reception::Stalled));
    // Waiting packets are dropped after their deadline; the stall does not depend on them.
    let later = Duration::from_secs(begin) + STALL + 2 * DRAIN;
    assert_eq!(at(&mut s, later), None);
    assert_eq!((s.queue.backlog(), s.queue.deadline()), (0, None));
    // The queue wakes for three buffers, as many as the first packet needed when the guest stalled.
    assert_eq!(s.queue.final_check(), Ok(false));
    assert!(!s.guest.post(0..2));
    assert_eq!(at(&mut s, later), None);
    assert!(s.guest.post(2..3));
    assert_eq!(s.queue.final_check(), Ok(true));
    assert_eq!(at(&mut s, later), Some(Reception::Ready));
    assert_eq!(s.queue.final_check(), Ok(false));
    send(&mut s, 60);
    assert_eq!(at(&mut s, later), None);
    assert_eq!(s.guest.received().len(), 1);
    // The guest can stall again later.
    let seconds = later.as_secs();
    assert_eq!(until_told(&mut s, seconds), (seconds + STALL.as_secs(), Reception::Stalled));
}

#[test]
fn slow_guest_is_not_reported_as_stalled() {
    let mut s = setup(ALL);
    for minute in 0..60 {
        let begin = Duration::from_secs(60 * minute);
        drain(&mut s.port);
        send(&mut s, 60);
        assert_eq!(at(&mut s, begin), None);
        s.guest.post(0..1);
        assert_eq!(at(&mut s, begin + DRAIN - MOMENT), None);
        assert_eq!(s.guest.received().len(), 1);
    }
    // Without `feature-rx-notify`, a guest that posts buffers cannot be distinguished from a
    // stalled one.
    let mut s = setup(Features { rx_notify: false, ..ALL });
    for second in 0..200 {
        drain(&mut s.port);
        send(&mut s, 60);
        assert_eq!(at(&mut s, Duration::from_secs(second)), None);
    }
}
