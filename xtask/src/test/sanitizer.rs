//! AddressSanitizer over the tests of the packages with `unsafe` code, on the nightly toolchain. The standard
//! library is not instrumented: that needs its source, which a toolchain need not have.

use anyhow::Result;

use super::{fuzz, steps, units};
use crate::exec;
use crate::report::Report;

/// Packages with `unsafe` code, and the tests of them that run.
const PACKAGES: &[(&str, &[&str])] = &[
    ("pvio-ring", &["--lib", "--tests"]),
    ("pvio-grant-table", &["--lib", "--tests"]),
    ("pvio-event-channel", &["--lib", "--tests"]),
    ("pvio-runtime", &["--lib", "--tests"]),
    ("pvio-hosted", &["--lib", "--tests"]),
    ("pvio-storage", &["--lib"]),
    ("pvio-ports", &["--lib"]),
];

/// Builds and runs them. They have a separate target directory, since the flag would cause a rebuild of
/// everything in the other one.
pub fn run() -> Result<Report> {
    if let Some(why) = fuzz::missing_nightly() {
        let mut skipped = Report::skipped(format!("AddressSanitizer: {why}"));
        skipped.counts.skipped = PACKAGES.len();
        return Ok(skipped);
    }
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut report = Report::default();
    for (package, select) in PACKAGES {
        let mut test = fuzz::nightly();
        test.args(["cargo", "test", "--no-fail-fast", "--all-features", "--package", package]);
        // With a target, the flag does not apply to build scripts and procedural macros.
        test.args(*select).args(["--target", &target]);
        test.env("RUSTFLAGS", "-Zsanitizer=address").env_remove("CARGO");
        test.env("CARGO_TARGET_DIR", exec::target().join("asan")).current_dir(exec::root());
        report = report.and(steps::tests(&mut test, &["--skip", units::LOOM_NOT_BUILT])?);
    }
    Ok(report)
}
