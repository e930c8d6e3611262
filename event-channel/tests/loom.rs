//! The pending bits of the two-level ABI with a wake-up, as the hosted platform uses them,
//! model-checked: the shipped [`EventPage`](pvio_event_channel::two_level::EventPage) on loom's
//! atomics.
//!
//! Run with `cargo xtask test loom`.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
#[test]
#[ignore = "SKIPPED: model checking needs RUSTFLAGS=\"--cfg loom\" and --release"]
fn model_checking_was_not_built() {}

#[cfg(loom)]
mod model {
    use core::convert::Infallible;
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::{Condvar, Mutex};
    use loom::thread;
    use pvio_event_channel::Port;
    use pvio_event_channel::two_level::EventPage;
    use pvio_ring::shm::ModelMemory;
    // Not loom's: dropping that one while a detected deadlock unwinds panics a second time.
    use std::sync::Arc;

    const PORT: Port = Port(7);
    /// Number of events of each sender.
    const EVENTS: [u32; 2] = [1, 2];

    /// The receiver's eventfd.
    #[derive(Default)]
    struct Wakeup {
        set: Mutex<bool>,
        changed: Condvar,
    }

    impl Wakeup {
        fn wake(&self) {
            *self.set.lock().unwrap() = true;
            self.changed.notify_one();
        }

        fn reset(&self) {
            *self.set.lock().unwrap() = false;
        }

        fn wait(&self) {
            let mut set = self.set.lock().unwrap();
            while !*set {
                set = self.changed.wait(set).unwrap();
            }
        }
    }

    /// Runs two senders, whose work has no ordering of its own, and a receiver that sleeps until it
    /// has seen the work of both.
    fn events(receive: fn(&EventPage<ModelMemory>, &Wakeup) -> bool) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let (memory, wakeup) = (ModelMemory::page(), Arc::new(Wakeup::default()));
            let work = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
            for n in 0..2 {
                let page = EventPage::new(memory.clone());
                let (wakeup, work) = (Arc::clone(&wakeup), Arc::clone(&work));
                thread::spawn(move || {
                    for done in 1..=EVENTS[n] {
                        work[n].store(done, Ordering::Relaxed);
                        page.send(PORT, || wakeup.wake());
                    }
                });
            }
            let page = EventPage::new(memory);
            let mut seen = 0;
            while seen < EVENTS.iter().sum() {
                wakeup.wait();
                // Without an event, the memory is not read.
                if receive(&page, &wakeup) {
                    seen = work.iter().map(|n| n.load(Ordering::Relaxed)).sum::<u32>();
                }
            }
        });
    }

    #[test]
    fn no_event_is_lost_and_its_memory_is_visible() {
        events(|page, wakeup| {
            let reset = || {
                wakeup.reset();
                Ok::<(), Infallible>(())
            };
            page.receive(PORT, reset).unwrap()
        });
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn event_is_lost_if_it_is_taken_before_the_wakeup_is_reset() {
        events(|page, wakeup| {
            let taken = page.take(PORT);
            wakeup.reset();
            taken
        });
    }
}
