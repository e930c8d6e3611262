//! Requirements of the host: the tested version of QEMU, apt and its lists.

use std::time::Duration;

use anyhow::Result;

use crate::{exec, tools};

const PACKAGES: &[&str] = &["qemu-system-x86", "seabios", "qemu-system-data", "ipxe-qemu"];
/// QEMU's version in Debian 12. Other versions have other emulation errors: see docs/lab.md.
const VERSION: &str = "7.2.";

/// Checks all requirements; as root and with `install`, installs missing packages. Returns what is
/// missing and the remedy, if anything.
///
/// # Errors
/// apt or QEMU could not be started.
pub fn ensure(install: bool) -> Result<Option<String>> {
    for program in ["apt-get", "apt-cache", "dpkg"] {
        if tools::find(program).is_none() {
            return Ok(Some(format!("no {program} here; the lab is made of Debian 12's packages")));
        }
    }
    let may_install = install && rustix::process::geteuid().is_root();
    if tools::find("qemu-system-x86_64").is_none() {
        let line = format!("apt-get install {}", PACKAGES.join(" "));
        if !may_install {
            return Ok(Some(format!("qemu-system-x86_64 not found; run: sudo {line}")));
        }
        println!("    installing {}", PACKAGES.join(" "));
        let said = tools::install(PACKAGES)?;
        if tools::find("qemu-system-x86_64").is_none() {
            return Ok(Some(format!("{line} did not bring qemu-system-x86_64:\n{said}")));
        }
    }
    if !known("xen-hypervisor-4.17-amd64")? {
        if may_install {
            tools::apt(&["update"])?;
        }
        if !known("xen-hypervisor-4.17-amd64")? {
            let why = "apt knows no xen-hypervisor-4.17-amd64; on Debian 12, run: apt-get update";
            return Ok(Some(why.to_owned()));
        }
    }
    let mut version = tools::program("qemu-system-x86_64")?;
    let said = exec::succeed(version.arg("--version"), Duration::from_secs(20))?;
    let version = said.split("version ").nth(1).and_then(|it| it.split_whitespace().next());
    let version = version.unwrap_or("of unknown version");
    if !version.starts_with(VERSION) {
        println!("    NOTE: QEMU {version} found; only Debian 12's {VERSION}x is known to work");
    }
    Ok(None)
}

/// Returns whether apt could download a package.
fn known(package: &str) -> Result<bool> {
    let mut apt = tools::program("apt-cache")?;
    let ran = exec::run(apt.args(["show", package]), Duration::from_secs(60))?;
    Ok(ran.status.success() && ran.output.contains("Filename:"))
}
