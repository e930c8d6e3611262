//! Running programs with captured output and a deadline.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::took;
use anyhow::{Context, Result, bail};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process_group};

/// The result of a program.
pub struct Ran {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output and standard error, interleaved.
    pub output: String,
}

/// A program crashed because of an error of the emulator (docs/lab.md).
#[derive(Debug)]
pub struct Flake(pub String);

impl std::fmt::Display for Flake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "emulation flake: {}", self.0)
    }
}

impl std::error::Error for Flake {}

/// Runs a command; the first word is the program.
///
/// # Errors
/// It could not be started, or did not end in time; in the latter case its process group is killed.
pub fn run(words: &[&str], deadline: Duration) -> Result<Ran> {
    let (program, arguments) = words.split_first().context("no program")?;
    let (start, line) = (Instant::now(), words.join(" "));
    let ran = run_command(Command::new(program).args(arguments), deadline);
    took::since(start, &line);
    ran.context(line)
}

/// Does as [`run`], and returns the output; a failure is an error that contains the output.
///
/// # Errors
/// Those of [`run`], any exit status except 0, and [`Flake`] for a segmentation fault.
pub fn succeed(words: &[&str], deadline: Duration) -> Result<String> {
    let ran = run(words, deadline)?;
    if ran.status.signal() == Some(Signal::SEGV.as_raw()) {
        return Err(Flake(format!("{}: {}", words.join(" "), ran.status)).into());
    }
    if !ran.status.success() {
        bail!("{}: {}: {}", words.join(" "), ran.status, ran.output.trim_end());
    }
    Ok(ran.output)
}

fn run_command(command: &mut Command, deadline: Duration) -> Result<Ran> {
    let mut log = File::from(rustix::fs::memfd_create("output", MemfdFlags::CLOEXEC)?);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let mut child = command.process_group(0).spawn()?;
    let start = Instant::now();
    let mut nap = Duration::from_millis(2);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > deadline {
            break None;
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(50));
    };
    if status.is_none() {
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
        child.wait()?;
    }
    let mut output = Vec::new();
    log.seek(SeekFrom::Start(0))?;
    log.read_to_end(&mut output)?;
    let output = String::from_utf8_lossy(&output).into_owned();
    match status {
        Some(status) => Ok(Ran { status, output }),
        None => bail!("still running after {} s: {output}", deadline.as_secs()),
    }
}
