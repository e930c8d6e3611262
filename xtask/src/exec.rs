//! Running programs with captured output and a deadline; no process survives.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

static STOPPING: AtomicBool = AtomicBool::new(false);

/// From here on, SIGINT, SIGTERM and SIGHUP end the current [`run`] or waiting check with an error.
/// It unwinds through all guards, so that nothing is left behind.
pub fn stop_on_signals() {
    let set = ctrlc::set_handler(|| STOPPING.store(true, Ordering::Relaxed));
    set.expect("the first handler of the process");
}

/// Fails if a signal requested a stop.
///
/// # Errors
/// A signal did.
pub fn go_on() -> Result<()> {
    if STOPPING.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// The result of a program.
pub struct Ran {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output and standard error, interleaved.
    pub output: String,
}

/// Runs `command` in a new process group without standard input, and waits.
///
/// # Errors
/// It could not be started, did not end before `deadline`, or a signal requested a stop. In the
/// last two cases its process group is killed first.
pub fn run(command: &mut Command, deadline: Duration) -> Result<Ran> {
    let mut log = tempfile::tempfile().context("a file for the output")?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let child = Group::spawn(command)?;
    let status = child.wait(deadline);
    let output = read_back(&mut log)?;
    match status {
        Ok(status) => Ok(Ran { status, output }),
        Err(error) => Err(error.context(format!("{}\n{output}", shown(command)))),
    }
}

/// Does as [`run`]; an unsuccessful exit status is an error that contains the output.
///
/// # Errors
/// Those of [`run`], and any exit status except 0.
pub fn succeed(command: &mut Command, deadline: Duration) -> Result<String> {
    let ran = run(command, deadline)?;
    if !ran.status.success() {
        bail!("{}: {}\n{}", shown(command), ran.status, ran.output);
    }
    Ok(ran.output)
}

/// A process group, killed when dropped. Until then its leader is not reaped, so that its process
/// id is not reused.
pub struct Group {
    child: Child,
}

impl Group {
    /// Starts `command` as the leader of a group.
    ///
    /// # Errors
    /// The program does not exist or cannot be executed.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child =
            command.process_group(0).spawn().with_context(|| format!("run {}", shown(command)))?;
        Ok(Self { child })
    }

    /// Returns the leader's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the exit status of the leader, if it has ended.
    ///
    /// # Errors
    /// `waitid` fails.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let Some(status) = waitid(WaitId::Pid(Pid::from_child(&self.child)), how)? else {
            return Ok(None);
        };
        let code = status.exit_status().map(|code| code << 8);
        let raw = code.or(status.terminating_signal()).context("neither ended nor killed")?;
        Ok(Some(ExitStatus::from_raw(raw)))
    }

    /// Waits for the exit status of the leader.
    ///
    /// # Errors
    /// It is still running after `deadline`, or a signal requested a stop.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        let mut nap = Duration::from_millis(1);
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            go_on()?;
            if start.elapsed() > deadline {
                bail!("still running after {} s", deadline.as_secs());
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(50));
        }
    }

    /// Sends `signal` to the leader alone.
    ///
    /// # Errors
    /// It has already ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(rustix::process::kill_process(Pid::from_child(&self.child), signal)?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// Reads a file from the start.
fn read_back(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Formats a command line for display.
pub fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Returns the root of the repository.
pub fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask/ lies in the repository").to_path_buf()
}

/// Returns cargo's target directory.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Returns a command for the cargo that started this program, in the root of the repository.
pub fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.current_dir(root()).env("CARGO_TERM_COLOR", "never");
    command
}

/// Builds the command in release mode; returns its path.
///
/// # Errors
/// It does not build.
pub fn pvio() -> Result<PathBuf> {
    let mut build = cargo();
    succeed(build.args(["build", "--release", "--package", "pvio"]), Duration::from_secs(1200))?;
    Ok(target().join("release/pvio"))
}
