//! What could happen next, and letting it happen.

use crate::sim::Sim;
use std::fmt;

/// Something that is simulated: it says what could happen next, one thing of it happens, and so on.
pub trait World {
    /// One thing that can happen.
    type Action: fmt::Debug;

    /// Lists everything that could happen now. What a sleeper would do stands here only if
    /// something has woken it.
    fn menu(&mut self, menu: &mut Menu<Self::Action>);

    /// Lets one of those things happen.
    fn act(&mut self, action: Self::Action, sim: &mut Sim);

    /// What somebody still waits for (an answer, a handshake), for a human to read. While it is
    /// not `None` there must be something on the menu that [must](Menu::must) happen.
    fn waiting(&self) -> Option<String>;
}

/// What could happen now, and how likely each thing is.
#[derive(Debug)]
pub struct Menu<A> {
    choices: Vec<(u32, A)>,
    weight: u64,
    must: bool,
    calm: bool,
}

impl<A> Menu<A> {
    fn new(calm: bool) -> Self {
        Self { choices: Vec::new(), weight: 0, must: false, calm }
    }

    /// Something that happens sooner or later, since whoever does it is awake.
    pub fn must(&mut self, weight: u32, action: A) {
        self.must = true;
        self.add(weight, action);
    }

    /// Something that may or may not happen: a new request, a fault. Not while all settles.
    pub fn may(&mut self, weight: u32, action: impl FnOnce() -> A) {
        if !self.calm {
            self.add(weight, action());
        }
    }

    /// Whether all settles: nothing new is begun.
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

    fn choose(&mut self, sim: &mut Sim) -> Option<A> {
        let mut at = sim.below(self.weight);
        let chosen = self.choices.iter().position(|(weight, _)| {
            let here = at < u64::from(*weight);
            at = at.saturating_sub(u64::from(*weight));
            here
        })?;
        Some(self.choices.swap_remove(chosen).1)
    }
}

/// Lets `steps` things happen, new ones and faults among them.
///
/// # Panics
/// With "deadlock", when something is waited for and nobody can act.
pub fn storm<W: World>(world: &mut W, sim: &mut Sim, steps: u64) {
    let mut menu = Menu::new(false);
    for _ in 0..steps {
        if !step(world, sim, &mut menu) {
            return;
        }
    }
}

/// Begins nothing new and lets happen what must, until nothing must any more.
///
/// # Panics
/// With "deadlock", when something is waited for and nobody can act; with "no end", when that is
/// not so after `limit` steps.
pub fn settle<W: World>(world: &mut W, sim: &mut Sim, limit: u64) {
    let mut menu = Menu::new(true);
    for _ in 0..limit {
        if !step(world, sim, &mut menu) {
            return;
        }
    }
    let waiting = world.waiting().unwrap_or_default();
    panic!("no end: still busy after {limit} steps; {waiting}");
}

/// One step, if there is any.
fn step<W: World>(world: &mut W, sim: &mut Sim, menu: &mut Menu<W::Action>) -> bool {
    menu.clear();
    world.menu(menu);
    if !menu.must
        && let Some(waiting) = world.waiting()
    {
        panic!("deadlock: nobody can act, but {waiting}");
    }
    let Some(action) = menu.choose(sim) else { return false };
    sim.tick();
    sim.note(format_args!("{action:?}"));
    world.act(action, sim);
    true
}
