//! The possible actions of a simulation, and their execution.

use crate::sim::Sim;
use std::fmt;

/// Simulated system: it lists the possible actions, one of them is executed, and so on.
pub trait World {
    /// Action that can be executed.
    type Action: fmt::Debug;

    /// Lists all actions that are possible now. The actions of a sleeping participant are listed
    /// only if an event has woken it.
    fn menu(&mut self, menu: &mut Menu<Self::Action>);

    /// Executes one of the listed actions.
    fn act(&mut self, action: Self::Action, sim: &mut Sim);

    /// Checks the invariants that hold after every action.
    ///
    /// # Panics
    /// If one does not hold.
    fn check(&mut self) {}

    /// Describes what a participant waits for (a response, a handshake), for a human reader. While
    /// it is not `None`, the menu must contain an action that [must](Menu::must) be executed.
    fn waiting(&self) -> Option<String>;
}

/// Possible actions with their weights.
#[derive(Debug)]
pub struct Menu<A> {
    choices: Vec<(u32, A)>,
    weight: u64,
    must: bool,
    calm: bool,
}

impl<A> Menu<A> {
    /// Creates an empty menu, of a world that settles if `calm`.
    #[must_use]
    pub fn new(calm: bool) -> Self {
        Self { choices: Vec::new(), weight: 0, must: false, calm }
    }

    /// Adds an action that is executed eventually, since its participant is awake.
    pub fn must(&mut self, weight: u32, action: A) {
        self.must = true;
        self.add(weight, action);
    }

    /// Adds an optional action: a new request, a fault. It is not added in [`settle`].
    pub fn may(&mut self, weight: u32, action: impl FnOnce() -> A) {
        if !self.calm {
            self.add(weight, action());
        }
    }

    /// Whether the world is settling: no new work is started.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.calm
    }

    fn add(&mut self, weight: u32, action: A) {
        if weight > 0 {
            self.weight += u64::from(weight);
            self.choices.push((weight, action));
        }
    }

    fn clear(&mut self) {
        self.choices.clear();
        (self.weight, self.must) = (0, false);
    }

    /// Removes a random action and returns it; `None` if the menu is empty.
    pub fn choose(&mut self, sim: &mut Sim) -> Option<A> {
        let mut at = sim.below(self.weight);
        let chosen = self.choices.iter().position(|(weight, _)| {
            let here = at < u64::from(*weight);
            at = at.saturating_sub(u64::from(*weight));
            here
        })?;
        Some(self.choices.swap_remove(chosen).1)
    }
}

/// Executes `steps` actions, including new requests and faults.
///
/// # Panics
/// With "deadlock", if a participant waits and no action must be executed.
pub fn storm<W: World>(world: &mut W, sim: &mut Sim, steps: u64) {
    let mut menu = Menu::new(false);
    sim.enter();
    // A run with the choices of a tape has the steps of the tape.
    let mut left = steps;
    while sim.has_step().unwrap_or(left > 0) {
        if !step(world, sim, &mut menu) {
            return;
        }
        left = left.saturating_sub(1);
    }
}

/// Executes only the actions that must be executed, until there are none.
///
/// # Panics
/// With "deadlock", if a participant waits and no action must be executed; with "no end", if
/// actions remain after `limit` steps.
pub fn settle<W: World>(world: &mut W, sim: &mut Sim, limit: u64) {
    let mut menu = Menu::new(true);
    sim.enter();
    for _ in 0..limit {
        if !step(world, sim, &mut menu) {
            return;
        }
    }
    let waiting = world.waiting().unwrap_or_default();
    panic!("no end: still busy after {limit} steps; {waiting}");
}

/// Executes one step. Returns `false` if there was no action.
fn step<W: World>(world: &mut W, sim: &mut Sim, menu: &mut Menu<W::Action>) -> bool {
    menu.clear();
    world.menu(menu);
    if !menu.must
        && let Some(waiting) = world.waiting()
    {
        panic!("deadlock: no action is possible, but {waiting}");
    }
    sim.tick();
    let Some(action) = menu.choose(sim) else { return false };
    sim.note(format_args!("{action:?}"));
    world.act(action, sim);
    world.check();
    true
}
