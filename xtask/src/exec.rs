//! Programs run with their output captured, a deadline, and no survivors.

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

/// From here on Ctrl-C, SIGTERM and SIGHUP end whatever [`run`] or a waiting check is at, with an
/// error that unwinds through every guard, so that nothing is left behind.
pub fn stop_on_signals() {
    let set = ctrlc::set_handler(|| STOPPING.store(true, Ordering::Relaxed));
    set.expect("the first handler of the process");
}

/// Whether a signal asked us to stop.
///
/// # Errors
/// If it did.
pub fn go_on() -> Result<()> {
    if STOPPING.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// What a program did.
pub struct Ran {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output and standard error, as they came.
    pub output: String,
}

/// Runs `command` in a process group of its own with no standard input, and waits.
///
/// # Errors
/// It could not be started, was not done after `deadline`, or we were interrupted. In the last two
/// cases its whole process group is killed first.
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

/// Runs `command` like [`run`], and takes a bad end for an error that shows its output.
///
/// # Errors
/// Those of [`run`], and any exit status but 0.
pub fn succeed(command: &mut Command, deadline: Duration) -> Result<String> {
    let ran = run(command, deadline)?;
    if !ran.status.success() {
        bail!("{}: {}\n{}", shown(command), ran.status, ran.output);
    }
    Ok(ran.output)
}

/// A process group; what is left of it is killed when this is dropped. Until then its leader is
/// not reaped, so that its number cannot become somebody else's.
pub struct Group {
    child: Child,
}

impl Group {
    /// Starts `command` as the leader of a group.
    ///
    /// # Errors
    /// The program is not there or may not be run.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child =
            command.process_group(0).spawn().with_context(|| format!("run {}", shown(command)))?;
        Ok(Self { child })
    }

    /// The leader's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How the leader ended, if it did.
    ///
    /// # Errors
    /// The system does not say.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let Some(status) = waitid(WaitId::Pid(Pid::from_child(&self.child)), how)? else {
            return Ok(None);
        };
        let code = status.exit_status().map(|code| code << 8);
        let raw = code.or(status.terminating_signal()).context("neither ended nor killed")?;
        Ok(Some(ExitStatus::from_raw(raw)))
    }

    /// Waits for the leader's end.
    ///
    /// # Errors
    /// It still runs after `deadline`, or we were interrupted.
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
    /// It is gone already.
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

/// A file all of whose text is read again from the start.
fn read_back(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A command line to be read by a person.
pub fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

/// The repository.
pub fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask/ lies in the repository").to_path_buf()
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The cargo we were started by, run at the root of the repository.
pub fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.current_dir(root()).env("CARGO_TERM_COLOR", "never");
    command
}

/// The command, built in release.
///
/// # Errors
/// It does not build.
pub fn pvio() -> Result<PathBuf> {
    let mut build = cargo();
    succeed(build.args(["build", "--release", "--package", "pvio"]), Duration::from_secs(1200))?;
    Ok(target().join("release/pvio"))
}
