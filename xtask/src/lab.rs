//! pvio on real Xen: Xen, a Debian dom0 and stock Debian guests, emulated by QEMU.
//!
//! | module | contents |
//! |---|---|
//! | [`needs`] | requirements of the host: QEMU, apt's lists |
//! | [`cache`] | downloaded files: unpacked packages, Xen and the kernel ready to boot |
//! | [`debs`] | Debian packages, downloaded but not installed |
//! | [`kernel`] | an uncompressed kernel image, modules with their dependencies |
//! | [`kernels`] | older and newer kernels that some guests boot |
//! | [`libs`] | the shared libraries of a program |
//! | [`images`] | the initramfs images of dom0 and the guests |
//! | [`cpio`] | their format |
//! | [`agent`] | the lab's `/init`, and its table of scenarios |
//! | [`boot`] | QEMU running Xen: its console, its end |
//! | [`choose`] | selection of scenarios and of the number of machines |
//! | [`queue`] | the remaining scenarios, and which machine runs the next one |
//! | [`mod@run`] | runs scenarios one after another, in several boots if necessary |
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

/// Commands of the lab.
#[derive(Subcommand)]
pub enum Command {
    /// List all scenarios: backend, guest type, and the tested property.
    List,
    /// Run scenarios and print a table.
    Run {
        /// `NAME`, `NAME:BACKEND`, `NAME:BACKEND:KIND`; an empty part matches all; or `all`.
        scenarios: Vec<String>,
        /// File to write the rows to, as a JSON array.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// The `pvio` to test, instead of building it.
        #[arg(long, value_name = "PATH")]
        pvio: Option<PathBuf>,
        /// Keep consoles and logs, and print their location.
        #[arg(long)]
        keep: bool,
        /// Number of parallel machines, each with a processor and 3 GB; if left out, one or two,
        /// depending on processors and memory.
        #[arg(long, value_name = "N")]
        jobs: Option<usize>,
    },
    /// Boot, and run a shell in dom0 on this terminal; Ctrl-A X ends it.
    Shell {
        /// The `pvio` to include, instead of building it.
        #[arg(long, value_name = "PATH")]
        pvio: Option<PathBuf>,
    },
    /// Only download.
    #[command(hide = true)]
    Fetch,
    /// Only download and build.
    #[command(hide = true)]
    Build,
}

/// Runs a command; returns whether it succeeded.
///
/// # Errors
/// The lab is not available, or a signal requested a stop.
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

/// Runs the scenarios that are checks, each as a test.
///
/// # Errors
/// A signal requested a stop.
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

/// Builds the programs and writes dom0's image into a directory.
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
