//! Builds for later steps, while tests leave the processors idle.

use std::process::{Command, Stdio};

use anyhow::Result;

use super::Step;
use crate::exec::{self, Group};
use crate::lab;

/// Builds nobody waits for yet. The step that needs one asks cargo for it as ever, which waits for
/// the one at work and says what is wrong with it, if anything is. They end with this.
pub struct Ahead {
    wanted: bool,
    builds: Vec<Group>,
}

impl Ahead {
    /// For these steps; nothing is built before [`start`](Self::start).
    pub fn new(steps: &[Step]) -> Self {
        let wanted = steps.iter().any(|step| matches!(step, Step::E2e | Step::Lab));
        Self { wanted, builds: Vec::new() }
    }

    /// Starts them, at the lowest priority there is: whoever tests comes first.
    ///
    /// # Errors
    /// There is no `nice`.
    pub fn start(&mut self) -> Result<()> {
        if self.wanted {
            for build in [lab::command_build(), lab::agent_build()] {
                let mut nice = Command::new("nice");
                nice.args(["-n", "19"]).arg(build.get_program()).args(build.get_args());
                nice.envs(build.get_envs().filter_map(|(name, value)| Some((name, value?))));
                nice.current_dir(exec::root());
                nice.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                self.builds.push(Group::spawn(&mut nice)?);
            }
        }
        Ok(())
    }
}
