//! The command line.

use clap::{Parser, Subcommand};
use pvio_daemon::failure::Failure;
use pvio_daemon::{capture, disks, inspect, revive, serve, stats};

/// Split-driver paravirtual I/O, wire-compatible with Xen.
#[derive(Debug, Parser)]
#[command(name = "pvio", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[cfg(feature = "demo")]
    /// Start a hypervisor, a driver domain and a guest; the guest serves the disk's files over HTTP
    Run(pvio_demo::run::RunArgs),
    #[cfg(feature = "demo")]
    /// Write and read back a verified random workload through the whole path (destroys the image)
    Check(pvio_demo::check::CheckArgs),
    /// Tell what a disk is kept in, and whether it can be served
    Inspect(inspect::InspectArgs),
    /// Serve the disks and network interfaces that Xen's toolstack gives to this domain
    Serve(serve::ServeArgs),
    /// Write what passes through a running NIC to a file, for Wireshark and tshark
    Capture(capture::CaptureArgs),
    /// Tell what disks and NICs have done: counters, and why requests and packets were refused
    Stats(stats::StatsArgs),
    /// Give a running guest a disk, on Xen or on a hosted machine
    AttachDisk(Box<disks::args::AttachArgs>),
    /// Take a disk away from a running guest
    DetachDisk(disks::args::DetachArgs),
    /// Change a disk that is served: limits, latency, failures
    SetDisk(disks::args::SetArgs),
    /// List devices: their states, what is behind them, what their ends agreed on
    List(disks::args::ListArgs),
    /// Make a driver domain's backends again, after it came back under its old number
    Revive(revive::ReviveArgs),
    #[cfg(feature = "demo")]
    /// What runs in the child processes
    #[command(hide = true, subcommand)]
    Domain(pvio_demo::domain::DomainCommand),
}

/// What is wrong with the command line, in one line; the usage has many.
#[must_use]
pub fn misuse(e: &clap::Error) -> Failure {
    let text = e.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let what = lines.collect::<Vec<_>>().join(" ");
    if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::input("no command given", "try pvio run --nic, or pvio --help");
    }
    Failure::input(what.trim_start_matches("error: "), "see pvio --help")
}

/// Does what was asked for.
///
/// # Errors
/// A [`Failure`], to be shown.
pub fn execute(command: Command) -> Result<(), Failure> {
    match command {
        #[cfg(feature = "demo")]
        Command::Run(args) => pvio_demo::run::run(&args),
        #[cfg(feature = "demo")]
        Command::Check(args) => pvio_demo::check::check(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Capture(args) => capture::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::AttachDisk(args) => disks::attach::attach(&args),
        Command::DetachDisk(args) => disks::attach::detach(&args),
        Command::SetDisk(args) => disks::change::set(&args),
        Command::List(args) => disks::list::run(&args),
        Command::Revive(args) => revive::run(&args),
        #[cfg(feature = "demo")]
        Command::Domain(command) => {
            pvio_demo::domain::execute(command);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
