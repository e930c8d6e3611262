//! Options of the processes that serve devices.

use crate::driver::Isolation;
use crate::failure::Failure;
use crate::process::child::Program;
use crate::process::confine::Confinement;
use crate::process::found::FoundProcesses;
use crate::process::hub::Hub;
use crate::process::registry::Registry;
use crate::process::supervised::Environment;
use crate::upgrade::progress::Upgrade;
use crate::upgrade::stage::Stage;
use clap::{Args, ValueEnum};
use pvio_confinement::{Enforcement, User};
use pvio_recordfile::RecordDir;
use rustix::process::geteuid;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The hidden command of the processes that the supervisor starts.
pub const COMMAND: &str = "process";
/// The user of device processes, if there is one of that name.
const USER: &str = "pvio";
/// The user of device processes otherwise.
const NOBODY: User = User { uid: 65_534, gid: 65_534 };

/// Options of the processes that serve devices.
#[derive(Debug, Clone, Args)]
pub struct IsolationArgs {
    /// Where devices are served: each in a process of its own without rights, or all by threads of
    /// one process
    #[arg(long = "isolation", value_name = "HOW", default_value = "process")]
    how: IsolationArg,
    /// User of the device processes, a name or UID:GID; pvio if there is one, else nobody
    #[arg(long = "device-user", value_name = "USER")]
    user: Option<String>,
    /// Control group of the device processes, a directory below /sys/fs/cgroup
    #[arg(long = "device-cgroup", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// What happens at a system call that a device process must not make: kill it, or log the call
    /// (for diagnosis only)
    #[arg(long = "seccomp", value_name = "WHAT", default_value = "kill")]
    seccomp: SeccompArg,
}

/// Where devices are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum IsolationArg {
    /// Each in a separate process
    Process,
    /// By threads of one process
    Thread,
}

/// What happens at a system call that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SeccompArg {
    /// Kill the process
    Kill,
    /// Log the call
    Log,
}

impl IsolationArgs {
    /// Returns where devices are served. `registry` is the directory of the processes' sockets,
    /// `platform` the platform in their commands.
    ///
    /// # Errors
    /// The user does not exist, or the directory cannot be created.
    pub fn isolation(
        &self,
        registry: &Path,
        platform: &'static str,
        records: &RecordDir,
    ) -> Result<Isolation, Failure> {
        if self.how == IsolationArg::Thread {
            return Ok(Isolation::Thread);
        }
        let enforcement = match self.seccomp {
            SeccompArg::Kill => Enforcement::Kill,
            SeccompArg::Log => Enforcement::Log,
        };
        let confinement =
            Confinement { user: self.user()?, enforcement, cgroup: self.cgroup.clone() };
        let registry = Registry::open(registry).map_err(|e| Failure::of(e).as_input())?;
        let found = FoundProcesses::connect(&registry).map_err(Failure::foreign)?;
        Ok(Isolation::Process(Environment {
            hub: Hub::new().map_err(Failure::foreign)?,
            registry,
            program: Program::current([COMMAND]),
            platform,
            records: Some(records.clone()),
            confinement,
            upgrade: Upgrade::new(Stage::current(), found.devices()),
            found,
        }))
    }

    /// Returns whether devices are served by processes of their own, so that a session outlives the
    /// supervisor.
    #[must_use]
    pub fn has_processes(&self) -> bool {
        self.how != IsolationArg::Thread
    }

    /// Returns the arguments from which these are parsed, for a process that is started with them.
    #[must_use]
    pub fn args(&self) -> Vec<OsString> {
        let how = match self.how {
            IsolationArg::Process => "process",
            IsolationArg::Thread => "thread",
        };
        let seccomp = match self.seccomp {
            SeccompArg::Kill => "kill",
            SeccompArg::Log => "log",
        };
        let mut args = vec![format!("--isolation={how}"), format!("--seccomp={seccomp}")];
        args.extend(self.user.iter().map(|user| format!("--device-user={user}")));
        let mut args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        if let Some(cgroup) = &self.cgroup {
            args.extend(["--device-cgroup".into(), cgroup.into()]);
        }
        args
    }

    fn user(&self) -> Result<Option<User>, Failure> {
        if let Some(name) = &self.user {
            let user = User::named(name).map_err(|e| {
                let what = format!("device processes cannot have the user {name}: {e}");
                Failure::input(what, "create it, or name another with --device-user")
            })?;
            return Ok(Some(user));
        }
        // Another user than root cannot change to a third one.
        Ok(geteuid().is_root().then(|| User::named(USER).unwrap_or(NOBODY)))
    }
}
