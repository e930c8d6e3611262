//! Steps that consist of one cargo command.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::{Report, examples, tally};
use crate::exec;

/// Timeout of a step, for tests that hang; on two cores no step takes half of it.
pub const DEADLINE: Duration = Duration::from_secs(20 * 60);

/// Runs `cargo fmt --check`; one example and the fuzz targets are not part of the workspace.
pub fn fmt() -> Result<Report> {
    let example = exec::root().join("frontends/examples/bare-metal/Cargo.toml");
    let mut report = Report::default();
    let fuzz = exec::root().join("fuzz/Cargo.toml");
    let workspace = (exec::root().join("Cargo.toml"), Some("--all"));
    for (place, all) in [workspace, (example, None), (fuzz, None)] {
        let mut fmt = exec::cargo();
        fmt.arg("fmt").args(all).args(["--check", "--manifest-path"]).arg(place);
        fmt.args(["--", "--color", "never"]);
        report = report.and(plain(&mut fmt)?);
    }
    Ok(report)
}

/// Runs `cargo clippy`; a warning is a failure.
pub fn clippy() -> Result<Report> {
    let mut clippy = exec::cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--all-features"]);
    let all = plain(clippy.args(["--", "-D", "warnings"]))?;
    // The daemon without the demo.
    let mut daemon = exec::cargo();
    daemon.args(["clippy", "--package", "pvio", "--no-default-features"]);
    Ok(all.and(plain(daemon.args(["--", "-D", "warnings"]))?))
}

/// Does the same for some packages.
pub fn clippy_of(packages: &[String]) -> Result<Report> {
    let mut clippy = exec::cargo();
    clippy.args(["clippy", "--no-deps", "--all-targets", "--all-features"]);
    clippy.args(packages.iter().flat_map(|name| ["--package", name]));
    plain(clippy.args(["--", "-D", "warnings"]))
}

/// Runs the unit tests of some packages: those in their libraries and programs.
pub fn units_of(packages: &[String]) -> Result<Report> {
    let mut test = exec::cargo();
    test.args(["test", "--all-features", "--lib", "--bins", "--no-fail-fast"]);
    tests(test.args(packages.iter().flat_map(|name| ["--package", name])), &[])
}

/// Builds the documentation, runs its examples and those of the libraries.
pub fn doc() -> Result<Report> {
    let mut doc = exec::cargo();
    doc.args(["doc", "--workspace", "--all-features", "--no-deps"]);
    let build = plain(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    let mut test = exec::cargo();
    test.args(["test", "--workspace", "--all-features", "--doc", "--no-fail-fast"]);
    Ok(build.and(tests(&mut test, &[])?).and(examples::run()?))
}

/// Packages with models, and the arguments that select these.
const MODELS: &[(&str, &[&str])] = &[
    ("pvio-ring", &["--test", "loom_notify"]),
    ("pvio-runtime", &["--test", "loom"]),
    ("pvio-event-channel", &["--test", "loom"]),
    ("pvio-netback", &["--features", "std", "--lib", "model::"]),
    ("pvio-ports", &["--lib", "model::"]),
    ("pvio-storage", &["--lib", "model::"]),
];

/// Builds and runs the loom models of the protocols between threads and domains. They have a
/// separate target directory, since the flag would cause a rebuild of everything in the other one,
/// and are built without link-time optimization, which takes longer than it saves.
pub fn loom() -> Result<Report> {
    let mut report = Report::default();
    for (package, select) in MODELS {
        let mut test = exec::cargo();
        test.args(["test", "--release", "--package", package]).args(*select);
        test.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", exec::target().join("loom"));
        test.env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        report = report.and(tests(&mut test, &[])?);
    }
    Ok(report)
}

/// Rounds of about 20 kills in the long checks.
const KILL_ROUNDS: &str = "28";

/// Kills processes of disks while their data is verified: more than 500 at random moments, and one at
/// each system call of a poll and each instruction that publishes responses.
pub fn kills() -> Result<Report> {
    let mut test = exec::cargo();
    test.args(["test", "--package", "pvio", "--all-features", "--test", "kills"]);
    tests(test.env("PVIO_KILL_ROUNDS", KILL_ROUNDS), &["--nocapture"])
}

/// Runs a command that counts as one test.
pub fn plain(command: &mut Command) -> Result<Report> {
    let ran = exec::run(command, DEADLINE)?;
    if ran.status.success() {
        return Ok(Report::passed());
    }
    Ok(Report::failed(format!("{}: {}\n{}", exec::shown(command), ran.status, ran.output)))
}

/// Runs a `cargo test` whose tests are counted individually.
pub fn tests(command: &mut Command, more: &[&str]) -> Result<Report> {
    let mut report = counted(command.args(["--", "--show-output"]).args(more))?;
    if report.counts.passed + report.counts.failed == 0 {
        report.counts.failed = 1;
        report.trouble += "no test passed: that is no success\n";
    }
    Ok(report)
}

/// Runs a command that prints the results of tests as their harness does.
pub fn counted(command: &mut Command) -> Result<Report> {
    let ran = exec::run(command, DEADLINE)?;
    let tally = tally::read(&ran.output);
    let mut report = Report { counts: tally.counts, notes: tally.skipped, ..Report::default() };
    if !ran.status.success() {
        // A build error or a crash of a test program is not in the counts of the output.
        report.counts.failed = report.counts.failed.max(1);
    }
    if report.counts.failed > 0 {
        let output = tally::without_successes(&ran.output);
        report.trouble = format!("{}: {}\n{output}", exec::shown(command), ran.status);
    }
    Ok(report)
}
