//! Exhaustive check of the proof in `events.rs` that no wake-up is lost: every interleaving of two
//! senders and a receiver. The same check finds the lost wake-ups of the other order of the
//! receiver's steps, so it would detect them here.

use std::collections::HashSet;

/// Number of events that each sender sends.
const EVENTS: u8 = 4;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Sender {
    /// Before the write to shared memory.
    Write,
    /// Before setting the pending bit.
    Raise,
    /// Before adding to the eventfd.
    Signal,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Receiver {
    /// Asleep unless the eventfd is readable.
    Sleep,
    Drain,
    Clear,
    /// Before reading shared memory and sleeping.
    Read,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    senders: [(Sender, u8); 2],
    receiver: Receiver,
    pending: bool,
    readable: bool,
    /// Number of events that each sender has written. The next field is the number that the
    /// receiver has seen.
    written: [u8; 2],
    seen: [u8; 2],
    /// Whether the clear step found the bit set.
    took: bool,
}

/// Order of the steps: the one in use, or one that is plausible and wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Ours,
    ClearBeforeDrain,
}

impl State {
    fn next(self, order: Order) -> Vec<Self> {
        let mut next: Vec<_> = (0..2).filter_map(|i| self.send(i)).collect();
        self.receive(order, &mut next);
        next
    }

    fn send(mut self, i: usize) -> Option<Self> {
        let (step, sent) = self.senders[i];
        self.senders[i] = match step {
            Sender::Write if sent == EVENTS => return None,
            Sender::Write => {
                self.written[i] += 1;
                (Sender::Raise, sent + 1)
            }
            Sender::Raise if self.pending => (Sender::Write, sent),
            Sender::Raise => {
                self.pending = true;
                (Sender::Signal, sent)
            }
            Sender::Signal => {
                self.readable = true;
                (Sender::Write, sent)
            }
        };
        Some(self)
    }

    fn receive(mut self, order: Order, next: &mut Vec<Self>) {
        let drain_first = order != Order::ClearBeforeDrain;
        match self.receiver {
            Receiver::Sleep => {
                if !self.readable {
                    return;
                }
                self.receiver = if drain_first { Receiver::Drain } else { Receiver::Clear };
            }
            Receiver::Drain => {
                self.readable = false;
                self.receiver = match (drain_first, self.took) {
                    (true, _) => Receiver::Clear,
                    (false, true) => Receiver::Read,
                    (false, false) => Receiver::Sleep,
                };
            }
            Receiver::Clear => {
                self.took = std::mem::take(&mut self.pending);
                self.receiver = match (drain_first, self.took) {
                    (false, _) => Receiver::Drain,
                    (true, true) => Receiver::Read,
                    (true, false) => Receiver::Sleep,
                };
            }
            Receiver::Read => {
                self.seen = self.written;
                self.took = false;
                self.receiver = Receiver::Sleep;
            }
        }
        next.push(self);
    }

    /// Whether the receiver has not seen every event and will not be woken any more.
    fn lost(&self) -> bool {
        let sent = self.senders == [(Sender::Write, EVENTS); 2];
        let asleep = self.receiver == Receiver::Sleep && !self.readable;
        sent && asleep && self.seen != self.written
    }
}

/// Visits every state. Returns their number, and one in which an event is lost, if there is one.
fn walk(order: Order) -> (usize, Option<State>) {
    let start = State {
        senders: [(Sender::Write, 0); 2],
        receiver: Receiver::Sleep,
        pending: false,
        readable: false,
        written: [0; 2],
        seen: [0; 2],
        took: false,
    };
    let (mut seen, mut open) = (HashSet::from([start]), vec![start]);
    while let Some(state) = open.pop() {
        if state.lost() {
            return (seen.len(), Some(state));
        }
        open.extend(state.next(order).into_iter().filter(|next| seen.insert(*next)));
    }
    (seen.len(), None)
}

#[test]
fn wakeup_model_with_current_order_loses_no_wakeup() {
    let (states, lost) = walk(Order::Ours);
    assert_eq!(lost, None);
    assert!(states > 1000, "only {states} states");
}

#[test]
fn wakeup_model_that_clears_before_draining_loses_wakeup() {
    assert!(walk(Order::ClearBeforeDrain).1.is_some());
}
