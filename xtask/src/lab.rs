//! pvio against real Xen: Xen, a Debian dom0 and stock Debian guests, emulated by QEMU.
//!
//! | module | holds |
//! |---|---|
//! | [`needs`] | what the host must have: QEMU, apt's lists |
//! | [`cache`] | what was fetched: packages unpacked, Xen and the kernel ready to boot |
//! | [`debs`] | Debian's packages, downloaded and never installed |
//! | [`kernel`] | a plain kernel image, modules with what they need |
//! | [`kernels`] | older and newer kernels that some guests boot |
//! | [`libs`] | the libraries a program needs |
//! | [`images`] | what is in dom0's and the guests' memory at the start |
//! | [`cpio`] | the format of that |
//! | [`agent`] | the lab's `/init`, and the table of scenarios it knows |
//! | [`boot`] | QEMU running Xen: its console, its end |
//! | [`choose`] | which scenarios, and on how many machines |
//! | [`queue`] | what is left of them, and which machine runs what next |
//! | [`mod@run`] | scenarios one after another, boot after boot |
//! | [`report`] | the table and the JSON |
//! | [`mod@bench`] | `cargo xtask bench xen` |

mod agent;
pub mod bench;
mod boot;
pub mod cache;
mod choose;
mod cpio;
mod debs;
mod images;
mod kernel;
mod kernels;
mod libs;
mod needs;
mod queue;
mod report;
mod run;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Subcommand;

use crate::exec;
use crate::report::Report;
use boot::Machine;
use cache::Cache;
use images::Programs;

/// What to do with the lab.
#[derive(Subcommand)]
pub enum Command {
    /// List every scenario: whose backend, what kind of guest, what it shows.
    List,
    /// Run scenarios and print a table.
    Run {
        /// `NAME`, `NAME:BACKEND`, `NAME:BACKEND:KIND`, with empty words for any; or `all`.
        scenarios: Vec<String>,
        /// Where the rows go, as a JSON array.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// The command to test, instead of building it.
        #[arg(long, value_name = "PATH")]
        pvio: Option<PathBuf>,
        /// Keep consoles and logs, and say where.
        #[arg(long)]
        keep: bool,
        /// Machines at once, each with a processor and 3 GB; as many as there is room for, up to
        /// two, if left out.
        #[arg(long, value_name = "N")]
        jobs: Option<usize>,
    },
    /// Boot and give this terminal a shell in dom0; Ctrl-A X leaves.
    Shell {
        /// The command to put in, instead of building it.
        #[arg(long, value_name = "PATH")]
        pvio: Option<PathBuf>,
    },
    /// Only fetch.
    #[command(hide = true)]
    Fetch,
    /// Only fetch and build.
    #[command(hide = true)]
    Build,
}

/// Does it. True if all went well.
///
/// # Errors
/// The lab cannot be had, or was interrupted.
pub fn run(command: Command) -> Result<bool> {
    match command {
        Command::List => {
            print!("{}", report::list(&agent::cases()?));
            Ok(true)
        }
        Command::Run { scenarios, json, pvio, keep, jobs } => {
            let jobs = jobs.unwrap_or_else(choose::jobs);
            let options = run::Options { json, pvio, keep, jobs, bench: false };
            match run::scenarios(&scenarios, &options)? {
                Ok(rows) => Ok(rows.iter().all(report::Row::good)),
                Err(why) => {
                    println!("SKIPPED: {why}");
                    Ok(true)
                }
            }
        }
        Command::Shell { pvio } => shell(pvio),
        Command::Fetch => with_lab(|| Cache::fill().map(drop)),
        Command::Build => with_lab(|| {
            let dir = tempfile::tempdir()?;
            write_image(&Cache::fill()?, None, dir.path()).map(drop)
        }),
    }
}

/// All scenarios, each a check.
///
/// # Errors
/// Interrupted.
pub fn check(install: bool) -> Result<Report> {
    let jobs = choose::jobs();
    let options = run::Options { json: None, pvio: None, keep: false, jobs, bench: false };
    run::check(install, &options)
}

fn with_lab(work: impl FnOnce() -> Result<()>) -> Result<bool> {
    if let Some(why) = needs::ensure(true)? {
        println!("SKIPPED: {why}");
        return Ok(false);
    }
    work().map(|()| true)
}

fn shell(pvio: Option<PathBuf>) -> Result<bool> {
    with_lab(|| {
        let cache = Cache::fill()?;
        let dir = tempfile::Builder::new().prefix("pvio-lab-").tempdir()?;
        let image = write_image(&cache, pvio, dir.path())?;
        let share = std::env::current_dir()?;
        println!("dom0 comes up in half a minute; its /share is {}", share.display());
        let words = "pvio.shell";
        let machine = Machine { cache: &cache, image: &image, share: &share, words, icount: false };
        machine.interactive(dir.path()).map(drop)
    })
}

/// Builds what is to be put in and writes dom0's image into a folder.
fn write_image(cache: &Cache, pvio: Option<PathBuf>, dir: &Path) -> Result<PathBuf> {
    let pvio = match pvio {
        Some(pvio) => pvio,
        None => exec::pvio()?,
    };
    let programs = Programs { agent: agent::build()?, pvio: Some(pvio) };
    let image = dir.join("dom0.cpio");
    images::write(cache, &programs, &image)?;
    Ok(image)
}
