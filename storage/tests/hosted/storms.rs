//! A guest that sends events without requests.

use crate::machine::{Machine, PATIENCE, image};
use pvio_blkback::Config;
use pvio_blkfront::SLOT_BYTES;
use pvio_event_channel::EventChannel;
use pvio_xenbus::handshake::vbd::Mode;
use std::time::{Duration, Instant};

#[test]
fn event_storm_without_requests_is_delayed_and_requests_are_still_served() {
    let machine = Machine::new(Config::default());
    let file = image(1 << 20);
    machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    let stats = &driver.stats;

    let (begin, wakeups) = (Instant::now(), stats.wakeups.get());
    let mut events = 0_u64;
    while begin.elapsed() < Duration::from_millis(600) {
        session.queue().unwrap().channel().notify().unwrap();
        events += 1;
        // As often as a guest could on another processor.
        std::thread::sleep(Duration::from_micros(20));
    }
    let (wakeups, delays) = (stats.wakeups.get() - wakeups, stats.delayed_events.get());
    // 1, 2, 4… 128 ms apart, after a few without delay; many more if they were not.
    assert!(events > 1000 && (8..32).contains(&wakeups), "{wakeups} wake-ups by {events} events");
    assert!((5..20).contains(&delays), "{delays} delays");

    // Requests wait for the rest of a delay at most, and end it.
    let mut got = vec![0; SLOT_BYTES];
    let begin = Instant::now();
    for _ in 0..200 {
        session.read_at(0, &mut got).unwrap();
    }
    assert!(got == std::fs::read(file.path()).unwrap()[..SLOT_BYTES]);
    assert!(begin.elapsed() < PATIENCE && stats.delayed_events.get() == delays);
    session.close().unwrap();
    driver.end();
}
