//! The device code links and runs without `std`, and a dependency on `std` would break the build.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::exec::{self, Ran};
use crate::report::Report;

const DEADLINE: Duration = Duration::from_secs(600);

/// rustc's error if both `std` and the probe contain a panic handler.
const CLASH: &str = "found duplicate lang item `panic_impl`";

/// Builds and runs both probes, and verifies that the build fails with `std`.
pub fn run() -> Result<Report> {
    let lock = probe().join("Cargo.lock");
    std::fs::copy(exec::root().join("Cargo.lock"), lock).context("seed the probe's Cargo.lock")?;
    let mut report = Report::default();
    for (what, features) in [("transport, no allocator", ""), ("devices", "alloc")] {
        report = report.and(match links_and_runs(features)? {
            None => Report::passed(),
            Some(fault) => Report::failed(format!("{what}: {fault}")),
        });
    }
    let built = build("alloc,with-std")?;
    let clash = !built.status.success() && built.output.contains(CLASH);
    Ok(report.and(if clash {
        Report::passed()
    } else {
        let output = built.output;
        Report::failed(format!("with std added, the build must fail on `{CLASH}`:\n{output}"))
    }))
}

/// Returns the error of building or running the probe, if any.
fn links_and_runs(features: &str) -> Result<Option<String>> {
    let built = build(features)?;
    if !built.status.success() {
        return Ok(Some(built.output));
    }
    let program = target().join("release/nostd-probe");
    let ran = exec::run(&mut Command::new(program), Duration::from_secs(10))?;
    Ok((!ran.status.success()).then(|| format!("part {} of the probe went wrong\n", ran.status)))
}

fn build(features: &str) -> Result<Ran> {
    let mut cargo = exec::cargo();
    cargo.args(["build", "--release", "--features", features]);
    cargo.current_dir(probe()).env("CARGO_TARGET_DIR", target());
    exec::run(&mut cargo, DEADLINE)
}

fn probe() -> PathBuf {
    exec::root().join("xtask/nostd-probe")
}

fn target() -> PathBuf {
    exec::target().join("nostd")
}
