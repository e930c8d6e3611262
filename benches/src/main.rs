//! `pvio-bench SUITE [--json FILE] [--runs N]`: the measurements behind `cargo xtask bench`.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use pvio_benches::netns;
use std::path::PathBuf;

#[derive(Parser)]
#[command(about = "Measures pvio against the raw limit of this machine, by turns")]
struct Args {
    /// The suite to run.
    suite: Suite,
    /// File to write the rows to, as a JSON array.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Number of pairs per case.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Only cases whose name contains this text.
    #[arg(long, default_value = "")]
    only: String,
    /// Directory of temporary files; it selects the file system whose page cache is measured.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Suite {
    Disk,
    Net,
    Ring,
    Neighbours,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if matches!(args.suite, Suite::Net | Suite::Neighbours) && netns::outside() {
        return netns::enter();
    }
    let parent = args.dir.unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::tempdir_in(&parent).with_context(|| {
        format!("no scratch folder in {}; name one with --dir", parent.display())
    })?;
    let runs = usize::from(args.runs);
    let rows = match args.suite {
        Suite::Disk => pvio_benches::disk::run(dir.path(), runs, &args.only)?,
        Suite::Net => pvio_benches::net::run(dir.path(), runs, &args.only)?,
        Suite::Ring => pvio_benches::ring::run(dir.path(), runs)?,
        Suite::Neighbours => pvio_benches::neighbours::run(dir.path(), runs, &args.only)?,
    };
    for r in &rows {
        print!(
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
        if let Some(cpu) = r.cpu {
            print!(
                " cpu {:.0} ns (worker {:.0}), reference {:.0} ns",
                cpu.ours_cpu, cpu.worker_cpu, cpu.reference_cpu
            );
        }
        println!();
    }
    if let Some(path) = args.json {
        std::fs::write(&path, serde_json::to_vec_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
