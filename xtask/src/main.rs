//! All checks of the project, in one command.
//!
//! | module | contents |
//! |---|---|
//! | `test` | `cargo xtask test`: the steps, how tests are counted, the summary line |
//! | `e2e` | end-to-end tests: the real command, a real image, a hosted guest |
//! | `lab` | pvio on real Xen, emulated |
//! | `sim` | `cargo xtask sim`: simulations from seeds, planted faults |
//! | `bench` | `cargo xtask bench`: pvio compared with its references, as a table and as JSON |
//! | `report` | the result of a step, and the sum of several |
//! | `samples` | QEMU's own sample images |
//! | `tools` | Debian packages that the checks need, and their installation |
//! | `exec` | running programs with captured output and a deadline |
#![forbid(unsafe_code)]

mod bench;
mod e2e;
mod exec;
mod lab;
mod report;
mod samples;
mod sim;
mod test;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// All checks of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run all checks, or those named, and print `N passed, N failed, N skipped`.
    Test {
        /// The steps to run.
        #[arg(value_enum)]
        steps: Vec<test::Step>,
        /// Do not install missing Debian packages, even as root.
        #[arg(long)]
        no_install: bool,
    },
    /// Write the tables of the documentation that `cargo xtask test layers` compares.
    Tables,
    /// Real Xen with stock guests, emulated: run scenarios, or a shell.
    #[command(subcommand)]
    Lab(lab::Command),
    /// Simulate guests, backends and their faults, from seeds.
    Sim(sim::Args),
    /// Measure pvio and its references on this machine.
    Bench {
        /// The suite: `disk`, `net` or `ring`, or `xen` for a stock guest in the lab.
        suite: String,
        /// File to write the rows to, as a JSON array.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Further arguments of pvio-bench: `-- --runs 3`.
        #[arg(last = true)]
        more: Vec<String>,
    },
}

fn main() -> ExitCode {
    exec::stop_on_signals();
    let outcome = match Args::parse().command {
        Command::Test { steps, no_install } => test::run(&steps, !no_install),
        Command::Tables => test::write_tables().map(|()| true),
        Command::Lab(command) => lab::run(command),
        Command::Sim(args) => sim::run(&args),
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
