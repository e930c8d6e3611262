//! A deterministic simulator: a whole machine in one thread, driven by a seed.
//!
//! | module | contents |
//! |---|---|
//! | [`kill`] | processes that are killed or interrupted between any two of their stores and calls |
//! | [`local`] | [`LocalMachine`]: domains in one address space, with real grant tables and event bits |
//! | [`sim`] | [`Sim`]: the random numbers, clock and trace of one run, all from its seed |
//! | [`choices`] | the choices of a run, as a tape that can be edited and replayed |
//! | [`world`] | [`World`]: the possible next actions; [`storm`] and [`settle`] execute them |
//! | [`seeds`] | [`run_seeds`]: many runs; a run that fails prints how to reproduce it |
//! | [`shrink`] | reduction of a failed run |
//!
//! This crate contains no device. The worlds with devices are in the workspace's package
//! `pvio-simulator`. A fuzzer of one device needs only [`LocalMachine`] (a domain for each side, of
//! which the hostile one writes its own pages, grants and ports) and, for a peer that acts between two
//! accesses of the code under test, [`kill::interrupted`].
//!
//! A world's menu lists the possible actions, with their weight and whether a participant waits for the action. A device side
//! that sleeps is on the menu only if its event is pending. If a wake-up is lost, no action is possible
//! while a participant waits, and the run fails as a deadlock.
//! ```
//! use pvio_sim::{Menu, Sim, World, run_seeds, settle, storm};
//!
//! /// Two cups; water is poured into the first, and from there into the second.
//! #[derive(Default)]
//! struct Cups(u32, u32);
//!
//! #[derive(Debug)]
//! enum Do { Fill, Pour }
//!
//! impl World for Cups {
//!     type Action = Do;
//!
//!     fn menu(&mut self, menu: &mut Menu<Do>) {
//!         menu.may(1, || Do::Fill);
//!         if self.0 > 0 {
//!             menu.must(3, Do::Pour);
//!         }
//!     }
//!
//!     fn act(&mut self, action: Do, sim: &mut Sim) {
//!         match action {
//!             Do::Fill => self.0 += sim.below(3) as u32,
//!             Do::Pour => { self.0 -= 1; self.1 += 1 }
//!         }
//!     }
//!
//!     fn waiting(&self) -> Option<String> {
//!         (self.0 > 0).then(|| format!("{} left in the first cup", self.0))
//!     }
//! }
//!
//! run_seeds("cups", 10, |sim| {
//!     let mut cups = Cups::default();
//!     storm(&mut cups, sim, 100);
//!     settle(&mut cups, sim, 1000);
//!     assert_eq!(cups.0, 0);
//! });
//! ```

#![deny(unsafe_code)]

pub mod choices;
pub mod kill;
pub mod local;
pub mod seeds;
pub mod shrink;
pub mod sim;
pub mod world;

pub use local::{LocalDomain, LocalMachine};
pub use seeds::{Failure, attempt, run_seeds};
pub use sim::{Record, Sim, WaitState};
pub use world::{Menu, World, settle, storm};
