//! The lab's `/init`, and its table of scenarios.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::exec;

const BUILD: Duration = Duration::from_secs(1200);
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A scenario with a backend and a guest type, as the agent lists it.
#[derive(Clone, Deserialize)]
pub struct Case {
    /// `NAME:BACKEND:KIND`
    pub id: String,
    /// The scenario.
    pub name: String,
    /// The backend.
    pub backend: String,
    /// The guest type.
    pub kind: String,
    /// The tested property, on one line.
    pub proves: String,
}

/// Builds the agent as a static executable, since it starts before there are any libraries.
///
/// # Errors
/// It does not build.
pub fn build() -> Result<PathBuf> {
    // A separate target directory: the flags would cause a rebuild of everything in the other one.
    let target = exec::target().join("lab");
    let mut build = exec::cargo();
    build.args(["build", "--release", "--package", "pvio-lab-agent", "--target", TARGET]);
    build.env("CARGO_TARGET_DIR", &target);
    build.env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    // Build time matters more than the speed of the agent.
    build.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    exec::succeed(&mut build, BUILD)?;
    Ok(target.join(TARGET).join("release/pvio-lab-agent"))
}

/// Returns all cases, in the order in which they should run.
///
/// # Errors
/// The agent does not build.
pub fn cases() -> Result<Vec<Case>> {
    let mut list = Command::new(build()?);
    let text = exec::succeed(list.arg("list"), Duration::from_secs(10))?;
    serde_json::from_str(&text).context("the agent's list")
}
