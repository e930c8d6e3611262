//! `pvio check`: a scratch image, written and read back through the whole path.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Checks, World, image};
use crate::exec;

/// On a fresh image.
pub fn run(world: &World, checks: &mut Checks) -> Result<()> {
    let scratch = world.dir().join("scratch.img");
    image::blank(&scratch, 64 << 20)?;
    checks.check("pvio check: what is written is read back", || {
        let mut check = world.net.command(&world.pvio)?;
        check.arg("check").arg("--disk").arg(&scratch).stdin(Stdio::null());
        let said = exec::succeed(&mut check, Duration::from_secs(240))?;
        let is_sum = |word: &str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
        let mut words = said.split(|c: char| !c.is_ascii_alphanumeric());
        ensure!(words.any(is_sum), "no SHA-256 in:\n{said}");
        let left = world.net.processes()?;
        ensure!(left.is_empty(), "processes left: {left:?}");
        Ok(())
    });
    Ok(())
}
