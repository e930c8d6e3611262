//! A child process, which is one domain.

use super::Event;
use crate::domain::ChildMessage;
use crossbeam_channel::Sender;
use pvio_daemon::failure::Failure;
use pvio_grant_table::DomId;
use pvio_recordfile::PrivateDir;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::{Builder, JoinHandle};

/// Maximum length of a line from a child in bytes.
const MAX_LINE: u64 = 64 << 10;

/// The domain that a child runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The driver domain.
    Driver,
    /// The guest.
    Guest,
}

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    role: Role,
    start: u32,
    pidfd: Option<OwnedFd>,
    reader: Option<JoinHandle<()>>,
}

/// Parameters of a new child process.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The domain that it runs.
    pub role: Role,
    /// The hidden command that it runs.
    pub command: &'a str,
    /// The domain's number.
    pub domid: DomId,
    /// Sequence number of this start.
    pub start: u32,
    /// Its arguments, in addition to those of all children.
    pub args: &'a [OsString],
    /// Its standard error is the terminal instead of its log.
    pub on_terminal: bool,
}

impl Child {
    /// Starts a child process; its messages and its end are sent to `events`.
    ///
    /// # Errors
    /// The process cannot be created.
    pub fn spawn(
        spawn: &Spawn<'_>,
        home: &PrivateDir,
        events: Sender<Event>,
    ) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| {
            Failure::new(format!("the {} process cannot be started: {e}", spawn.command), "")
        };
        let log = home.append(&format!("{}.log", spawn.command)).map_err(failed)?;
        let stderr = if spawn.on_terminal { Stdio::inherit() } else { log.into() };
        // The program that is running, even if its file has been replaced in the meantime.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("pvio").args(["domain", spawn.command]);
        command.arg("--state-dir").arg(home.path());
        command.args(["--domid".into(), spawn.domid.to_string()]);
        command.args(["--parent".into(), getpid().as_raw_pid().to_string()]);
        command.args(spawn.args);
        // A process group of its own: Ctrl-C only signals the parent, which stops the children in
        // order.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().map_err(failed)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())).transpose();
        let pidfd = pidfd.map_err(|e| failed(e.into()))?;
        let (role, start) = (spawn.role, spawn.start);
        let out = child.stdout.take();
        let builder = Builder::new().name(format!("{}-child", spawn.command));
        let reader = builder.spawn(move || {
            let mut out = out.map(BufReader::new);
            while let Some(line) = out.as_mut().and_then(next_line) {
                if let Some(message) = ChildMessage::parse(&line) {
                    let _ = events.send(Event::Message(role, message));
                }
            }
            let _ = events.send(Event::Ended(role, start, child.wait().ok()));
        });
        Ok(Self { role, start, pidfd, reader: Some(reader.map_err(failed)?) })
    }

    /// Returns the domain that it runs.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// Returns the sequence number of this start.
    #[must_use]
    pub const fn start(&self) -> u32 {
        self.start
    }

    /// Sends it SIGTERM.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Records that it has ended, so that it is not killed on drop.
    pub fn mark_ended(&mut self) {
        self.pidfd = None;
    }

    fn signal(&self, signal: Signal) {
        if let Some(pidfd) = &self.pidfd {
            // Fails only if the process has already ended.
            let _ = pidfd_send_signal(pidfd, signal);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn next_line(out: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    match out.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned()),
    }
}

/// Describes how a child ended.
#[must_use]
pub fn describe_exit(status: Option<ExitStatus>) -> String {
    let Some(status) = status else { return "in an unknown way".into() };
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(9)) => "killed".into(),
        (None, Some(11)) => "a crash, signal 11".into(),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "in an unknown way".into(),
    }
}
