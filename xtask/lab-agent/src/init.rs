//! Process 1: mounts file systems, starts the agent of the domain, reaps orphans, powers off.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use crate::sys::{mount, uptime};

/// PATH of all programs.
const PATH: &str = "/usr/lib/xen-4.17/bin:/usr/bin:/usr/sbin";

/// Does not return in a domain, as the domain ends with process 1.
///
/// # Errors
/// The basic file systems cannot be mounted.
pub fn run() -> Result<()> {
    mount::basics()?;
    let version = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("PVIO-LAB init {:.1} s, Linux {}", uptime::seconds(), version.trim());
    let part = part()?;
    let mut child = Command::new("/proc/self/exe");
    let child = child.arg(part).env("PATH", PATH).spawn().context("start the domain's part")?;
    let id = child.id();
    // The agent waits for its own children; orphans of other processes become children of process
    // 1.
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get().unsigned_abs() == id => {
                println!("PVIO-LAB {part} ended: {status:?}");
                break;
            }
            Ok(_) => {}
            Err(error) => {
                println!("PVIO-LAB wait: {error}");
                break;
            }
        }
    }
    rustix::fs::sync();
    reboot(RebootCommand::PowerOff).context("power off")
}

/// Returns the agent's role: a domain that may create others is dom0.
fn part() -> Result<&'static str> {
    mount::mount("sysfs", "sys", "/sys", "").ok();
    let uuid = fs::read_to_string("/sys/hypervisor/uuid").context("not on Xen")?;
    let dom0 = uuid.trim() == "00000000-0000-0000-0000-000000000000";
    Ok(if dom0 { "dom0" } else { "guest" })
}
