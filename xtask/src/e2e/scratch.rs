//! `pvio check`: a verified workload on an image.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::machine::Machine;
use super::{Checks, World, image};

/// Runs it on a new image, and again with the driver domain killed during the run.
pub fn run(world: &World, checks: &mut Checks) -> Result<()> {
    checks.check("pvio check: what is written is read back", || {
        let scratch = fresh(world, "scratch.img")?;
        let mut machine =
            Machine::start(world, &["check", "--disk", &scratch, "--requests", "20000"])?;
        let log = all_well(&mut machine)?;
        ensure!(!log.contains("attached"), "it had to attach again:\n{log}");
        Ok(())
    });
    checks.check("pvio check: also when the driver domain is killed in between", || {
        let scratch = fresh(world, "killed.img")?;
        let mut machine = Machine::start(world, &["check", "--disk", &scratch, "--seconds", "6"])?;
        machine.wait_for("both domains", |machine| {
            let both = machine.domain("check").is_ok() && machine.domain("driver").is_ok();
            Ok(both.then_some(()))
        })?;
        std::thread::sleep(Duration::from_secs(2));
        machine.kill(machine.domain("driver")?, Signal::KILL)?;
        let log = all_well(&mut machine)?;
        // The disk's process goes on, and the session with it.
        ensure!(log.contains("was started again"), "it was not killed:\n{log}");
        ensure!(!log.contains("attached"), "it had to attach again:\n{log}");
        Ok(())
    });
    Ok(())
}

fn fresh(world: &World, name: &str) -> Result<String> {
    let scratch = world.dir().join(name);
    image::blank(&scratch, 64 << 20)?;
    Ok(scratch.display().to_string())
}

/// Waits for exit code 0 and a checksum; checks that nothing is left.
fn all_well(machine: &mut Machine<'_>) -> Result<String> {
    let status = machine.wait()?;
    let log = machine.log();
    ensure!(status.success(), "{status}:\n{log}");
    let line = log.lines().find_map(|line| line.strip_prefix("sha256"));
    let sum = line.with_context(|| format!("no sum in:\n{log}"))?.trim();
    let is_sum = sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit());
    ensure!(is_sum, "no sum: {sum}");
    machine.nothing_left()?;
    Ok(log)
}
