//! The device code links and runs without `std`, and a dependency on `std` would break the build.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::exec::{self, Ran};
use crate::report::Report;

const DEADLINE: Duration = Duration::from_secs(600);

/// rustc's error if both `std` and the example contain a panic handler.
const CLASH: &str = "found duplicate lang item `panic_impl`";

/// Builds and runs the example without and with devices, and verifies that `std` breaks the build.
pub fn run() -> Result<Report> {
    // The example has the versions of the workspace.
    let lock = example().join("Cargo.lock");
    std::fs::copy(exec::root().join("Cargo.lock"), lock)
        .context("seed the example's Cargo.lock")?;
    let mut report = Report::default();
    for (what, features) in [("transport, no allocator", ""), ("devices", "alloc")] {
        report = report.and(match links_and_runs(features)? {
            None => Report::passed(),
            Some(fault) => Report::failed(format!("{what}: {fault}")),
        });
    }
    let built = build("alloc,pvio-xenbus/std")?;
    let clash = !built.status.success() && built.output.contains(CLASH);
    Ok(report.and(if clash {
        Report::passed()
    } else {
        let output = built.output;
        Report::failed(format!(
            "with a crate that uses std, the build must fail on `{CLASH}`:\n{output}"
        ))
    }))
}

/// Returns the error of building or running the example, if any.
fn links_and_runs(features: &str) -> Result<Option<String>> {
    let built = build(features)?;
    if !built.status.success() {
        return Ok(Some(built.output));
    }
    let program = target().join("release/bare-metal");
    let ran = exec::run(&mut Command::new(program), Duration::from_secs(10))?;
    Ok((!ran.status.success()).then(|| format!("part {} of the example failed\n", ran.status)))
}

fn build(features: &str) -> Result<Ran> {
    let mut cargo = exec::cargo();
    cargo.args(["build", "--release", "--no-default-features", "--features", features]);
    cargo.current_dir(example()).env("CARGO_TARGET_DIR", target());
    exec::run(&mut cargo, DEADLINE)
}

fn example() -> PathBuf {
    exec::root().join("frontends/examples/bare-metal")
}

fn target() -> PathBuf {
    exec::target().join("nostd")
}
