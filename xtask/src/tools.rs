//! Debian packages that the checks need, and their installation by apt.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::exec;

/// A required program or file, and the package that contains it.
struct Need {
    /// Name of a program, or absolute path of a file, in which `*` stands for the rest of a
    /// directory's name.
    what: &'static str,
    /// The Debian package; a trailing `*` stands for a version.
    package: &'static str,
}

/// All programs and files that `cargo xtask test` needs in addition to the Rust toolchain.
const NEEDS: &[Need] = &[
    Need { what: "gcc", package: "gcc" },
    Need { what: "/usr/include/stdio.h", package: "libc6-dev" },
    Need { what: "/usr/include/xen/io/blkif.h", package: "libxen-dev" },
    Need { what: "xenstore-ls", package: "xenstore-utils" },
    Need { what: "/usr/lib/xen-*/bin/oxenstored", package: "xen-utils-*" },
    Need { what: "mke2fs", package: "e2fsprogs" },
    Need { what: "mkfs.vfat", package: "dosfstools" },
    Need { what: "mcopy", package: "mtools" },
    Need { what: "curl", package: "curl" },
    Need { what: "ip", package: "iproute2" },
    Need { what: "setpriv", package: "util-linux" },
    Need { what: "xz", package: "xz-utils" },
    Need { what: "bunzip2", package: "bzip2" },
    Need { what: "qemu-nbd", package: "qemu-utils" },
    Need { what: "nbdkit", package: "nbdkit" },
    Need { what: "fio", package: "fio" },
    Need { what: "tshark", package: "tshark" },
    Need { what: "tcpdump", package: "tcpdump" },
    Need { what: "ethtool", package: "ethtool" },
    Need { what: "strace", package: "strace" },
    Need { what: "iperf3", package: "iperf3" },
    Need { what: "ovs-vsctl", package: "openvswitch-switch" },
    Need { what: "fusermount3", package: "fuse3" },
];

/// The result of checking the tools.
pub enum Tools {
    /// All are available; with the packages that were installed.
    Ready(Vec<String>),
    /// Some are missing; the text says which, and the remedy.
    Missing(String),
}

/// Checks for every tool; as root and with `install`, installs missing packages.
///
/// # Errors
/// apt could not be started.
pub fn ensure(install: bool) -> Result<Tools> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(Tools::Ready(Vec::new()));
    }
    let whats: Vec<_> = missing.iter().map(|need| need.what).collect();
    let whats = whats.join(", ");
    if find("apt-get").is_none() {
        return Ok(Tools::Missing(format!("{whats} not found, and no apt-get to install them")));
    }
    if !(install && rustix::process::geteuid().is_root()) {
        let line = format!("sudo apt-get install {}", packages(&missing).join(" "));
        return Ok(Tools::Missing(format!("{whats} not found; run: {line}")));
    }
    // apt-cache only finds the version after the update.
    let update = apt(&["update"])?;
    let packages = packages(&missing);
    println!("    installing {}", packages.join(" "));
    let names: Vec<_> = packages.iter().map(String::as_str).collect();
    let installed = apt_install(&names)?;
    let still: Vec<_> = self::missing().iter().map(|need| need.what).collect();
    if still.is_empty() {
        return Ok(Tools::Ready(packages));
    }
    Ok(Tools::Missing(format!(
        "{} not found, and apt did not bring them:\n{update}{installed}",
        still.join(", ")
    )))
}

/// Updates apt's lists and installs packages; returns the output. Needs root privileges.
///
/// # Errors
/// apt could not be started.
pub fn install(packages: &[&str]) -> Result<String> {
    Ok(apt(&["update"])? + &apt_install(packages)?)
}

fn apt_install(packages: &[&str]) -> Result<String> {
    let words = ["install", "--yes", "--no-install-recommends"];
    apt(&[&words, packages].concat())
}

/// Runs `apt-get` and returns the output, whatever the exit status.
///
/// # Errors
/// It could not be started.
pub fn apt(words: &[&str]) -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(words).env("DEBIAN_FRONTEND", "noninteractive");
    Ok(exec::run(&mut command, Duration::from_secs(600))?.output)
}

fn missing() -> Vec<&'static Need> {
    NEEDS.iter().filter(|need| find(need.what).is_none()).collect()
}

/// Returns the packages of `needs` without duplicates, with their versions looked up.
fn packages(needs: &[&Need]) -> Vec<String> {
    let mut packages: Vec<String> = needs
        .iter()
        .map(|need| match need.package.strip_suffix('*') {
            Some(stem) => versioned(stem).unwrap_or_else(|| need.package.to_owned()),
            None => need.package.to_owned(),
        })
        .collect();
    packages.sort();
    packages.dedup();
    packages
}

/// Returns the newest package whose name is `stem` followed by a version number.
fn versioned(stem: &str) -> Option<String> {
    let mut search = Command::new("apt-cache");
    search.args(["search", "--names-only", &format!("^{stem}[0-9.]+$")]);
    let found = exec::run(&mut search, Duration::from_secs(60)).ok()?.output;
    let names = found.lines().filter_map(|line| line.split_whitespace().next());
    names.max().map(str::to_owned)
}

/// Returns the path of a program or file, in the format of [`Need::what`].
pub fn find(what: &str) -> Option<PathBuf> {
    if let Some(path) = what.strip_prefix('/') {
        return find_file(Path::new("/"), path);
    }
    // The PATH of an ordinary user lacks the directories of mke2fs and ip.
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(usual).map(|dir| dir.join(what)).find(|file| file.is_file())
}

fn find_file(base: &Path, rest: &str) -> Option<PathBuf> {
    let Some((before, after)) = rest.split_once('*') else {
        let file = base.join(rest);
        return file.exists().then_some(file);
    };
    let (dir, stem) = before.rsplit_once('/').unwrap_or(("", before));
    let after = after.strip_prefix('/')?;
    fs::read_dir(base.join(dir))
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(stem))
        .find_map(|entry| find_file(&entry.path(), after))
}

/// Returns a command for a program that [`find`] finds.
///
/// # Errors
/// It is not installed.
pub fn program(name: impl AsRef<OsStr>) -> Result<Command> {
    let name = name.as_ref().to_string_lossy();
    let path = find(&name).with_context(|| format!("{name} is not installed"))?;
    Ok(Command::new(path))
}
