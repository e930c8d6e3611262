//! The lab's `/init`, and the table of scenarios it knows.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::exec;

const BUILD: Duration = Duration::from_secs(1200);
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A scenario with a backend and a kind of guest, as the agent lists it.
#[derive(Clone, Deserialize)]
pub struct Case {
    /// `NAME:BACKEND:KIND`
    pub id: String,
    /// The scenario.
    pub name: String,
    /// Whose backend.
    pub backend: String,
    /// What kind of guest.
    pub kind: String,
    /// What it shows, in a line.
    pub proves: String,
}

/// Builds the agent: without shared libraries, since it starts before there are any.
///
/// # Errors
/// It does not build.
pub fn build() -> Result<PathBuf> {
    // A folder of its own: the flags would make every other build start anew.
    let target = exec::target().join("lab");
    let mut build = exec::cargo();
    build.args(["build", "--release", "--package", "pvio-lab-agent", "--target", TARGET]);
    build.env("CARGO_TARGET_DIR", &target);
    build.env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    // Nobody waits for what it does, everybody for its build.
    build.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    exec::succeed(&mut build, BUILD)?;
    Ok(target.join(TARGET).join("release/pvio-lab-agent"))
}

/// All cases, in the order they run best.
///
/// # Errors
/// The agent does not build.
pub fn cases() -> Result<Vec<Case>> {
    let mut list = Command::new(build()?);
    let text = exec::succeed(list.arg("list"), Duration::from_secs(10))?;
    serde_json::from_str(&text).context("the agent's list")
}
