//! `pvio-bench SUITE [--json FILE] [--runs N]`: the measurements behind `cargo xtask bench`.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::process::Command;

#[derive(Parser)]
#[command(about = "Measures pvio against the raw limit of this machine, by turns")]
struct Args {
    /// What to measure.
    suite: Suite,
    /// Where to write the rows, as a JSON array.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Pairs per case.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Where to keep scratch files; the file system whose page cache is measured.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Suite {
    Disk,
    Net,
    Ring,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if matches!(args.suite, Suite::Net) && std::env::var_os(INSIDE).is_none() {
        return enter_namespace();
    }
    let parent = args.dir.unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::tempdir_in(&parent).with_context(|| {
        format!("no scratch folder in {}; name one with --dir", parent.display())
    })?;
    let runs = usize::from(args.runs);
    let rows = match args.suite {
        Suite::Disk => pvio_benches::disk::run(dir.path(), runs)?,
        Suite::Net => pvio_benches::net::run(dir.path(), runs)?,
        Suite::Ring => pvio_benches::ring::run(dir.path(), runs)?,
    };
    for r in &rows {
        println!(
            "{:5} {:32} {:>12.1} {:>12.1} {:9} {:16} {:.3} [{:.3}-{:.3}]",
            r.suite,
            r.case,
            r.ours,
            r.reference,
            r.unit,
            r.reference_name,
            r.ratio,
            r.ratio_min,
            r.ratio_max
        );
    }
    if let Some(path) = args.json {
        std::fs::write(&path, serde_json::to_vec_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Set once this program runs in a network namespace of its own.
const INSIDE: &str = "PVIO_BENCH_NETNS";

/// Runs this program again where it may make interfaces and disturbs nobody.
fn enter_namespace() -> Result<()> {
    let mut command = Command::new("unshare");
    if !rustix::process::getuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.arg("--net").arg(std::env::current_exe()?).args(std::env::args_os().skip(1));
    let status = command.env(INSIDE, "1").status().context("unshare (util-linux) is needed")?;
    anyhow::ensure!(status.success(), "the net suite failed: {status}");
    Ok(())
}
