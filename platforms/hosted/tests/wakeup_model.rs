//! The argument of `events.rs`, that no wake-up is lost, walked through in full: every interleaving
//! of two senders and a receiver that masks whenever it likes. The same walk finds the two orders
//! of steps that do lose wake-ups, so it would find them here.

use std::collections::HashSet;

/// Events each sender sends.
const EVENTS: u8 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Sender {
    /// About to write shared memory.
    Write,
    /// About to set the pending bit.
    Raise,
    /// About to look at the mask.
    Mask,
    /// About to add to the eventfd.
    Signal,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Receiver {
    /// Asleep unless the eventfd is readable; or about to mask.
    Sleep,
    Drain,
    Clear,
    /// About to look at shared memory, then to sleep.
    Look,
    /// Masked: about to look at shared memory.
    LookMasked,
    /// The two steps of unmasking.
    Unmask,
    Recheck {
        pending: Option<bool>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    senders: [(Sender, u8); 2],
    receiver: Receiver,
    pending: bool,
    masked: bool,
    readable: bool,
    /// What the senders wrote, and how much of it the receiver saw.
    written: [u8; 2],
    seen: [u8; 2],
    /// The clear step found the bit set.
    took: bool,
}

/// The order of steps: the one in use, or one that looks as good and is not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Ours,
    ClearBeforeDrain,
    LookBeforeUnmask,
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
                (Sender::Mask, sent)
            }
            Sender::Mask if self.masked => (Sender::Write, sent),
            Sender::Mask => (Sender::Signal, sent),
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
                if self.readable {
                    let step = if drain_first { Receiver::Drain } else { Receiver::Clear };
                    next.push(Self { receiver: step, ..self });
                }
                self.masked = true;
                self.receiver = Receiver::LookMasked;
            }
            Receiver::Drain => {
                self.readable = false;
                self.receiver = match (drain_first, self.took) {
                    (true, _) => Receiver::Clear,
                    (false, true) => Receiver::Look,
                    (false, false) => Receiver::Sleep,
                };
            }
            Receiver::Clear => {
                self.took = std::mem::take(&mut self.pending);
                self.receiver = match (drain_first, self.took) {
                    (false, _) => Receiver::Drain,
                    (true, true) => Receiver::Look,
                    (true, false) => Receiver::Sleep,
                };
            }
            Receiver::Look => {
                self.seen = self.written;
                self.took = false;
                self.receiver = Receiver::Sleep;
            }
            Receiver::LookMasked => {
                self.seen = self.written;
                self.receiver = match order {
                    Order::LookBeforeUnmask => Receiver::Recheck { pending: None },
                    _ => Receiver::Unmask,
                };
            }
            Receiver::Unmask => {
                self.masked = false;
                self.receiver = Receiver::Recheck { pending: None };
            }
            Receiver::Recheck { pending } => {
                let found = pending.unwrap_or(self.pending);
                if order == Order::LookBeforeUnmask && pending.is_none() {
                    self.receiver = Receiver::Recheck { pending: Some(found) };
                } else {
                    self.masked = false;
                    self.readable |= found;
                    self.receiver = Receiver::Sleep;
                }
            }
        }
        next.push(self);
    }

    /// Nobody will wake the receiver any more, and it has not seen everything.
    fn lost(&self) -> bool {
        let sent = self.senders == [(Sender::Write, EVENTS); 2];
        let asleep = self.receiver == Receiver::Sleep && !self.readable;
        sent && asleep && self.seen != self.written
    }
}

/// Walks through every state; how many there are, and one in which an event is lost.
fn walk(order: Order) -> (usize, Option<State>) {
    let start = State {
        senders: [(Sender::Write, 0); 2],
        receiver: Receiver::Sleep,
        pending: false,
        masked: false,
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
fn no_wake_up_is_lost() {
    let (states, lost) = walk(Order::Ours);
    assert_eq!(lost, None);
    assert!(states > 1000, "only {states} states");
}

#[test]
fn clearing_before_draining_would_lose_one() {
    assert!(walk(Order::ClearBeforeDrain).1.is_some());
}

#[test]
fn looking_before_unmasking_would_lose_one() {
    assert!(walk(Order::LookBeforeUnmask).1.is_some());
}
