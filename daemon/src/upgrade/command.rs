//! `pvio upgrade`: the client.

use super::handover::status;
use super::progress::{Outcome, Status};
use super::stage::Stage;
use crate::control::client::request;
use crate::failure::{Failure, say};
use clap::Args;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long the supervisor may not respond in addition to the trial, and all devices together take
/// without any progress.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Arguments of `pvio upgrade`.
#[derive(Debug, Clone, Args)]
pub struct UpgradeArgs {
    /// The new pvio
    #[arg(value_name = "BINARY")]
    pub binary: PathBuf,
    /// How long it may take to start and to adopt all devices, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    pub timeout: u64,
    /// The state directory of a pvio run, instead of that of the only running pvio serve or pvio
    /// run
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// The binary cannot be used, or the upgrade was rolled back.
pub fn run(args: &UpgradeArgs) -> Result<(), Failure> {
    let binary = args.binary.canonicalize().map_err(|e| {
        let what = format!("{} cannot be used: {e}", args.binary.display());
        Failure::input(what, "name the new pvio")
    })?;
    let folder = args.state_dir.as_deref();
    let line = binary.to_str().filter(|path| !path.contains(char::is_whitespace));
    let line = line.ok_or_else(|| {
        let what = format!("{} cannot be used: its path has spaces", binary.display());
        Failure::input(what, "copy it to another directory")
    })?;
    drop(request(folder, &format!("upgrade {} {line}", args.timeout))?);
    let mut progress = Instant::now();
    let (mut reported, mut total) = (0, 0);
    loop {
        // Nothing responds while one process takes the place of another.
        let status = status(folder).ok().filter(|status| status.serving);
        let patience = TIMEOUT + Duration::from_secs(args.timeout);
        if progress.elapsed() > patience {
            return Err(unfinished(status.as_ref()));
        }
        let Some(status) = status else {
            std::thread::sleep(POLL_INTERVAL);
            continue;
        };
        match &status.stage {
            Some(Stage::RolledBack { reason }) => {
                let what =
                    format!("the upgrade failed, and the previous pvio serves again: {reason}");
                return Err(Failure::new(what, "see the log of the supervisor"));
            }
            Some(Stage::Replace) => {}
            // One that was part of the upgrade has ended, and another one was started.
            None => {
                let what =
                    "the upgrade was interrupted: the supervisor was killed and started again";
                return Err(Failure::new(what, "see its log, and upgrade again"));
            }
            Some(Stage::HandOver { .. } | Stage::Trial) => {
                std::thread::sleep(POLL_INTERVAL);
                continue;
            }
        }
        for (device, outcome) in status.devices.get(reported..).unwrap_or_default() {
            say!("{device}: {}", text(outcome));
            if let Outcome::Moved { pause } = outcome {
                total += pause;
            }
            progress = Instant::now();
        }
        reported = reported.max(status.devices.len());
        if status.pending.is_empty() {
            say!("{reported} devices, {} of pauses in total", millis(total));
            let kept = status.devices.iter().filter(|(_, how)| matches!(how, Outcome::Kept(_)));
            return match kept.count() {
                0 => Ok(()),
                kept => Err(Failure::new(
                    format!("{kept} devices are still served by processes of the previous pvio"),
                    "they serve on; upgrade again, or detach and attach them",
                )),
            };
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

fn unfinished(status: Option<&Status>) -> Failure {
    let what = match status {
        Some(status) => format!("nothing is known of {}", status.pending.join(", ")),
        None => "the supervisor does not respond".into(),
    };
    Failure::new(format!("the upgrade did not finish in time: {what}"), "see the supervisor's log")
}

fn text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Adopted => "served by the new pvio already".into(),
        Outcome::Moved { pause } => millis(*pause),
        Outcome::Kept(why) => format!("still served by the previous pvio: {why}"),
        Outcome::Closed => "closed".into(),
    }
}

fn millis(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1000.0)
}
