//! The remaining cases, and which machine runs the next one.
//!
//! Cases with the same backend and guest type share a boot and a guest, so a machine continues with
//! the group that it started. Then it takes a free group of the same backend or, if there is none,
//! cases from the end of another machine's group. In this way, all machines finish at about the
//! same time.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::agent::Case;

/// A case to run.
pub struct Order {
    pub case: Case,
    /// Number of runs that failed because of the emulator.
    pub retries: u32,
    /// The reason of that failure.
    pub before: String,
}

/// Backend and guest type.
type Group = (String, String);

/// The queue, shared by all machines.
pub struct Queue(Mutex<Left>);

struct Left {
    orders: Vec<Order>,
    /// The machine that takes a group's cases from the front.
    owners: Vec<(Group, usize)>,
}

impl Queue {
    /// Returns a queue of all cases; those of a backend must be consecutive.
    pub fn new(cases: &[Case]) -> Self {
        let order = |case: &Case| Order { case: case.clone(), retries: 0, before: String::new() };
        let orders = cases.iter().map(order).collect();
        Self(Mutex::new(Left { orders, owners: Vec::new() }))
    }

    /// Returns the next case for this machine, or `None` if there are no more.
    pub fn next(&self, machine: usize) -> Option<Order> {
        self.lock().next(machine)
    }

    /// Adds a case to be run again, by any machine.
    pub fn again(&self, order: Order) {
        self.lock().orders.push(order);
    }

    /// Returns whether there are no more cases.
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
    fn queue_keeps_machine_in_its_group_and_then_shares_remaining_cases() {
        let queue = queue(&["1:a:pv", "2:a:pv", "3:a:pv", "4:a:pvh", "5:a:hvm", "6:b:pv"]);
        assert_eq!(next(&queue, 0), "1:a:pv");
        assert_eq!(next(&queue, 1), "4:a:pvh");
        assert_eq!(next(&queue, 1), "5:a:hvm");
        // From the end; the other machine continues from the front.
        assert_eq!(next(&queue, 1), "3:a:pv");
        assert_eq!(next(&queue, 0), "2:a:pv");
        // The next backend starts only after all cases of the last one.
        assert_eq!(next(&queue, 1), "6:b:pv");
        assert_eq!(next(&queue, 0), "");
        assert!(queue.is_empty());
    }

    #[test]
    fn requeued_scenario_runs_last_with_retry_count() {
        let queue = queue(&["1:a:pv", "2:a:pv"]);
        let mut order = queue.next(0).expect("there are two");
        order.retries += 1;
        queue.again(order);
        assert_eq!(next(&queue, 0), "2:a:pv");
        assert_eq!(queue.next(0).map(|order| order.retries), Some(1));
    }
}
