//! Every check of the project, one command.
//!
//! | module | holds |
//! |---|---|
//! | `test` | `cargo xtask test`: the steps, how they are counted, the closing line |
//! | `e2e` | the last of those steps: the real command, a real image, a real guest |
//! | `lab` | pvio against real Xen, emulated |
//! | `bench` | `cargo xtask bench`: pvio beside its references, as a table and as JSON |
//! | `report` | what came of a step, and the sum of several |
//! | `samples` | QEMU's own sample images |
//! | `tools` | what the checks need of the machine, and how it gets there |
//! | `exec` | programs run with their output captured, a deadline, and no survivors |
#![forbid(unsafe_code)]

mod bench;
mod e2e;
mod exec;
mod lab;
mod report;
mod samples;
mod test;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Every check of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the checks, all or those named, and close with `N passed, N failed, N skipped`.
    Test {
        /// The steps to run.
        #[arg(value_enum)]
        steps: Vec<test::Step>,
        /// Never install a missing Debian package, even as root.
        #[arg(long)]
        no_install: bool,
    },
    /// Real Xen with stock guests, emulated: run scenarios, or look around.
    #[command(subcommand)]
    Lab(lab::Command),
    /// Measure pvio beside its references on this machine.
    Bench {
        /// What to measure: `disk`, `net` or `ring`, or `xen`: a stock guest's in the lab.
        suite: String,
        /// Where the rows go, as a JSON array.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// More arguments for pvio-bench: `-- --runs 3`.
        #[arg(last = true)]
        more: Vec<String>,
    },
}

fn main() -> ExitCode {
    exec::stop_on_signals();
    let outcome = match Args::parse().command {
        Command::Test { steps, no_install } => test::run(&steps, !no_install),
        Command::Lab(command) => lab::run(command),
        Command::Bench { suite, json, more } if suite == "xen" => {
            lab::bench::run(json.as_deref(), &more)
        }
        Command::Bench { suite, json, more } => bench::run(&suite, json.as_deref(), &more),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
