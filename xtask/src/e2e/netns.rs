//! A network namespace that is deleted together with all processes in it.

use std::fs;
use std::path::Path;
use std::process::{self, Command};
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};

use crate::{exec, tools};

const QUICK: Duration = Duration::from_secs(20);
const PREFIX: &str = "pvio-e2e-";

/// The namespace. At most one exists per process.
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Creates it, with loopback up. Also deletes the namespaces of earlier runs that were killed.
    pub fn add() -> Result<Self> {
        sweep();
        let net = Self { name: format!("{PREFIX}{}", process::id()) };
        ip(&["netns", "add", &net.name])?;
        ip(&["-n", &net.name, "link", "set", "lo", "up"])?;
        Ok(net)
    }

    /// Returns a command in the namespace that is killed if this process ends.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let mut command = tools::program("ip")?;
        command.args(["netns", "exec", &self.name]);
        // `ip` and `setpriv` execute the program, so the process id stays that of the command.
        command.arg(tools::program("setpriv")?.get_program());
        command.args(["--pdeathsig", "KILL"]).arg(program);
        Ok(command)
    }

    /// Returns the processes in the namespace.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let pids = ip(&["netns", "pids", &self.name])?;
        Ok(pids.lines().filter_map(|pid| pid.trim().parse().ok()).collect())
    }

    /// Returns the network interfaces in the namespace, except loopback.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let links = ip(&["-n", &self.name, "-brief", "link", "show"])?;
        let names = links.lines().filter_map(|line| line.split_whitespace().next());
        Ok(names.filter(|name| *name != "lo").map(str::to_owned).collect())
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

fn delete(name: &str) {
    if let Ok(pids) = ip(&["netns", "pids", name]) {
        for pid in pids.lines().filter_map(|pid| pid.trim().parse().ok()) {
            let _ = kill_process(Pid::from_raw(pid).expect("a process id"), Signal::KILL);
        }
    }
    let _ = ip(&["netns", "delete", name]);
}

/// Deletes the namespaces of runs whose process has ended.
fn sweep() {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(pid) = name.strip_prefix(PREFIX)
            && !Path::new("/proc").join(pid).exists()
        {
            delete(&name);
        }
    }
}

fn ip(words: &[&str]) -> Result<String> {
    exec::succeed(tools::program("ip")?.args(words), QUICK)
}
