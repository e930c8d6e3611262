//! Both sides of a ring against a model queue: any interleaving, any geometry, from index 0 and
//! across the wrap at 2³². Every item arrives once, in order, and a side that announced that it
//! sleeps always gets a notification.
#![forbid(unsafe_code)]

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_ring::{BackRing, FrontRing, Full, RingLayout};
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The frontend writes up to this number of requests.
    Push(u16),
    /// The frontend publishes its requests.
    PublishRequests,
    /// The backend takes up to this number of requests.
    Pop(u16),
    /// The backend completes up to this number of requests; the seed selects which outstanding
    /// ones.
    Respond(u16, u16),
    /// The backend publishes its responses.
    PublishResponses,
    /// The frontend takes up to this number of responses.
    PopResponses(u16),
    /// The backend makes the final check.
    BackendChecks,
    /// The frontend makes the final check.
    FrontendChecks,
    /// The backend checks for requests without taking any.
    Peek,
    /// The backend exits after publishing its responses, and another replaces it.
    Reattach,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let few = || prop_oneof![4 => 1_u16..6, 2 => 6_u16..40, 1 => Just(2000_u16)];
    proptest::collection::vec(
        prop_oneof![
            4 => few().prop_map(Step::Push),
            4 => Just(Step::PublishRequests),
            4 => few().prop_map(Step::Pop),
            4 => (few(), any::<u16>()).prop_map(|(n, seed)| Step::Respond(n, seed)),
            4 => Just(Step::PublishResponses),
            4 => few().prop_map(Step::PopResponses),
            3 => Just(Step::BackendChecks),
            3 => Just(Step::FrontendChecks),
            1 => Just(Step::Peek),
            1 => Just(Step::Reattach),
        ],
        1..120,
    )
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        (0_u32..2100).prop_map(|back| 0_u32.wrapping_sub(back)),
        (0_u32..2100).prop_map(|back| (1_u32 << 31).wrapping_sub(back)),
        any::<u32>()
    ]
}

/// The model of one direction: indices in `u64`, which do not wrap.
#[derive(Debug, Default)]
struct Direction {
    published: u64,
    consumed: u64,
    /// The event index.
    event: u64,
    /// The final check allowed the consumer to wait, and no notification has been sent since.
    asleep: bool,
}

impl Direction {
    fn new() -> Self {
        Self { event: 1, ..Self::default() }
    }

    /// Publishes `count` more items; `notified` is the result of the ring.
    fn publish(&mut self, count: usize, notified: bool) -> TestCaseResult {
        let old = self.published;
        self.published += count as u64;
        if self.asleep && count > 0 {
            prop_assert!(notified, "sleeping side is not woken");
        }
        let asked = (old + 1..=self.published).contains(&self.event);
        prop_assert_eq!(
            notified,
            asked,
            "event {} in {}..={}",
            self.event,
            old + 1,
            self.published
        );
        self.asleep &= !notified;
        Ok(())
    }

    fn final_check(&mut self, more: bool) -> TestCaseResult {
        prop_assert_eq!(more, self.published != self.consumed, "the final check");
        if !more {
            self.event = self.consumed + 1;
            self.asleep = true;
        }
        Ok(())
    }
}

struct Machine {
    mem: HeapMemory,
    front: FrontRing<HeapMemory>,
    back: BackRing<HeapMemory>,
    layout: RingLayout,
    /// Whether requests complete in order, so that a new backend finds the others in their slots.
    in_order: bool,
    next_seq: u64,
    /// Sequence numbers in transit, in the order in which they must arrive.
    written: VecDeque<u64>,
    shown: VecDeque<u64>,
    open: VecDeque<u64>,
    answered: VecDeque<u64>,
    answers_shown: VecDeque<u64>,
    requests: Direction,
    responses: Direction,
}

/// Returns the bytes of item `seq`: none of its words repeats in adjacent items.
fn bytes_of(seq: u64, len: usize, salt: u8) -> Vec<u8> {
    let mut bytes = seq.to_le_bytes().to_vec();
    bytes.extend((8..len).map(|i| (seq as u8).wrapping_mul(31).wrapping_add(i as u8) ^ salt));
    bytes.truncate(len);
    bytes
}

impl Machine {
    fn new(slot_size: usize, pages: usize, start: u32, in_order: bool) -> Self {
        let mem = HeapMemory::pages(pages);
        let front = FrontRing::init_at(mem.clone(), slot_size, start).expect("a possible geometry");
        let back = BackRing::attach(mem.clone(), slot_size).expect("an honest ring");
        let layout = RingLayout::new(pages * PAGE_SIZE, slot_size).expect("a possible geometry");
        assert_eq!(front.layout(), layout);
        assert_eq!(back.layout(), layout);
        Self {
            mem,
            front,
            back,
            layout,
            in_order,
            next_seq: 1,
            written: VecDeque::new(),
            shown: VecDeque::new(),
            open: VecDeque::new(),
            answered: VecDeque::new(),
            answers_shown: VecDeque::new(),
            requests: Direction::new(),
            responses: Direction::new(),
        }
    }

    fn in_flight(&self) -> usize {
        self.written.len()
            + self.shown.len()
            + self.open.len()
            + self.answered.len()
            + self.answers_shown.len()
    }

    fn push(&mut self, count: u16) -> TestCaseResult {
        let size = self.layout.slot_size();
        for _ in 0..count {
            let full = self.in_flight() == self.layout.slots() as usize;
            prop_assert_eq!(self.front.in_flight() as usize, self.in_flight());
            prop_assert_eq!(self.front.free() == 0, full);
            let pushed = self.front.push(&bytes_of(self.next_seq, size, 0x55));
            prop_assert_eq!(pushed, if full { Err(Full) } else { Ok(()) });
            if full {
                break;
            }
            self.written.push_back(self.next_seq);
            self.next_seq += 1;
        }
        prop_assert_eq!(self.front.push(&vec![0; size + 1]), Err(Full), "more than a slot");
        Ok(())
    }

    fn pop(&mut self, count: u16) -> TestCaseResult {
        for _ in 0..count {
            let mut got = vec![0; self.layout.slot_size()];
            let expected = self.shown.pop_front();
            match self.back.pop().map_err(|e| TestCaseError::fail(e.to_string()))? {
                None => prop_assert_eq!(expected, None, "a request was not seen"),
                Some(mut slot) => {
                    slot.read(&mut got).expect("a whole slot");
                    prop_assert_eq!(slot.remaining(), 0);
                    prop_assert!(slot.read(&mut [0]).is_err(), "a byte past the slot");
                    let seq = expected.ok_or_else(|| TestCaseError::fail("a request too many"))?;
                    prop_assert_eq!(got, bytes_of(seq, self.layout.slot_size(), 0x55));
                    self.open.push_back(seq);
                    self.requests.consumed += 1;
                }
            }
            if expected.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn respond(&mut self, count: u16, seed: u16) -> TestCaseResult {
        let size = self.layout.slot_size();
        for i in 0..count {
            prop_assert_eq!(self.back.unanswered() as usize, self.open.len());
            if self.open.is_empty() {
                prop_assert_eq!(self.back.push(&[0; 8]), Err(Full), "response without a request");
                break;
            }
            let which = if self.in_order { 0 } else { usize::from(seed ^ i) % self.open.len() };
            let seq = self.open.remove(which).expect("in range");
            self.back.push(&bytes_of(seq, size, 0xaa)).expect("a request is open");
            self.answered.push_back(seq);
        }
        Ok(())
    }

    fn pop_responses(&mut self, count: u16) -> TestCaseResult {
        for _ in 0..count {
            let mut got = vec![0; self.layout.slot_size()];
            let expected = self.answers_shown.pop_front();
            match self.front.pop().map_err(|e| TestCaseError::fail(e.to_string()))? {
                None => prop_assert_eq!(expected, None, "a response was not seen"),
                Some(mut slot) => {
                    slot.read(&mut got).expect("a whole slot");
                    let seq = expected.ok_or_else(|| TestCaseError::fail("a response too many"))?;
                    prop_assert_eq!(got, bytes_of(seq, self.layout.slot_size(), 0xaa));
                    self.responses.consumed += 1;
                }
            }
            if expected.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn publish_responses(&mut self) -> TestCaseResult {
        let count = self.answered.len();
        let notified = self.back.publish();
        self.answers_shown.append(&mut self.answered);
        self.responses.publish(count, notified)
    }

    fn step(&mut self, step: Step) -> TestCaseResult {
        let honest = "an honest peer";
        match step {
            Step::Push(count) => self.push(count),
            Step::PublishRequests => {
                let count = self.written.len();
                let notified = self.front.publish();
                self.shown.append(&mut self.written);
                self.requests.publish(count, notified)
            }
            Step::Pop(count) => self.pop(count),
            Step::Respond(count, seed) => self.respond(count, seed),
            Step::PublishResponses => self.publish_responses(),
            Step::PopResponses(count) => self.pop_responses(count),
            Step::BackendChecks => {
                self.requests.final_check(self.back.final_check().expect(honest))
            }
            Step::FrontendChecks => {
                self.responses.final_check(self.front.final_check().expect(honest))
            }
            Step::Peek => {
                prop_assert_eq!(self.back.has_requests().expect(honest), !self.shown.is_empty());
                prop_assert_eq!(self.back.look().expect(honest) as usize, self.shown.len());
                prop_assert_eq!(
                    self.front.look().expect(honest) as usize,
                    self.answers_shown.len()
                );
                prop_assert_eq!(
                    self.front.has_responses().expect(honest),
                    !self.answers_shown.is_empty()
                );
                Ok(())
            }
            Step::Reattach => self.reattach(),
        }
    }

    /// A new backend gets the requests that were taken and have no response, and no others.
    fn reattach(&mut self) -> TestCaseResult {
        if !self.in_order {
            return Ok(());
        }
        self.publish_responses()?;
        self.back = BackRing::attach(self.mem.clone(), self.layout.slot_size())
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
        self.requests.consumed -= self.open.len() as u64;
        self.open.append(&mut self.shown);
        core::mem::swap(&mut self.open, &mut self.shown);
        prop_assert_eq!(self.back.waiting() as usize, self.shown.len());
        // The new backend is awake, whether or not the previous one slept.
        self.requests.asleep = false;
        Ok(())
    }

    /// Transfers all items in transit.
    fn drain(&mut self) -> TestCaseResult {
        for step in [
            Step::PublishRequests,
            Step::Pop(u16::MAX),
            Step::BackendChecks,
            Step::Respond(u16::MAX, 7),
            Step::PublishResponses,
            Step::PopResponses(u16::MAX),
            Step::FrontendChecks,
        ] {
            self.step(step)?;
        }
        prop_assert_eq!(self.in_flight(), 0);
        prop_assert_eq!(self.responses.consumed, self.next_seq - 1);
        prop_assert_eq!(self.front.free(), self.layout.slots());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn ring_delivers_every_item_once_in_order_and_wakes_sleepers(
        slot_size in prop::sample::select(vec![8_usize, 12, 16, 108, 112]),
        pages in 1_usize..=32,
        start in start(),
        in_order: bool,
        steps in steps(),
    ) {
        let mut machine = Machine::new(slot_size, pages, start, in_order);
        for step in steps {
            machine.step(step)?;
        }
        machine.drain()?;
        // Again with the ring completely filled, two times around.
        for _ in 0..2 {
            machine.step(Step::Push(u16::MAX))?;
            machine.drain()?;
        }
    }
}

/// Fixed cases: one request at a time, every power-of-two number of pages, across the wrap.
#[test]
fn single_requests_pass_across_index_wrap() {
    for pages in [1, 2, 4, 8, 16, 32] {
        for slot_size in [8, 12, 16, 108, 112] {
            let mut machine = Machine::new(slot_size, pages, 0_u32.wrapping_sub(40), true);
            for _ in 0..80 {
                machine.step(Step::Push(1)).unwrap();
                machine.drain().unwrap();
            }
            assert_eq!(machine.front.next_index(), 40, "the index wrapped");
        }
    }
}
