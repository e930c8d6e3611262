//! The trial of the new binary, and its start in place of the old one.
//!
//! The supervisor has left its devices, and has executed its own binary again: this process has its
//! number, one thread, and no descriptors. The new binary runs as its child first. If that
//! serves and adopts all device processes, it is stopped, and executed in place of this process.
//! Otherwise the old binary is executed.

use super::progress::Status;
use super::stage::{Request, Stage, VARIABLE};
use crate::control::client;
use crate::failure::Failure;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use std::ffi::OsStr;
use std::fs::File;
use std::io::BufRead;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The running binary, even if its file has been replaced.
const OWN: &str = "/proc/self/exe";
/// How long the trial may take to leave its devices: queues of threads complete their requests.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(45);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Executes this binary again, to try another one. Returns only if that fails.
#[must_use]
pub fn begin(request: Request, folder: &Path) -> Failure {
    let stage = Stage::HandOver { request, folder: folder.into() };
    execute(OWN.as_ref(), &stage)
}

/// Continues an upgrade in a process that was started for it, before anything else. Returns if this
/// process is to run its command.
///
/// # Errors
/// The old binary cannot be executed.
pub fn continued() -> Result<(), Failure> {
    match Stage::current() {
        Some(Stage::HandOver { request, folder }) => {
            let reason = attempt(&request, &folder);
            Err(execute(OWN.as_ref(), &Stage::RolledBack { reason }))
        }
        Some(Stage::Trial) => {
            // Its devices stay as they are when the process ends that would continue.
            set_parent_process_death_signal(Some(Signal::TERM)).map_err(Failure::foreign)
        }
        _ => Ok(()),
    }
}

/// Tries the new binary and executes it. Returns the reason if that is not possible.
fn attempt(request: &Request, folder: &Path) -> String {
    // The file that was tried is executed, whatever the path names by then.
    let file = match File::open(&request.binary) {
        Ok(file) => file,
        Err(error) => return format!("{} cannot be opened: {error}", request.binary.display()),
    };
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let path = Path::new(&path);
    let mut command = same_command(path, &Stage::Trial);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return format!("it cannot be started: {error}"),
    };
    let tried = watch(&mut child, folder, Duration::from_secs(request.timeout));
    let left = stop(&mut child, tried.is_ok());
    match tried.and(left) {
        Ok(()) => execute(path, &Stage::Replace).what,
        Err(reason) => reason,
    }
}

/// Waits until the trial serves and has adopted all devices.
fn watch(child: &mut Child, folder: &Path, timeout: Duration) -> Result<(), String> {
    let until = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            return Err(format!("it ended ({status}) before it served"));
        }
        let status = status(Some(folder)).ok().filter(|status| status.pid == child.id());
        match status {
            Some(status) if status.serving && status.pending.is_empty() => return Ok(()),
            Some(status) if Instant::now() >= until => {
                let pending = status.pending.join(", ");
                return Err(format!("it did not adopt the devices in time: {pending}"));
            }
            None if Instant::now() >= until => return Err("it did not serve in time".into()),
            _ => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

/// Ends the trial, in order if it served.
fn stop(child: &mut Child, in_order: bool) -> Result<(), String> {
    let failed = |e: std::io::Error| e.to_string();
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let until = Instant::now() + LEAVE_TIMEOUT;
    if let Some(pid) = pid.filter(|_| in_order) {
        let _ = kill_process(pid, Signal::TERM);
        while Instant::now() < until {
            match child.try_wait().map_err(failed)? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(format!("it failed when it was stopped ({status})")),
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    if in_order { Err("it did not stop in time".into()) } else { Ok(()) }
}

/// Returns the state of the upgrade in a running supervisor.
///
/// # Errors
/// It does not respond, or with something else.
pub fn status(folder: Option<&Path>) -> Result<Status, Failure> {
    let (_stream, mut answer) = client::request(folder, "upgrade-status")?;
    let mut line = String::new();
    answer.read_line(&mut line).map_err(client::connection_lost)?;
    serde_json::from_str(&line).map_err(|e| {
        let what = format!("the driver domain's response is invalid: {e}");
        Failure::new(what, "use the same version of pvio")
    })
}

/// Executes a binary in place of this process, with its arguments. Returns only if that fails.
fn execute(binary: &Path, stage: &Stage) -> Failure {
    let error = same_command(binary, stage).exec();
    Failure::new(format!("{} cannot be executed: {error}", binary.display()), "")
}

/// Returns the command of this process for another binary and stage.
fn same_command(binary: &Path, stage: &Stage) -> Command {
    let mut args = std::env::args_os();
    let mut command = Command::new(binary);
    command.arg0(args.next().unwrap_or_else(|| OsStr::new("pvio").into()));
    command.args(args).env(VARIABLE, stage.value());
    command
}
