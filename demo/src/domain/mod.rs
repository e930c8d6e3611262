//! The child processes, each of which is one domain.
//!
//! | module | contents |
//! |---|---|
//! | [`driver`] | the driver domain: backends for every device that the toolstack creates |
//! | [`guest`] | the guest that serves the disk over HTTP |
//! | [`hotplug`] | disks that are attached to the guest while it runs |
//! | [`work`] | the guest that checks the disk |
//! | [`disk`] | a disk attached through the frontend driver, as the guest reads it |
//! | [`nic`] | a NIC attached through the frontend driver, as the guest's TCP stack uses it |
//! | [`watcher`] | states of the guest's devices in xenstore |
//!
//! A child process reports to its parent in lines on its standard output: [`ChildMessage`].

pub mod disk;
pub mod driver;
pub mod guest;
pub mod hotplug;
pub mod nic;
pub mod watcher;
pub mod work;

use crate::machine::home::private;
use clap::{Args, Subcommand};
use pvio_daemon::failure::{Failure, one_line};
use pvio_daemon::upgrade::stage::Stage;
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, JoinError};
use pvio_recordfile::PrivateDir;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::exit;
use std::time::{Duration, Instant};

/// How long a domain may still be that of a predecessor, and the interval of attempts to join it.
const TAKEN_TIMEOUT: Duration = Duration::from_secs(3);
const TAKEN_INTERVAL: Duration = Duration::from_millis(5);

/// The hidden commands that the parent starts.
#[derive(Debug, Subcommand)]
pub enum DomainCommand {
    /// The driver domain
    Driver(driver::DriverArgs),
    /// The guest that serves HTTP
    Guest(guest::GuestArgs),
    /// The guest that checks the disk
    Check(work::WorkArgs),
}

/// Arguments of all child processes.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Directory of the hypervisor's sockets and the logs
    #[arg(long)]
    pub state_dir: PathBuf,
    /// The number of the domain
    #[arg(long)]
    pub domid: u16,
    /// The parent's process id; without the parent, the child exits
    #[arg(long)]
    pub parent: i32,
}

/// A message from a child to its parent, one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildMessage {
    /// The child is running and serves.
    Ready,
    /// The child ends because of this failure.
    Failed(Failure),
    /// The result of a check, as JSON.
    Report(String),
    /// A notice for the user.
    Note(String),
}

impl ChildMessage {
    /// Formats the line.
    #[must_use]
    pub fn emit(&self) -> String {
        match self {
            Self::Ready => "ready".into(),
            Self::Failed(f) => {
                format!("failed\t{}\t{}\t{}", f.code, one_line(&f.what), one_line(&f.remedy))
            }
            Self::Note(text) => format!("note\t{}", one_line(text)),
            Self::Report(json) => format!("report\t{}", one_line(json)),
        }
    }

    /// Parses a line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once('\t').unwrap_or((line, ""));
        match word {
            "ready" => Some(Self::Ready),
            "note" => Some(Self::Note(rest.to_owned())),
            "report" => Some(Self::Report(rest.to_owned())),
            "failed" => {
                let mut parts = rest.splitn(3, '\t');
                let code = parts.next()?.parse().ok()?;
                let (what, remedy) = (parts.next()?, parts.next()?);
                Some(Self::Failed(Failure { code, ..Failure::new(what, remedy) }))
            }
            _ => None,
        }
    }

    /// Writes the line to standard output, for the parent.
    pub fn send(&self) {
        let mut out = std::io::stdout().lock();
        // A failure means that the parent is gone, and then the kernel kills this process.
        let _ = writeln!(out, "{}", self.emit());
        let _ = out.flush();
    }
}

/// Runs a child process and exits with its result.
pub fn execute(command: DomainCommand) {
    let (join, name) = match &command {
        DomainCommand::Driver(args) => (&args.join, "driver"),
        DomainCommand::Guest(args) => (&args.join, "guest"),
        DomainCommand::Check(args) => (&args.join, "check"),
    };
    // The child must not outlive its parent. The trial of an upgrade is a child of the child, and
    // bound to it.
    if Stage::current() != Some(Stage::Trial) {
        let bound = set_parent_process_death_signal(Some(Signal::KILL));
        if bound.is_err() || getppid().map(Pid::as_raw_pid) != Some(join.parent) {
            exit(1);
        }
    }
    match private(&join.state_dir) {
        Ok(dir) => log_to(&dir, &format!("{name}.log")),
        Err(failure) => {
            ChildMessage::Failed(failure.clone()).send();
            exit(i32::from(failure.code));
        }
    }
    let result = match command {
        DomainCommand::Driver(args) => driver::run(&args),
        DomainCommand::Guest(args) => guest::run(&args),
        DomainCommand::Check(args) => work::run(&args),
    };
    match result {
        Ok(()) => exit(0),
        Err(failure) => {
            let (error, remedy) = (one_line(&failure.what), one_line(&failure.remedy));
            tracing::error!(error, remedy, "the process ends");
            ChildMessage::Failed(failure.clone()).send();
            exit(i32::from(failure.code));
        }
    }
}

/// Connects to the hypervisor as this domain.
///
/// # Errors
/// The hypervisor's error.
pub fn join(args: &JoinArgs) -> Result<Domain, Failure> {
    let until = Instant::now() + TAKEN_TIMEOUT;
    loop {
        match Domain::join(&args.state_dir, DomId(args.domid)) {
            // The hypervisor has not noticed the end of its predecessor yet.
            Err(JoinError::Taken(_)) if Instant::now() < until => {
                std::thread::sleep(TAKEN_INTERVAL);
            }
            joined => return joined.map_err(Failure::of),
        }
    }
}

/// Starts logging to a file; `RUST_LOG` sets the level.
fn log_to(dir: &PrivateDir, name: &str) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A log that cannot be opened is not fatal. The parent has just created the directory.
    if let Ok(file) = dir.append(name) {
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_env_filter(filter);
        let _ = subscriber.with_writer(file).try_init();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domain_status_lines_round_trip() {
        let failure = Failure::input("it \t broke\n", "mend it");
        for (message, back) in [
            (ChildMessage::Ready, ChildMessage::Ready),
            (ChildMessage::Note("x".into()), ChildMessage::Note("x".into())),
            (ChildMessage::Report("{}".into()), ChildMessage::Report("{}".into())),
            (
                ChildMessage::Failed(failure),
                ChildMessage::Failed(Failure::input("it   broke", "mend it")),
            ),
        ] {
            assert_eq!(ChildMessage::parse(&message.emit()), Some(back));
        }
        assert_eq!(ChildMessage::parse("failed\tx"), None);
        assert_eq!(ChildMessage::parse(""), None);
    }
}
