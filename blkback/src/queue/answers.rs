//! In which order answers reach the ring.
//!
//! A frontend takes answers in any order, and as they come is fastest. But an answer is written
//! over a request's slot, the oldest that has none: if that request is still under way, nobody who
//! takes the ring over after a sudden death can know it any more. Answered in the order they were
//! taken, the requests that have no answer are exactly those that stand in the ring, and can be
//! done again: a read or write that was done already and not answered does no harm a second time.

use alloc::vec::Vec;
use pvio_ring::proto::blkif::Response;

/// A request's place in the order they were taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Turn(u32);

/// Answers on their way to the ring.
#[derive(Debug)]
pub(super) struct Answers {
    /// By turn, modulo the ring's slots; empty if they go as they come.
    held: Vec<Option<Response>>,
    taken: u32,
    answered: u32,
}

impl Answers {
    /// For a ring of so many slots, a power of two.
    pub fn new(in_order: bool, slots: u32) -> Self {
        let held = if in_order { slots } else { 0 };
        Self { held: (0..held).map(|_| None).collect(), taken: 0, answered: 0 }
    }

    /// A request was taken from the ring.
    pub fn took_one(&mut self) -> Turn {
        let turn = Turn(self.taken);
        self.taken = self.taken.wrapping_add(1);
        turn
    }

    /// Answers a request: `push` is called for what may go to the ring now, in order.
    pub fn put(&mut self, turn: Turn, response: Response, mut push: impl FnMut(Response)) {
        if self.held.is_empty() {
            return push(response);
        }
        // No more requests are unanswered than there are slots, so none is in another's place.
        if let Some(place) = self.place(turn.0) {
            debug_assert!(place.is_none(), "a request was answered twice");
            *place = Some(response);
        }
        while let Some(response) = self.place(self.answered).and_then(Option::take) {
            self.answered = self.answered.wrapping_add(1);
            push(response);
        }
    }

    fn place(&mut self, turn: u32) -> Option<&mut Option<Response>> {
        let mask = self.held.len().wrapping_sub(1);
        self.held.get_mut(turn as usize & mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_ring::proto::blkif::Status;

    fn response(id: u64) -> Response {
        Response { id, op: 0, status: Status::Okay }
    }

    fn put(answers: &mut Answers, turn: Turn, id: u64) -> Vec<u64> {
        let mut pushed = Vec::new();
        answers.put(turn, response(id), |r| pushed.push(r.id));
        pushed
    }

    #[test]
    fn held_until_all_before_are_there() {
        let mut answers = Answers::new(true, 4);
        // Over the wrap of the counter, too.
        (answers.taken, answers.answered) = (u32::MAX - 5, u32::MAX - 5);
        for _ in 0..4 {
            let turns: Vec<Turn> = (0..4).map(|_| answers.took_one()).collect();
            assert_eq!(put(&mut answers, turns[2], 2), []);
            assert_eq!(put(&mut answers, turns[0], 0), [0]);
            assert_eq!(put(&mut answers, turns[3], 3), []);
            assert_eq!(put(&mut answers, turns[1], 1), [1, 2, 3]);
        }
    }

    #[test]
    fn as_they_come() {
        let mut answers = Answers::new(false, 4);
        let (first, second) = (answers.took_one(), answers.took_one());
        assert_eq!(put(&mut answers, second, 2), [2]);
        assert_eq!(put(&mut answers, first, 1), [1]);
    }
}
