//! Processes that the supervisor starts, or finds when it starts itself.

use super::channel::{Channel, ChannelError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The program and arguments of a process.
#[derive(Debug, Clone)]
pub struct Program {
    /// Path of the executable file.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl Program {
    /// Returns this program with these arguments. It is the file that is running, even if another
    /// version has replaced it in the meantime.
    #[must_use]
    pub fn current<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Self {
        let args = args.into_iter().map(Into::into).collect();
        Self { path: "/proc/self/exe".into(), args }
    }

    /// Returns this program with another argument at the end.
    #[must_use]
    pub fn with_command(&self, command: &str) -> Self {
        let args = self.args.iter().cloned().chain([command.into()]).collect();
        Self { path: self.path.clone(), args }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Killed(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// A running process with a connection to it. Dropping this closes the connection and leaves the
/// process alone.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    channel: Channel,
}

impl Process {
    /// Starts a process, whose standard input is its end of the connection. It gets no other
    /// descriptor, no environment but `RUST_LOG`, and `name` as its own. An isolated one is alone in
    /// a PID namespace, if that is permitted.
    ///
    /// # Errors
    /// The system's error.
    pub fn spawn(program: &Program, name: &str, isolated: bool) -> io::Result<Self> {
        let (channel, other) = Channel::pair()?;
        let mut command = Command::new(&program.path);
        command.arg0(name).args(&program.args).env_clear().current_dir("/");
        if let Some(level) = std::env::var_os("RUST_LOG") {
            command.env("RUST_LOG", level);
        }
        // A process group of its own: Ctrl-C only signals the supervisor, which stops the processes
        // in order.
        command.process_group(0);
        command.stdin(other.into_socket()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut child = if isolated {
            // What became of the namespace is part of the confinement that the process reports.
            pvio_confinement::spawn(&mut command)?.0
        } else {
            command.spawn()?
        };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let opened = pid.ok_or(io::ErrorKind::InvalidData.into()).and_then(|pid| {
            pidfd_open(pid, PidfdFlags::empty()).map(|fd| (pid, fd)).map_err(io::Error::from)
        });
        match opened {
            // It is reaped by its descriptor, as one that this process started before it executed
            // another version of itself.
            Ok((pid, pidfd)) => Ok(Self { pid, pidfd, channel }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Uses a process that an earlier supervisor started, at the other end of a connection.
    ///
    /// # Errors
    /// The system's error; the process may have ended.
    pub fn found(pid: Pid, channel: Channel) -> io::Result<Self> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd, channel })
    }

    /// Returns its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a message.
    ///
    /// # Errors
    /// A [`ChannelError`].
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.channel.send(message, descriptors)
    }

    /// Receives a message, if there is one.
    ///
    /// # Errors
    /// A [`ChannelError`].
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        self.channel.receive()
    }

    /// Receives a message; waits for it until `timeout`. Blocks, and is therefore called on a
    /// separate thread.
    ///
    /// # Errors
    /// A [`ChannelError`]; [`io::ErrorKind::TimedOut`] within it if there is no message in time.
    pub fn wait_message<T: DeserializeOwned>(
        &self,
        timeout: std::time::Duration,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        wait_message(&self.channel, timeout)
    }

    /// Kills it. Without effect if it has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Returns whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }

    /// Waits until it has ended, and reaps it. Returns how it ended, if it is a child of this
    /// process.
    pub fn wait(&self) -> Option<End> {
        let options = WaitIdOptions::EXITED;
        match retry_on_intr(|| waitid(WaitId::PidFd(self.pidfd.as_fd()), options)) {
            Ok(status) => {
                status.map(|status| match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => End::Exited(code),
                    (None, signal) => End::Killed(signal.unwrap_or_default()),
                })
            }
            // It is not a child.
            Err(_) => {
                let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
                while !matches!(poll(&mut fds, None), Ok(1..)) {}
                None
            }
        }
    }

    /// Returns the descriptors that become readable when there is a message, or the process ends.
    #[must_use]
    pub fn events(&self) -> [BorrowedFd<'_>; 2] {
        [self.channel.as_fd(), self.pidfd.as_fd()]
    }
}

/// Receives a message; waits for it until `timeout`.
///
/// # Errors
/// A [`ChannelError`]; [`io::ErrorKind::TimedOut`] within it if there is no message in time.
pub fn wait_message<T: DeserializeOwned>(
    channel: &Channel,
    timeout: std::time::Duration,
) -> Result<(T, Vec<OwnedFd>), ChannelError> {
    let until = std::time::Instant::now() + timeout;
    loop {
        if let Some(received) = channel.receive()? {
            return Ok(received);
        }
        let left = until.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Err(ChannelError::Io(io::ErrorKind::TimedOut.into()));
        }
        crate::stop::sleep(&[channel.as_fd()], Some(left))
            .map_err(|e| ChannelError::Io(io::Error::other(e.to_string())))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn shell(script: &str) -> Process {
        let args = ["-c", script].map(OsString::from).into();
        Process::spawn(&Program { path: "/bin/sh".into(), args }, "sh", false).unwrap()
    }

    #[test]
    fn end_of_process_is_seen_and_its_status_returned() {
        let process = shell("exit 3");
        assert_eq!(process.wait(), Some(End::Exited(3)));
        assert!(process.has_ended());
        let received = process.wait_message::<String>(Duration::from_secs(5));
        assert!(matches!(received, Err(ChannelError::Closed)), "{received:?}");
    }

    #[test]
    fn killed_process_closes_its_connection() {
        let process = shell("exec sleep 100");
        assert!(!process.has_ended());
        process.kill();
        let received = process.wait_message::<String>(Duration::from_secs(5));
        assert!(matches!(received, Err(ChannelError::Closed)), "{received:?}");
        assert_eq!(process.wait(), Some(End::Killed(9)));
        assert_eq!(process.wait(), None, "it is reaped");
    }

    #[test]
    fn process_gets_no_environment() {
        let process = shell(
            "[ \"$(env | grep -vc -e ^PWD= -e ^_= -e ^SHLVL= -e ^RUST_LOG= -e ^OLDPWD=)\" = 0 ]",
        );
        assert_eq!(process.wait(), Some(End::Exited(0)));
    }
}
