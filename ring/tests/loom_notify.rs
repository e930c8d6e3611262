//! The notification protocol of [`pvio_ring::indices`], model-checked: the code under test is the
//! production code, on loom's atomics instead of a shared page. Loom explores every interleaving
//! and every value that the memory model allows a load to return.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p pvio-ring --test loom_notify --release`.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
#[test]
#[ignore = "SKIPPED: model checking needs RUSTFLAGS=\"--cfg loom\" and --release"]
fn model_checking_was_not_built() {}

#[cfg(loom)]
mod model {
    use loom::sync::Notify;
    use loom::sync::atomic::{AtomicU32, Ordering, fence};
    use loom::thread;
    use pvio_ring::indices::{IndexMemory, ask_for_event, publish};
    // Not loom's: dropping that one while a detected deadlock unwinds panics a second time.
    use std::sync::Arc;

    /// Number of slots of the model's ring: none is reused, because the one-way models have no
    /// responses.
    const SLOTS: usize = 4;

    /// One direction of a ring.
    struct Direction {
        prod: AtomicU32,
        event: AtomicU32,
        slots: [AtomicU32; SLOTS],
        /// The event channel: one wake-up for one or more notifications, now or at the next wait.
        channel: Notify,
    }

    impl Direction {
        fn new(start: u32) -> Self {
            Self {
                prod: AtomicU32::new(start),
                event: AtomicU32::new(start.wrapping_add(1)),
                slots: core::array::from_fn(|_| AtomicU32::new(0)),
                channel: Notify::new(),
            }
        }

        fn slot(&self, index: u32) -> &AtomicU32 {
            &self.slots[index as usize % SLOTS]
        }
    }

    /// The parts of the protocol, each of which can be left out.
    #[derive(Clone, Copy)]
    struct Parts {
        producer_fence: bool,
        consumer_fence: bool,
        final_check: bool,
        release: bool,
        acquire: bool,
    }

    const WHOLE: Parts = Parts {
        producer_fence: true,
        consumer_fence: true,
        final_check: true,
        release: true,
        acquire: true,
    };

    /// A direction as used by one side.
    struct View<'a> {
        shared: &'a Direction,
        fence: bool,
        parts: Parts,
    }

    /// The orderings are those of `directions.rs`, the implementation for real memory.
    impl IndexMemory for View<'_> {
        fn load_prod(&self) -> u32 {
            let order = if self.parts.acquire { Ordering::Acquire } else { Ordering::Relaxed };
            self.shared.prod.load(order)
        }

        fn store_prod(&self, value: u32) {
            let order = if self.parts.release { Ordering::Release } else { Ordering::Relaxed };
            self.shared.prod.store(value, order);
        }

        fn load_event(&self) -> u32 {
            self.shared.event.load(Ordering::Relaxed)
        }

        fn store_event(&self, value: u32) {
            self.shared.event.store(value, Ordering::Relaxed);
        }

        fn fence(&self) {
            if self.fence {
                fence(Ordering::SeqCst);
            }
        }
    }

    /// Produces one item that contains its own number.
    fn produce(shared: &Direction, parts: Parts, index: u32, value: u32) {
        shared.slot(index).store(value, Ordering::Relaxed);
        let mem = View { shared, fence: parts.producer_fence, parts };
        if publish(&mem, index, index.wrapping_add(1)) {
            shared.channel.notify();
        }
    }

    /// Waits until an item after `cons` is available, as a consumer must, and returns the producer
    /// index.
    fn await_more(shared: &Direction, parts: Parts, cons: u32) -> u32 {
        let mem = View { shared, fence: parts.consumer_fence, parts };
        loop {
            let prod = mem.load_prod();
            if prod != cons {
                return prod;
            }
            let prod = ask_for_event(&mem, cons);
            if parts.final_check && prod != cons {
                return prod;
            }
            shared.channel.wait();
        }
    }

    /// Explores every interleaving, or (if there are too many) every one in which threads are
    /// preempted at most `preemptions` times.
    fn check(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemptions;
        builder.check(model);
    }

    /// Sends `items` in one direction, each published separately; the consumer sleeps whenever that
    /// is allowed.
    fn one_way(parts: Parts, start: u32, items: u32) {
        check(if items > 2 { Some(3) } else { None }, move || {
            let shared = Arc::new(Direction::new(start));
            let producer = {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    for i in 0..items {
                        produce(&shared, parts, start.wrapping_add(i), i + 1);
                    }
                })
            };
            let mut taken = 0;
            while taken < items {
                let prod = await_more(&shared, parts, start.wrapping_add(taken));
                while start.wrapping_add(taken) != prod {
                    let slot = shared.slot(start.wrapping_add(taken));
                    assert_eq!(slot.load(Ordering::Relaxed), taken + 1, "an item not yet written");
                    taken += 1;
                }
            }
            producer.join().unwrap();
        });
    }

    /// Sends requests and responses in lock step: both sides sleep.
    fn both_ways(parts: Parts, start: u32, items: u32) {
        check(Some(3), move || {
            let requests = Arc::new(Direction::new(start));
            let responses = Arc::new(Direction::new(start));
            let back = {
                let (requests, responses) = (Arc::clone(&requests), Arc::clone(&responses));
                thread::spawn(move || {
                    for i in 0..items {
                        let at = start.wrapping_add(i);
                        await_more(&requests, parts, at);
                        let asked = requests.slot(at).load(Ordering::Relaxed);
                        produce(&responses, parts, at, asked + 100);
                    }
                })
            };
            for i in 0..items {
                let at = start.wrapping_add(i);
                produce(&requests, parts, at, i);
                await_more(&responses, parts, at);
                assert_eq!(responses.slot(at).load(Ordering::Relaxed), i + 100);
            }
            back.join().unwrap();
        });
    }

    #[test]
    fn no_wakeup_is_lost_from_index_0() {
        one_way(WHOLE, 0, 2);
    }

    #[test]
    fn no_wakeup_is_lost_with_three_items() {
        one_way(WHOLE, u32::MAX - 1, 3);
    }

    #[test]
    fn no_wakeup_is_lost_across_index_wrap() {
        one_way(WHOLE, u32::MAX, 2);
    }

    #[test]
    fn no_wakeup_is_lost_in_either_direction() {
        both_ways(WHOLE, u32::MAX, 2);
    }

    // Each part is necessary: without it, the same model fails. This also shows that the models
    // above can fail.

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_producer_fence() {
        one_way(Parts { producer_fence: false, ..WHOLE }, 0, 2);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_consumer_fence() {
        one_way(Parts { consumer_fence: false, ..WHOLE }, 0, 2);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_final_check() {
        one_way(Parts { final_check: false, ..WHOLE }, 0, 2);
    }

    #[test]
    #[should_panic(expected = "an item not yet written")]
    fn item_is_read_too_early_without_release_store() {
        one_way(Parts { release: false, ..WHOLE }, 0, 2);
    }

    #[test]
    #[should_panic(expected = "an item not yet written")]
    fn item_is_read_too_early_without_acquire_load() {
        one_way(Parts { acquire: false, ..WHOLE }, 0, 2);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_fence_in_bounded_model() {
        both_ways(Parts { producer_fence: false, ..WHOLE }, u32::MAX, 2);
    }
}
