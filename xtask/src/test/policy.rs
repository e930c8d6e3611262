//! Steps that run extensions of cargo, which they install: the policy for dependencies
//! (`deny.toml`), and compatibility with the last release.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::exec;
use crate::report::Report;

const DEADLINE: Duration = Duration::from_secs(15 * 60);
/// For what a server may answer late or never.
const FETCH: Duration = Duration::from_secs(2 * 60);

/// An extension of cargo.
pub struct Extension {
    pub name: &'static str,
    pub version: &'static str,
    /// Arguments that leave out what the checks do not use.
    pub features: &'static [&'static str],
}

const DENY: Extension =
    Extension { name: "cargo-deny", version: "0.20.2", features: &["--no-default-features"] };

const SEMVER: Extension =
    Extension { name: "cargo-semver-checks", version: "0.51.0", features: &[] };

/// Parts of cargo-deny's messages about an advisory database that it could not fetch.
const NO_DATABASE: [&str; 2] = ["failed to fetch advisory database", "unable to load advisory"];

/// Checks licences, bans and sources of all dependencies; and advisories, if their database can be
/// fetched.
pub fn deny() -> Result<Report> {
    let program = match installed(&DENY) {
        Ok(program) => program,
        Err(why) => return Ok(Report::skipped(why)),
    };
    let check = |what: &[&str], deadline| {
        let mut deny = Command::new(&program);
        deny.current_dir(exec::root()).args(["--all-features", "--color", "never", "check"]);
        exec::run(deny.args(what), deadline)
    };
    let policy = check(&["licenses", "bans", "sources"], DEADLINE)?;
    let report = if policy.status.success() {
        Report::passed()
    } else {
        Report::failed(format!("cargo deny: {}\n{}", policy.status, policy.output))
    };
    let no_database = || {
        Report::skipped(
            "cargo deny check advisories: the database cannot be fetched; is there a network?",
        )
    };
    Ok(report.and(match check(&["advisories"], FETCH) {
        Ok(ran) if ran.status.success() => Report::passed(),
        Ok(ran) if !NO_DATABASE.iter().any(|words| ran.output.contains(words)) => {
            Report::failed(format!("cargo deny: {}\n{}", ran.status, ran.output))
        }
        _ => no_database(),
    }))
}

/// Compares the libraries with the last release, the newest tag `v*`.
pub fn semver() -> Result<Report> {
    let mut tags = Command::new("git");
    tags.current_dir(exec::root()).args(["tag", "--list", "v*", "--sort=-version:refname"]);
    let tags = exec::succeed(&mut tags, FETCH)?;
    let Some(release) = tags.lines().next() else {
        return Ok(Report::skipped(
            "cargo semver-checks: no tag v* to compare with; `git fetch --tags`",
        ));
    };
    let program = match installed(&SEMVER) {
        Ok(program) => program,
        Err(why) => return Ok(Report::skipped(why)),
    };
    let mut semver = Command::new(program);
    semver.current_dir(exec::root()).env("CARGO_TERM_COLOR", "never");
    semver.args(["semver-checks", "--workspace", "--baseline-rev", release]);
    let ran = exec::run(&mut semver, DEADLINE)?;
    Ok(if ran.status.success() {
        Report::passed()
    } else {
        Report::failed(format!("{}: {}\n{}", exec::shown(&semver), ran.status, ran.output))
    })
}

/// Returns the program of an extension; builds it first if necessary. The error says why that
/// failed, and the remedy.
pub fn installed(extension: &Extension) -> Result<PathBuf, String> {
    let Extension { name, version, features } = extension;
    let tools = exec::target().join("tools");
    let root = tools.join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    if program.is_file() {
        return Ok(program);
    }
    let mut install = exec::cargo();
    install.args(["install", "--quiet", "--locked", name, "--version", version]).args(*features);
    install.arg("--root").arg(&root);
    // The build takes longer than all runs: unoptimised, it takes a third of the time.
    install.env("CARGO_TARGET_DIR", tools.join("build"));
    for (key, value) in
        [("OPT_LEVEL", "0"), ("LTO", "off"), ("CODEGEN_UNITS", "16"), ("DEBUG", "0")]
    {
        install.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    let why = match exec::run(&mut install, DEADLINE) {
        Ok(ran) if ran.status.success() => return Ok(program),
        Ok(ran) => ran.output,
        Err(error) => format!("{error:#}"),
    };
    let last: Vec<&str> = why.trim_end().lines().rev().take(3).collect();
    let last: Vec<&str> = last.into_iter().rev().map(str::trim).collect();
    Err(format!(
        "{name} {version} cannot be installed: {}; is a registry reachable?",
        last.join(": ")
    ))
}
