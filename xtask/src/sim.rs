//! `cargo xtask sim`: simulations of whole devices, from seeds (`simulator/`).

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec;
use crate::report::Report;

/// Number of seeds in the checks.
const SEEDS: u64 = 20_000;
/// Timeout of that step. Two cores take less than 5 minutes.
const DEADLINE: Duration = Duration::from_secs(30 * 60);
/// The page with the table of planted faults, and the comments around it.
const PAGE: &str = "docs/simulation.md";
const BEGIN: &str = "<!-- written by `cargo xtask sim --planted --write` -->\n";
const END: &str = "<!-- end -->";
/// Environment of the simulator. Memory that a run frees is used by the next one instead of being
/// returned to the kernel: half of the time would be page faults.
const MALLOC: [(&str, &str); 3] = [
    ("MALLOC_MMAP_THRESHOLD_", "1073741824"),
    ("MALLOC_TRIM_THRESHOLD_", "4294967296"),
    ("MALLOC_TOP_PAD_", "16777216"),
];

/// Simulations of whole devices.
#[derive(clap::Args)]
pub struct Args {
    /// Number of seeds to run.
    #[arg(long, value_name = "N", default_value_t = SEEDS)]
    seeds: u64,
    /// Start no seed after this time.
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<f64>,
    /// The first seed; a random one if it is not given.
    #[arg(long, value_name = "SEED")]
    start: Option<u64>,
    /// What to simulate: `disk`, `net` or `all`.
    #[arg(long, default_value = "all")]
    world: String,
    /// Run one seed again, reduce its failure, and print the trace.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// With `--replay`: also print the trace of the whole run.
    #[arg(long, requires = "replay")]
    whole: bool,
    /// Plant each fault, or those named, and print after how many seeds it is found.
    #[arg(long, value_name = "FAULT", num_args = 0..)]
    planted: Option<Vec<String>>,
    /// With `--planted`: write the table of the documentation.
    #[arg(long, requires = "planted")]
    write: bool,
}

/// Builds and runs the simulator. Returns whether nothing failed.
///
/// # Errors
/// It cannot be run, or the table cannot be written.
pub fn run(args: &Args) -> Result<bool> {
    let mut simulator = Command::new(build(args.planted.is_some(), false)?);
    simulator.current_dir(exec::root()).envs(MALLOC);
    simulator.arg("--seeds").arg(args.seeds.to_string()).arg("--world").arg(&args.world);
    let options = [("--start", args.start), ("--replay", args.replay)];
    for (name, value) in options.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        simulator.arg(name).arg(value.to_string());
    }
    simulator.args(args.minutes.iter().flat_map(|m| ["--minutes".to_owned(), m.to_string()]));
    simulator.args(args.whole.then_some("--whole"));
    let scratch = tempfile::tempdir()?;
    let table = scratch.path().join("rows.md");
    if let Some(faults) = &args.planted {
        simulator.arg("--table").arg(&table).arg("--planted").args(faults);
    }
    let done = simulator.status().context("run the simulator")?.success();
    if args.write {
        write(&fs::read_to_string(&table).context("the rows of the simulator")?)?;
    }
    Ok(done)
}

/// Runs the seeds of the checks: other ones each time.
pub fn check() -> Result<Report> {
    let mut simulator = Command::new(build(false, true)?);
    simulator.current_dir(exec::root()).envs(MALLOC).args(["--seeds", &SEEDS.to_string()]);
    let ran = exec::run(&mut simulator, DEADLINE)?;
    if !ran.status.success() {
        return Ok(Report::failed(format!(
            "{}: {}\n{}",
            exec::shown(&simulator),
            ran.status,
            ran.output
        )));
    }
    let notes = ran.output.lines().map(str::to_owned).collect();
    Ok(Report { notes, ..Report::passed() })
}

/// Builds the simulator and returns its path. Planted faults have a separate target directory, since
/// the flag would cause a rebuild of everything in the other one.
fn build(planted: bool, quietly: bool) -> Result<PathBuf> {
    let target = if planted { exec::target().join("planted") } else { exec::target() };
    let mut build = exec::cargo();
    build.args(["build", "--profile", "sim", "--package", "pvio-simulator"]);
    build.env("CARGO_TARGET_DIR", &target);
    if planted {
        build.env("RUSTFLAGS", "--cfg pvio_planted");
    }
    if quietly {
        exec::succeed(&mut build, DEADLINE)?;
    } else if !build.status().context("run cargo")?.success() {
        bail!("the simulator does not build");
    }
    Ok(target.join("sim/pvio-simulator"))
}

/// Writes the table of planted faults.
fn write(rows: &str) -> Result<()> {
    let page = exec::root().join(PAGE);
    let text = fs::read_to_string(&page).context(PAGE)?;
    fs::write(&page, with_rows(&text, rows).with_context(|| format!("{PAGE}: no {BEGIN}"))?)
        .context(PAGE)
}

/// Returns the page with other rows in its table.
fn with_rows(page: &str, rows: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    let head = "| fault | what it changes | seeds |\n|---|---|---|\n";
    Some(format!("{before}{BEGIN}{head}{rows}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_replace_those_of_the_page() {
        let page = format!("# A\n{BEGIN}| old |\n{END}\n## B\n");
        let new = with_rows(&page, "| new |\n").unwrap();
        assert!(
            new.contains("|---|\n| new |\n<!-- end -->\n## B") && !new.contains("old"),
            "{new}"
        );
        assert_eq!(with_rows("# A\n", ""), None);
    }
}
