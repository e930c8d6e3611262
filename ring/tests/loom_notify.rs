//! The notification protocol of [`pvio_ring::indices`], model-checked: the shipped [`FrontRing`] and
//! [`BackRing`] run on memory whose index words are loom's atomics, with the orderings of their
//! source. Loom explores every interleaving and every value that the memory model allows a load to
//! return.
//!
//! Run with `cargo xtask test loom`.
//!
//! [`FrontRing`]: pvio_ring::FrontRing
//! [`BackRing`]: pvio_ring::BackRing
#![forbid(unsafe_code)]

#[cfg(not(loom))]
#[test]
#[ignore = "SKIPPED: model checking needs RUSTFLAGS=\"--cfg loom\" and --release"]
fn model_checking_was_not_built() {}

#[cfg(loom)]
mod model {
    use loom::sync::Notify;
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::thread;
    use pvio_ring::shm::{ModelMemory, Weakened};
    use pvio_ring::{BackRing, FrontRing};
    // Not loom's: dropping that one while a detected deadlock unwinds panics a second time.
    use std::sync::Arc;

    /// Size of a slot for a ring of four slots in a page.
    const SLOT_SIZE: usize = 512;
    const SLOTS: usize = 4;

    /// What both sides of a ring share.
    struct Shared {
        memory: ModelMemory,
        requests: Direction,
        responses: Direction,
    }

    /// One direction of a ring, except for its indices.
    struct Direction {
        /// Contents of the slots. Relaxed: the orderings of the indices must make them visible.
        items: [AtomicU32; SLOTS],
        /// The event channel: one wake-up for one or more notifications, now or at the next wait.
        channel: Notify,
    }

    impl Direction {
        fn new() -> Self {
            let items = core::array::from_fn(|_| AtomicU32::new(0));
            Self { items, channel: Notify::new() }
        }

        fn item(&self, index: u32) -> &AtomicU32 {
            &self.items[index as usize % SLOTS]
        }
    }

    impl Shared {
        /// Returns an empty ring whose next index is `start`, and its frontend.
        fn new(start: u32, weakened: Weakened) -> (Arc<Self>, Front) {
            let memory = ModelMemory::page();
            let ring = FrontRing::init_at(memory.weakened(weakened), SLOT_SIZE, start).unwrap();
            let (requests, responses) = (Direction::new(), Direction::new());
            let shared = Arc::new(Self { memory, requests, responses });
            (Arc::clone(&shared), Front { ring, next: start, shared })
        }
    }

    struct Front {
        ring: FrontRing<ModelMemory>,
        /// Index of the next response.
        next: u32,
        shared: Arc<Shared>,
    }

    impl Front {
        /// Writes requests of these values and publishes them together.
        fn send(&mut self, values: &[u32]) {
            for value in values {
                let item = self.shared.requests.item(self.ring.next_index());
                item.store(*value, Ordering::Relaxed);
                self.ring.push(&[]).unwrap();
            }
            if self.ring.publish() {
                self.shared.requests.channel.notify();
            }
        }

        /// Waits for the next response and returns its value.
        fn receive(&mut self) -> u32 {
            while self.ring.pop().unwrap().is_none() {
                if !self.ring.final_check().unwrap() {
                    self.shared.responses.channel.wait();
                }
            }
            let value = self.shared.responses.item(self.next).load(Ordering::Relaxed);
            self.next = self.next.wrapping_add(1);
            value
        }
    }

    /// How a backend waits for requests.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Wait {
        FinalCheck,
        /// With the check for a number of requests.
        For(u32),
        /// Without regard to the result of the check.
        Unchecked,
    }

    struct Back {
        ring: BackRing<ModelMemory>,
        /// Index of the next request.
        next: u32,
        shared: Arc<Shared>,
    }

    impl Back {
        fn new(shared: &Arc<Shared>, start: u32, weakened: Weakened) -> Self {
            let memory = shared.memory.weakened(weakened);
            let ring = BackRing::attach(memory, SLOT_SIZE).unwrap();
            Self { ring, next: start, shared: Arc::clone(shared) }
        }

        /// Waits until requests are available, and takes the first.
        fn receive(&mut self, wait: Wait) -> u32 {
            let needed = if let Wait::For(needed) = wait { needed } else { 1 };
            loop {
                // As a poll does: no shared memory is read while there are known requests.
                if self.ring.waiting() < needed && self.ring.look().unwrap() < needed {
                    let found = match wait {
                        Wait::FinalCheck => self.ring.final_check().unwrap(),
                        Wait::For(needed) => self.ring.final_check_for(needed).unwrap(),
                        Wait::Unchecked => self.ring.final_check().unwrap() && false,
                    };
                    if !found {
                        self.shared.requests.channel.wait();
                    }
                    continue;
                }
                self.ring.pop().unwrap().unwrap();
                let value = self.shared.requests.item(self.next).load(Ordering::Relaxed);
                self.next = self.next.wrapping_add(1);
                return value;
            }
        }

        /// Writes a response and publishes it.
        fn send(&mut self, value: u32) {
            let item = self.shared.responses.item(self.ring.produced());
            item.store(value, Ordering::Relaxed);
            self.ring.push(&[]).unwrap();
            if self.ring.publish() {
                self.shared.responses.channel.notify();
            }
        }
    }

    /// Explores every interleaving, or (if there are too many) every one in which threads are
    /// preempted at most `preemptions` times.
    fn check(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemptions;
        builder.check(model);
    }

    /// Sends requests in batches; the backend sleeps whenever that is allowed.
    fn requests(batches: &'static [u32], start: u32, wait: Wait, front: Weakened, back: Weakened) {
        let all: u32 = batches.iter().sum();
        check(if all > 2 { Some(3) } else { None }, move || {
            let (shared, mut front) = Shared::new(start, front);
            let mut back = Back::new(&shared, start, back);
            let front = thread::spawn(move || {
                let mut sent = 0;
                for batch in batches {
                    let values: Vec<u32> = (sent + 1..=sent + batch).collect();
                    front.send(&values);
                    sent += batch;
                }
            });
            for taken in 0..all {
                // The requests that a packet needs are the last ones here.
                let wait = match wait {
                    Wait::For(needed) => Wait::For(needed.min(all - taken)),
                    other => other,
                };
                assert_eq!(back.receive(wait), taken + 1, "an item not yet written");
            }
            front.join().unwrap();
        });
    }

    /// Sends requests and responses in lock step: both sides sleep.
    fn both_ways(start: u32, items: u32, front: Weakened, back: Weakened) {
        check(Some(3), move || {
            let (shared, mut front) = Shared::new(start, front);
            let mut back = Back::new(&shared, start, back);
            let back = thread::spawn(move || {
                for _ in 0..items {
                    let request = back.receive(Wait::FinalCheck);
                    back.send(request + 100);
                }
            });
            for value in 1..=items {
                front.send(&[value]);
                assert_eq!(front.receive(), value + 100, "an item not yet written");
            }
            back.join().unwrap();
        });
    }

    use Weakened::{Fences, Loads, Nothing, Stores};

    #[test]
    fn no_wakeup_is_lost_from_index_0() {
        requests(&[1, 1], 0, Wait::FinalCheck, Nothing, Nothing);
    }

    #[test]
    fn no_wakeup_is_lost_with_three_items() {
        requests(&[1, 1, 1], u32::MAX - 1, Wait::FinalCheck, Nothing, Nothing);
    }

    #[test]
    fn no_wakeup_is_lost_across_index_wrap() {
        requests(&[1, 1], u32::MAX, Wait::FinalCheck, Nothing, Nothing);
    }

    #[test]
    fn no_wakeup_is_lost_while_two_requests_are_needed() {
        requests(&[1, 1], u32::MAX, Wait::For(2), Nothing, Nothing);
    }

    #[test]
    fn no_wakeup_is_lost_while_two_requests_are_needed_of_a_batch() {
        requests(&[1, 2], u32::MAX - 1, Wait::For(2), Nothing, Nothing);
        requests(&[2, 1], 0, Wait::For(2), Nothing, Nothing);
    }

    #[test]
    fn no_wakeup_is_lost_in_either_direction() {
        both_ways(u32::MAX, 2, Nothing, Nothing);
    }

    // Each ordering is necessary: without it, the same model fails. This also shows that the models
    // above can fail.

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_producer_fence() {
        requests(&[1, 1], 0, Wait::FinalCheck, Fences, Nothing);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_consumer_fence() {
        requests(&[1, 1], 0, Wait::FinalCheck, Nothing, Fences);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_for_two_requests_is_lost_without_producer_fence() {
        requests(&[1, 1], 0, Wait::For(2), Fences, Nothing);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_for_two_requests_is_lost_without_consumer_fence() {
        requests(&[1, 1], 0, Wait::For(2), Nothing, Fences);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_final_check() {
        requests(&[1, 1], 0, Wait::Unchecked, Nothing, Nothing);
    }

    #[test]
    #[should_panic(expected = "an item not yet written")]
    fn item_is_read_too_early_without_release_store() {
        requests(&[1, 1], 0, Wait::FinalCheck, Stores, Nothing);
    }

    #[test]
    #[should_panic(expected = "an item not yet written")]
    fn item_is_read_too_early_without_acquire_load() {
        requests(&[1, 1], 0, Wait::FinalCheck, Nothing, Loads);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_frontend_fences_in_bounded_model() {
        both_ways(u32::MAX, 2, Fences, Nothing);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn wakeup_is_lost_without_backend_fences_in_bounded_model() {
        both_ways(u32::MAX, 2, Nothing, Fences);
    }

    #[test]
    #[should_panic(expected = "an item not yet written")]
    fn response_is_read_too_early_without_release_store() {
        both_ways(0, 1, Nothing, Stores);
    }

    #[test]
    #[should_panic(expected = "an item not yet written")]
    fn response_is_read_too_early_without_acquire_load() {
        both_ways(0, 1, Loads, Nothing);
    }
}
