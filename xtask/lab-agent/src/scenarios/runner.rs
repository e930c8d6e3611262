//! Running a scenario.

use anyhow::{Error, Result};

use super::{Case, Guests, find};
use crate::dom0::lab::{Lab, Outcome, Shared, Skip};
use crate::dom0::words::Words;
use crate::net;
use crate::sys::run::Flake;

impl Lab {
    /// Runs the scenario with a name such as `disk-verify:linux:pv`.
    pub fn run(&mut self, id: &str) -> Outcome {
        self.words = Words::start();
        self.rows.clear();
        let outcome = match find(id) {
            Some(case) => self.run_case(&case),
            None => Err(Error::msg("there is no such scenario")),
        };
        let Err(error) = outcome else { return Outcome::Passed(std::mem::take(&mut self.rows)) };
        let text = format!("{error:#}");
        if error.is::<Skip>() {
            Outcome::Skipped(text)
        } else if error.chain().any(|cause| cause.is::<Flake>()) {
            // The shared guest may be in any state, so the next scenario gets a new one.
            self.drop_shared();
            Outcome::Flake(text)
        } else {
            Outcome::Failed(text)
        }
    }

    fn run_case(&mut self, case: &Case) -> Result<()> {
        if !self.echoes {
            net::serve_echo()?;
            self.echoes = true;
        }
        let stays = |it: &Shared| {
            it.backend == case.backend
                && it.kind == case.kind
                && case.scenario.guests != Guests::Own
        };
        if !self.shared.as_ref().is_some_and(stays) {
            self.end_shared()?;
        }
        (self.backend, self.kind) = (case.backend, case.kind);
        self.serve(&[])?;
        let done = (case.scenario.run)(self);
        if done.is_err() {
            self.drop_shared();
        }
        done?;
        self.backends.alive()
    }
}
