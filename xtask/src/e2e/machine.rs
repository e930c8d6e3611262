//! The running command, and what must be removed when it ends.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{World, proc};
use crate::exec::{self, Group};

/// Timeout of every step.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `pvio …` in the namespace.
pub struct Machine<'a> {
    world: &'a World,
    leader: Group,
    log: PathBuf,
    /// Its state directory.
    pub state: PathBuf,
    /// An environment variable of all processes of this machine, with a value that no other machine
    /// has.
    mark: String,
}

impl<'a> Machine<'a> {
    /// Starts `pvio` with these arguments and a new state directory.
    pub fn start(world: &'a World, arguments: &[&str]) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self::start_in(world, &world.dir().join(format!("state{number}")), arguments)
    }

    /// Starts `pvio` with these arguments and this state directory.
    pub fn start_in(world: &'a World, state: &Path, arguments: &[&str]) -> Result<Self> {
        let log = state.with_extension("log");
        let out = File::create(&log)?;
        let mark = format!("PVIO_E2E={}", state.display());
        let (name, value) = mark.split_once('=').expect("just written");
        let mut command = world.net.command(&world.pvio)?;
        command.args(arguments).arg("--state-dir").arg(state).env(name, value);
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let leader = Group::spawn(&mut command)?;
        Ok(Self { world, leader, log, state: state.to_path_buf(), mark })
    }

    /// Waits for the line with the guest's address; returns `http://ADDRESS/`.
    pub fn url(&mut self) -> Result<String> {
        self.wait_for("the guest's address", |machine| Ok(address(&machine.log())))
    }

    /// Returns its output so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Returns the command's process id.
    pub fn id(&self) -> u32 {
        self.leader.id()
    }

    /// Returns all its processes, found by the environment variable or the namespace.
    pub fn processes(&self) -> Vec<u32> {
        let mut pids = proc::with_variable(&self.mark);
        pids.extend(self.world.net.processes().unwrap_or_default());
        pids.sort_unstable();
        pids.dedup();
        pids.retain(|pid| !proc::command_line(*pid).is_empty());
        pids
    }

    /// Returns the process of a domain: `driver` or `guest`.
    pub fn domain(&self, role: &str) -> Result<u32> {
        let words = format!("domain {role}");
        let pids = self.processes();
        let found = pids.iter().find(|pid| proc::command_line(**pid).contains(&words));
        found.copied().with_context(|| {
            let lines: Vec<_> = pids.iter().map(|pid| proc::command_line(*pid)).collect();
            format!("no process is called `{words}`; there are {lines:?}")
        })
    }

    /// Sends a signal to one of its processes.
    pub fn kill(&self, pid: u32, signal: Signal) -> Result<()> {
        let raw = i32::try_from(pid)?;
        Ok(kill_process(Pid::from_raw(raw).context("process 0")?, signal)?)
    }

    /// Returns the exit status of the command, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.leader.ended()
    }

    /// Waits until `ready` returns a value; fails if the command ends.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        mut ready: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(value) = ready(self)? {
                return Ok(value);
            }
            if let Some(status) = self.ended()? {
                bail!("waiting for {what}, pvio ended with {status}:\n{}", self.log());
            }
            exec::go_on()?;
            if start.elapsed() > PATIENCE {
                bail!("waiting for {what} in vain; pvio said:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Sends SIGINT and returns the exit status.
    pub fn interrupt(&mut self) -> Result<ExitStatus> {
        self.leader.signal(Signal::INT)?;
        self.wait()
    }

    /// Waits for the exit status.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let status = self.leader.wait(PATIENCE);
        status.with_context(|| format!("pvio said:\n{}", self.log()))
    }

    /// Checks that a command that has ended left no process (and therefore no memfd, which exists
    /// only in processes), no network interface and no socket.
    pub fn nothing_left(&self) -> Result<()> {
        self.gone(true)
    }

    /// Checks that a killed command left no process and no network interface. It could not remove
    /// its sockets.
    pub fn no_process_left(&self) -> Result<()> {
        self.gone(false)
    }

    fn gone(&self, sockets: bool) -> Result<()> {
        // The kernel removes an interface some time after the last process closed it, and a domain
        // may end slightly after the command.
        let start = Instant::now();
        loop {
            let left = self.left(sockets)?;
            if left.is_empty() {
                return Ok(());
            }
            exec::go_on()?;
            ensure!(start.elapsed() < PATIENCE, "left behind: {}", left.join(", "));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn left(&self, with_sockets: bool) -> Result<Vec<String>> {
        let mut left: Vec<_> = self
            .processes()
            .iter()
            .map(|pid| format!("process `{}`", proc::command_line(*pid)))
            .collect();
        left.extend(self.world.net.interfaces()?.iter().map(|name| format!("interface {name}")));
        let sockets = if with_sockets { sockets(&self.state) } else { Vec::new() };
        left.extend(sockets.iter().map(|path| format!("socket {}", path.display())));
        Ok(left)
    }
}

/// Returns the sockets below a directory.
fn sockets(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(sockets(&entry.path())),
            Ok(kind) if kind.is_socket() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Returns the first `http://…` of a text up to the end of its host, with a trailing slash.
fn address(log: &str) -> Option<String> {
    let whole = log.rfind('\n')?;
    let start = log[..whole].find("http://")?;
    let rest = &log[start + 7..];
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || ".:".contains(c)))?;
    (end > 0).then(|| format!("http://{}/", &rest[..end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_parsed_only_from_complete_line() {
        assert_eq!(
            address("guest at http://10.0.0.2/ (Ctrl-C ends)\n").unwrap(),
            "http://10.0.0.2/"
        );
        assert_eq!(address("at http://10.0.0.2:8080\n").unwrap(), "http://10.0.0.2:8080/");
        assert_eq!(address("at http://10.0.0."), None);
        assert_eq!(address("nothing\n"), None);
    }
}
