//! Process 1: mounts, starts the domain's part, reaps what nobody waits for, powers off.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use crate::sys::{mount, uptime};

/// Where programs are looked for.
const PATH: &str = "/usr/lib/xen-4.17/bin:/usr/bin:/usr/sbin";

/// Never returns in a domain: its end is the domain's.
///
/// # Errors
/// Not even the basics are there.
pub fn run() -> Result<()> {
    mount::basics()?;
    let version = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("PVIO-LAB init {:.1} s, Linux {}", uptime::seconds(), version.trim());
    let part = part()?;
    let mut child = Command::new("/proc/self/exe");
    let child = child.arg(part).env("PATH", PATH).spawn().context("start the domain's part")?;
    let id = child.id();
    // The part waits for its own children; whatever else dies has become ours.
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

/// A domain that may create others is dom0.
fn part() -> Result<&'static str> {
    mount::mount("sysfs", "sys", "/sys", "").ok();
    let uuid = fs::read_to_string("/sys/hypervisor/uuid").context("not on Xen")?;
    let dom0 = uuid.trim() == "00000000-0000-0000-0000-000000000000";
    Ok(if dom0 { "dom0" } else { "guest" })
}
