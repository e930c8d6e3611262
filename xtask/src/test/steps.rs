//! The steps that are one cargo command each.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::{Report, examples, tally};
use crate::{exec, samples};

/// No step takes half of this on two cores; a test that hangs must not hang everything.
const DEADLINE: Duration = Duration::from_secs(20 * 60);

/// The test that stands for the model while it is not built; [`loom`] builds and runs the model.
const LOOM_NOT_BUILT: &str = "model_checking_was_not_built";

/// `cargo fmt`, looking only; the probe stands outside the workspace.
pub fn fmt() -> Result<Report> {
    let probe = exec::root().join("xtask/nostd-probe/Cargo.toml");
    let mut report = Report::default();
    for (place, all) in [(exec::root().join("Cargo.toml"), Some("--all")), (probe, None)] {
        let mut fmt = exec::cargo();
        fmt.arg("fmt").args(all).args(["--check", "--manifest-path"]).arg(place);
        fmt.args(["--", "--color", "never"]);
        report = report.and(plain(&mut fmt)?);
    }
    Ok(report)
}

/// `cargo clippy`: no warning anywhere.
pub fn clippy() -> Result<Report> {
    let mut clippy = exec::cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--all-features"]);
    plain(clippy.args(["--", "-D", "warnings"]))
}

/// The same, for some packages.
pub fn clippy_of(packages: &[String]) -> Result<Report> {
    let mut clippy = exec::cargo();
    clippy.args(["clippy", "--no-deps", "--all-targets", "--all-features"]);
    clippy.args(packages.iter().flat_map(|name| ["--package", name]));
    plain(clippy.args(["--", "-D", "warnings"]))
}

/// Unit tests of some packages: those in their libraries and programs.
pub fn units_of(packages: &[String]) -> Result<Report> {
    let mut test = exec::cargo();
    test.args(["test", "--all-features", "--lib", "--bins", "--no-fail-fast"]);
    tests(test.args(packages.iter().flat_map(|name| ["--package", name])), &[])
}

/// Every unit and integration test of the workspace.
pub fn unit() -> Result<Report> {
    let mut test = exec::cargo();
    test.args(["test", "--workspace", "--all-features", "--lib", "--bins", "--tests"]);
    match samples::fetch() {
        Ok(dir) => drop(test.env("PVIO_QEMU_SAMPLES", dir)),
        // The test that needs them says that it was skipped.
        Err(error) => println!("    QEMU's sample images: {error:#}"),
    }
    tests(test.args(["--examples", "--no-fail-fast"]), &["--skip", LOOM_NOT_BUILT])
}

/// The documentation, the examples in it, and those of the libraries.
pub fn doc() -> Result<Report> {
    let mut doc = exec::cargo();
    doc.args(["doc", "--workspace", "--all-features", "--no-deps"]);
    let build = plain(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    let mut test = exec::cargo();
    test.args(["test", "--workspace", "--all-features", "--doc", "--no-fail-fast"]);
    Ok(build.and(tests(&mut test, &[])?).and(examples::run()?))
}

/// The model of the notification protocol, built for loom in a folder of its own, since the flag
/// would make every other build start anew.
pub fn loom() -> Result<Report> {
    let mut test = exec::cargo();
    test.args(["test", "--package", "pvio-ring", "--test", "loom_notify", "--release"]);
    test.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", exec::target().join("loom"));
    tests(&mut test, &[])
}

/// A command that is one test.
fn plain(command: &mut Command) -> Result<Report> {
    let ran = exec::run(command, DEADLINE)?;
    if ran.status.success() {
        return Ok(Report::passed());
    }
    Ok(Report::failed(format!("{}: {}\n{}", exec::shown(command), ran.status, ran.output)))
}

/// A `cargo test` whose tests are counted one by one.
fn tests(command: &mut Command, more: &[&str]) -> Result<Report> {
    let ran = exec::run(command.args(["--", "--show-output"]).args(more), DEADLINE)?;
    let tally = tally::read(&ran.output);
    let mut report = Report { counts: tally.counts, notes: tally.skipped, ..Report::default() };
    if !ran.status.success() {
        // A build error, or a test program that died, has no line that counts it.
        report.counts.failed = report.counts.failed.max(1);
    } else if report.counts.passed == 0 {
        report.counts.failed = 1;
        report.trouble = "no test passed: that is no success\n".to_owned();
    }
    if report.counts.failed > 0 {
        let output = tally::without_successes(&ran.output);
        report.trouble += &format!("{}: {}\n{output}", exec::shown(command), ran.status);
    }
    Ok(report)
}
