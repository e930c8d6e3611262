//! The fuzz targets (`fuzz/`), built with cargo-fuzz on the nightly toolchain and run for a short or a long
//! time, two at a time.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use super::policy::{self, Extension};
use crate::exec::{self, Ran};
use crate::report::Report;

/// Time of each target in the checks.
pub const SHORT: Duration = Duration::from_secs(20);
/// Time of each target in the long checks.
pub const LONG: Duration = Duration::from_secs(10 * 60);

const CARGO_FUZZ: Extension = Extension { name: "cargo-fuzz", version: "0.13.2", features: &[] };

/// Timeout of the build, and what a target may take in addition to its time.
const BUILD: Duration = Duration::from_secs(15 * 60);
const MARGIN: Duration = Duration::from_secs(90);
const AT_ONCE: usize = 2;
/// A target that executes fewer inputs per second does not test anything.
const EXECUTIONS_LEAST: u64 = 1;

/// Limits of each target. libFuzzer reports an input that uses more.
const LIMITS: [&str; 5] = [
    "-rss_limit_mb=1024",
    "-malloc_limit_mb=128",
    "-timeout=10",
    "-max_len=2048",
    "-len_control=0",
];

/// Runs every target for `time`.
pub fn run(time: Duration) -> Result<Report> {
    let targets = targets()?;
    let skipped = |why: String| {
        let mut report = Report::skipped(format!("{} fuzz targets: {why}", targets.len()));
        report.counts.skipped = targets.len();
        Ok(report)
    };
    if let Some(why) = missing_nightly() {
        return skipped(why.into());
    }
    let program = match policy::installed(&CARGO_FUZZ) {
        Ok(program) => program,
        Err(why) => return skipped(why),
    };
    let mut build = self::nightly();
    // The development profile of `fuzz/Cargo.toml`.
    build.arg(program).args(["build", "--dev"]).current_dir(exec::root());
    build.env("CARGO_TERM_COLOR", "never").env_remove("CARGO");
    let built = exec::run(&mut build, BUILD)?;
    if !built.status.success() {
        return Ok(Report::failed(format!(
            "{}: {}\n{}",
            exec::shown(&build),
            built.status,
            built.output
        )));
    }

    let start = start_seed()?;
    println!("    {} targets for {} s each, start seed {start}", targets.len(), time.as_secs());
    let waiting: VecDeque<_> = targets.iter().zip(start..).collect();
    let (waiting, reports) = (Mutex::new(waiting), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let next = waiting.lock().expect("no thread panics").pop_front();
            let Some((target, seed)) = next else { return };
            let report = one(target, seed, time)
                .unwrap_or_else(|error| Report::failed(format!("{error:#}\n")));
            reports.lock().expect("no thread panics").push(report);
        }
    };
    std::thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(work))));
    exec::go_on()?;
    let reports = reports.into_inner().expect("no thread panics");
    Ok(reports.into_iter().fold(Report::default(), Report::and))
}

/// Runs one target, from the inputs of its corpus. New inputs are discarded.
fn one(target: &str, seed: u32, time: Duration) -> Result<Report> {
    let new = tempfile::tempdir().context("a directory for new inputs")?;
    let corpus = folder().join("corpus").join(target);
    let findings = folder().join("artifacts").join(target);
    fs::create_dir_all(&findings)?;
    let mut fuzz = Command::new(built(target));
    fuzz.current_dir(exec::root()).args(LIMITS);
    fuzz.arg(format!("-seed={seed}")).arg(format!("-max_total_time={}", time.as_secs()));
    fuzz.arg(format!("-artifact_prefix={}/", findings.display())).arg("-print_final_stats=1");
    let dictionary = folder().join("dictionaries").join(format!("{target}.dict"));
    if dictionary.is_file() {
        fuzz.arg(format!("-dict={}", dictionary.display()));
    }
    fuzz.arg(new.path()).args(corpus.is_dir().then_some(corpus));
    // As `cargo fuzz run` sets it.
    fuzz.env("ASAN_OPTIONS", "detect_odr_violation=0").env("RUST_BACKTRACE", "1");
    let ran = exec::run(&mut fuzz, time + MARGIN)?;
    let executed = figure(&ran.output, "stat::number_of_executed_units:").unwrap_or(0);
    if !ran.status.success() {
        return Ok(Report::failed(finding(target, seed, &ran)));
    }
    let least = EXECUTIONS_LEAST * time.as_secs();
    if executed < least {
        let few = format!(
            "fuzz target {target}: {executed} inputs executed, at least {least} expected\n"
        );
        return Ok(Report::failed(few));
    }
    let covered =
        ran.output.lines().filter_map(|line| figure(line, " cov: ")).next_back().unwrap_or(0);
    let note = format!("{target}: {executed} inputs, {covered} edges covered, seed {seed}");
    Ok(Report { notes: vec![note], ..Report::passed() })
}

/// Describes a finding, with the command that reproduces it.
fn finding(target: &str, seed: u32, ran: &Ran) -> String {
    let input = ran.output.lines().find_map(|line| line.split_once("Test unit written to ")).map(
        |(_, file)| {
            let file = Path::new(file.trim());
            file.strip_prefix(exec::root()).unwrap_or(file).display().to_string()
        },
    );
    let mut text = format!("fuzz target {target}, seed {seed}: {}\n", ran.status);
    match input {
        Some(input) => {
            text += &format!("reproduce: cargo +nightly fuzz run --dev {target} {input}\n")
        }
        None => text += "libFuzzer wrote no input\n",
    }
    // The panic and its backtrace, not the log of new inputs before it.
    let is_log =
        |line: &&str| line.starts_with('#') && line.contains("\tcov: ") || line.contains(" cov: ");
    let lines: Vec<_> = ran.output.lines().filter(|line| !is_log(line)).collect();
    text + &lines[lines.len().saturating_sub(80)..].join("\n") + "\n"
}

/// Returns the number after `name`.
fn figure(text: &str, name: &str) -> Option<u64> {
    let (_, rest) = text.split_once(name)?;
    rest.trim_start().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Returns the names of the targets.
fn targets() -> Result<Vec<String>> {
    let sources = fs::read_dir(folder().join("fuzz_targets")).context("read fuzz/fuzz_targets")?;
    let mut names = Vec::new();
    for source in sources {
        names.extend(source?.path().file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Returns a seed that differs in each run and is at least 1.
fn start_seed() -> Result<u32> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock")?;
    Ok(1 + (now.as_secs() % 1_000_000_000) as u32)
}

/// Returns why nothing can be built with the nightly toolchain, if there is none.
pub(super) fn missing_nightly() -> Option<&'static str> {
    let ran = nightly().arg("rustc").arg("--version").output();
    let runs = ran.is_ok_and(|ran| ran.status.success());
    (!runs).then_some("no nightly toolchain; `rustup toolchain install nightly`")
}

/// Returns a command that `rustup` executes with the nightly toolchain.
pub(super) fn nightly() -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly"]);
    command
}

fn folder() -> PathBuf {
    exec::root().join("fuzz")
}

fn built(target: &str) -> PathBuf {
    let build =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| folder().join("target"), PathBuf::from);
    build.join(format!("{}-unknown-linux-gnu/debug", std::env::consts::ARCH)).join(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_libfuzzer_are_read() {
        let line = "#8192\tNEW    cov: 1973 ft: 3544 corp: 125/2547b lim: 38 exec/s: 621";
        assert_eq!(figure(line, " cov: "), Some(1973));
        assert_eq!(figure("stat::number_of_executed_units: 24102", "executed_units:"), Some(24102));
        assert_eq!(figure(line, "cover: "), None);
    }

    #[test]
    fn each_target_is_a_program_of_the_fuzz_package() {
        let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
        let names = targets().unwrap();
        assert!(names.len() >= 16);
        let declared = manifest.lines().filter(|line| *line == "[[bin]]").count();
        assert_eq!(declared, names.len());
        for name in names {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        }
    }
}
