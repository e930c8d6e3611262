//! What is left to run, and which machine runs what next.
//!
//! Cases of one backend and one kind of guest share a boot and a guest, so a machine stays with
//! those it took first. Once they are done it takes others of that backend, from the other end of what
//! another machine is at if nothing else is left: so all machines are done at about the same time.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::agent::Case;

/// A case that is to run.
pub struct Order {
    pub case: Case,
    /// How often it was begun and came to nothing, by the emulator's fault.
    pub retries: u32,
    /// What was said then.
    pub before: String,
}

/// The backend and the kind of guest.
type Group = (String, String);

/// Shared by all machines.
pub struct Queue(Mutex<Left>);

struct Left {
    orders: Vec<Order>,
    /// Who takes the group's cases from the front.
    owners: Vec<(Group, usize)>,
}

impl Queue {
    /// All cases, those of a backend together.
    pub fn new(cases: &[Case]) -> Self {
        let order = |case: &Case| Order { case: case.clone(), retries: 0, before: String::new() };
        let orders = cases.iter().map(order).collect();
        Self(Mutex::new(Left { orders, owners: Vec::new() }))
    }

    /// What this machine is to run next; nothing if nothing is left.
    pub fn next(&self, machine: usize) -> Option<Order> {
        self.lock().next(machine)
    }

    /// To be run again, by whoever gets to it.
    pub fn again(&self, order: Order) {
        self.lock().orders.push(order);
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.lock().orders.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Left> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Left {
    fn next(&mut self, machine: usize) -> Option<Order> {
        let backend = &self.orders.first()?.case.backend;
        let here: Vec<usize> =
            (0..self.orders.len()).filter(|&i| self.orders[i].case.backend == *backend).collect();
        let owner = |&i: &usize| {
            let owners = &self.owners;
            owners.iter().find(|(it, _)| *it == group(&self.orders[i].case)).map(|(_, who)| *who)
        };
        let mine = here.iter().find(|i| owner(i) == Some(machine));
        let free = || here.iter().find(|i| owner(i).is_none());
        let at = match mine.or_else(free) {
            Some(&at) => at,
            None => *here.last()?,
        };
        let order = self.orders.remove(at);
        let group = group(&order.case);
        if self.owners.iter().all(|(it, _)| *it != group) {
            self.owners.push((group, machine));
        }
        Some(order)
    }
}

fn group(case: &Case) -> Group {
    (case.backend.clone(), case.kind.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(ids: &[&str]) -> Queue {
        let case = |id: &&str| {
            let words: Vec<_> = id.split(':').map(str::to_owned).collect();
            let [name, backend, kind] = words.try_into().expect("three words");
            Case { id: (*id).to_owned(), name, backend, kind, proves: String::new() }
        };
        Queue::new(&ids.iter().map(case).collect::<Vec<_>>())
    }

    fn next(queue: &Queue, machine: usize) -> String {
        queue.next(machine).map(|order| order.case.id).unwrap_or_default()
    }

    #[test]
    fn a_machine_stays_with_its_group_and_then_helps_the_other() {
        let queue = queue(&["1:a:pv", "2:a:pv", "3:a:pv", "4:a:pvh", "5:a:hvm", "6:b:pv"]);
        assert_eq!(next(&queue, 0), "1:a:pv");
        assert_eq!(next(&queue, 1), "4:a:pvh");
        assert_eq!(next(&queue, 1), "5:a:hvm");
        // From the end, while the other goes on from the front.
        assert_eq!(next(&queue, 1), "3:a:pv");
        assert_eq!(next(&queue, 0), "2:a:pv");
        // The next backend not before the last is done with.
        assert_eq!(next(&queue, 1), "6:b:pv");
        assert_eq!(next(&queue, 0), "");
        assert!(queue.is_empty());
    }

    #[test]
    fn what_came_to_nothing_runs_again() {
        let queue = queue(&["1:a:pv", "2:a:pv"]);
        let mut order = queue.next(0).expect("there are two");
        order.retries += 1;
        queue.again(order);
        assert_eq!(next(&queue, 0), "2:a:pv");
        assert_eq!(queue.next(0).map(|order| order.retries), Some(1));
    }
}
