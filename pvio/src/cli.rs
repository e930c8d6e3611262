//! The command line.

use clap::{Parser, Subcommand};
use pvio_daemon::failure::Failure;
use pvio_daemon::process::helper;
use pvio_daemon::process::run::{self, ProcessArgs};
use pvio_daemon::{capture, confinement, disks, inspect, revive, serve, stats, upgrade};
use pvio_xen_linux::XenDomain;

/// Split-driver paravirtual I/O, wire-compatible with Xen.
#[derive(Debug, Parser)]
#[command(name = "pvio", version, about)]
pub struct Cli {
    /// The command.
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
    /// Show the format, size and chain of a disk image, and whether it can be served
    Inspect(inspect::InspectArgs),
    /// Serve the disks and network interfaces that Xen's toolstack assigns to this domain
    Serve(Box<serve::ServeArgs>),
    /// Write the packets of a running NIC to a file, for Wireshark and tshark
    Capture(capture::CaptureArgs),
    /// Show counters of disks and NICs, including the reasons for which requests and packets were
    /// rejected
    Stats(stats::StatsArgs),
    /// Show the processes of devices and the layers of their confinement
    Confinement(confinement::ConfinementArgs),
    /// Let another pvio take the place of the running one, without a reconnection of the guests
    Upgrade(upgrade::command::UpgradeArgs),
    /// Attach a disk to a running guest, on Xen or on a hosted machine
    AttachDisk(Box<disks::args::AttachArgs>),
    /// Detach a disk from a running guest
    DetachDisk(disks::args::DetachArgs),
    /// Change the settings of a disk that is being served: limits, latency, failures
    SetDisk(Box<disks::args::SetArgs>),
    /// List devices: their states, images and negotiated features
    List(disks::args::ListArgs),
    /// Create a driver domain's backends again, after it was restored under its old number
    Revive(revive::ReviveArgs),
    /// A process that the daemon starts
    #[command(hide = true)]
    Process(ProcessArgs),
    #[cfg(feature = "demo")]
    /// The processes that a hosted machine consists of
    #[command(hide = true, subcommand)]
    Domain(pvio_demo::domain::DomainCommand),
}

/// Returns the error of the command line without clap's usage text, with the remedy of the value's
/// error if it has one.
#[must_use]
pub fn misuse(e: &clap::Error) -> Failure {
    let text = e.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let what = lines.collect::<Vec<_>>().join(" ");
    if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::input("no command was given", "see pvio --help");
    }
    let remedy = std::error::Error::source(e).and_then(disks::args::remedy);
    let remedy = remedy.unwrap_or_else(|| "see pvio --help".into());
    Failure::input(what.trim_start_matches("error: "), remedy)
}

/// Runs a command.
///
/// # Errors
/// A [`Failure`], to be shown to the user.
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
        Command::Confinement(args) => confinement::run(&args),
        Command::Upgrade(args) => upgrade::command::run(&args),
        Command::AttachDisk(args) => disks::attach::attach(&args),
        Command::DetachDisk(args) => disks::attach::detach(&args),
        Command::SetDisk(args) => disks::change::set(&args),
        Command::List(args) => disks::list::run(&args),
        Command::Revive(args) => revive::run(&args),
        Command::Process(args) => process(&args),
        #[cfg(feature = "demo")]
        Command::Domain(command) => {
            pvio_demo::domain::execute(command);
            Ok(())
        }
    }
}

/// Runs a process of the daemon.
fn process(args: &ProcessArgs) -> Result<(), Failure> {
    match (args.first.as_str(), args.second) {
        (helper::COMMAND, None) => run::image_helper(),
        (upgrade::versions::COMMAND, None) => {
            upgrade::versions::print();
            Ok(())
        }
        ("xen", Some(kind)) => run::device::<XenDomain>(kind),
        #[cfg(feature = "demo")]
        ("hosted", Some(kind)) => run::device::<pvio_demo::Domain>(kind),
        _ => Err(Failure::input("no such process", "pvio serve starts this command")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_definition_is_valid() {
        Cli::command().debug_assert();
    }
}
