//! The unit and integration tests of the workspace.
//!
//! `cargo test` runs one test program after the other, and many wait for something most of the time.
//! Here cargo builds them, and several run at a time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Report;
use super::steps::{DEADLINE, counted, plain};
use crate::{exec, samples};

/// The test that replaces the model in builds without loom; the step `loom` builds and runs the
/// model.
pub const LOOM_NOT_BUILT: &str = "model_checking_was_not_built";
/// Test programs that are started first, since they take longest.
const LONGEST: &[&str] = &["power", "fs", "disks", "broken"];
/// Programs whose durations are printed.
const SHOWN: usize = 8;

/// A test program.
struct Program {
    name: String,
    path: PathBuf,
    /// The name of its package.
    of: String,
    /// The directory of its package, in which cargo runs it.
    package: PathBuf,
}

/// The fields of a line of cargo's output that are used.
#[derive(Deserialize)]
struct Artifact {
    package_id: String,
    executable: Option<PathBuf>,
    manifest_path: PathBuf,
    target: Target,
    profile: Profile,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Runs all unit and integration tests of the workspace.
pub fn unit() -> Result<Report> {
    let built = plain(&mut build())?;
    if built.counts.failed > 0 {
        return Ok(built);
    }
    let list = exec::succeed(build().args(["--quiet", "--message-format=json"]), DEADLINE)?;
    let mut programs = programs(&list)?;
    // The next one is taken from the end.
    programs.sort_by_key(|program| LONGEST.contains(&program.name.as_str()));
    let samples = match samples::fetch() {
        Ok(dir) => Some(dir),
        // The test that needs the images reports that it was skipped.
        Err(error) => {
            println!("    QEMU's sample images: {error:#}");
            None
        }
    };
    let (left, done) = (Mutex::new(programs), Mutex::new(Vec::new()));
    let work = || -> Result<Report> {
        let mut report = Report::default();
        loop {
            let Some(program) = left.lock().expect("no panic").pop() else { return Ok(report) };
            let begin = Instant::now();
            report = report.and(run(&program, samples.as_deref())?);
            done.lock().expect("no panic").push((begin.elapsed(), program.name));
        }
    };
    let count = available_parallelism().map_or(1, usize::from);
    let reports: Vec<Result<Report>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("no panic")).collect()
    });
    let mut report = Report::default();
    for one in reports {
        report = report.and(one?);
    }
    if report.counts.passed == 0 {
        report = report.and(Report::failed("no test passed: that is no success\n"));
    }
    show(done.into_inner().expect("no panic"));
    Ok(report)
}

fn build() -> Command {
    let mut build = exec::cargo();
    build.args(["test", "--workspace", "--all-features", "--lib", "--bins", "--tests"]);
    build.args(["--examples", "--no-run"]);
    build
}

/// Returns the test programs that cargo lists.
fn programs(list: &str) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for line in list.lines().filter(|line| line.contains(r#""reason":"compiler-artifact""#)) {
        let artifact: Artifact = serde_json::from_str(line).context("a line of cargo's output")?;
        let Some(path) = artifact.executable.filter(|_| artifact.profile.test) else { continue };
        let package = artifact.manifest_path.parent().map(Path::to_path_buf).unwrap_or_default();
        let of = package_name(&artifact.package_id).to_owned();
        programs.push(Program { name: artifact.target.name, path, of, package });
    }
    Ok(programs)
}

/// Returns the name in a package's identifier: `…/dir#name@version`, or `…/name#version`.
fn package_name(id: &str) -> &str {
    let (place, end) = id.rsplit_once('#').unwrap_or((id, id));
    match end.split_once('@') {
        Some((name, _)) => name,
        None => place.rsplit('/').next().unwrap_or(place),
    }
}

fn run(program: &Program, samples: Option<&Path>) -> Result<Report> {
    let mut test = Command::new(&program.path);
    test.current_dir(&program.package).env("CARGO_MANIFEST_DIR", &program.package);
    test.env("CARGO_PKG_NAME", &program.of).env("CARGO_TERM_COLOR", "never");
    if let Some(dir) = samples {
        test.env("PVIO_QEMU_SAMPLES", dir);
    }
    counted(test.args(["--show-output", "--skip", LOOM_NOT_BUILT]))
}

/// Prints the programs that took longest.
fn show(mut done: Vec<(Duration, String)>) {
    done.sort();
    let longest = done.iter().rev().take(SHOWN);
    let longest: Vec<_> =
        longest.map(|(took, name)| format!("{name} {:.0} s", took.as_secs_f64())).collect();
    println!("    {} test programs; longest: {}", done.len(), longest.join(", "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_names_are_found_in_both_forms_of_identifiers() {
        assert_eq!(package_name("path+file:///a/b#pvio-b@0.1.0"), "pvio-b");
        assert_eq!(package_name("path+file:///a/xtask#0.1.0"), "xtask");
    }

    #[test]
    fn test_programs_are_those_with_test_profile_and_executable() {
        let line = |name: &str, executable: &str, test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///a/b#pvio-b@0.1.0","manifest_path":"/a/b/Cargo.toml","target":{{"kind":["lib"],"name":"{name}"}},"profile":{{"opt_level":"1","test":{test}}},"executable":{executable},"fresh":true}}"#
            )
        };
        let list = [
            line("library", "null", false),
            line("program", r#""/t/program""#, false),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
            line("tests", r#""/t/tests-1""#, true),
        ]
        .join("\n");
        let programs = programs(&list).unwrap();
        assert_eq!(programs.len(), 1);
        let program = &programs[0];
        assert_eq!((&*program.name, &*program.of), ("tests", "pvio-b"));
        assert_eq!(program.path, Path::new("/t/tests-1"));
        assert_eq!(program.package, Path::new("/a/b"));
    }
}
