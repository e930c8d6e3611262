//! Debian's packages, downloaded by apt and unpacked, never installed: an ordinary user can.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec;

/// What runs in dom0 and in the guests. The libraries they depend on come along.
const PACKAGES: &[&str] = &[
    // Xen and its tools
    "xen-hypervisor-4.17-amd64",
    "xen-utils-4.17",
    "xen-utils-common",
    "xenstore-utils",
    // QEMU's disk backend, and what an HVM guest's firmware and device model are made of
    "qemu-system-xen",
    "qemu-system-data",
    "seabios",
    // Images of other formats, a server of NBD, a boot loader that is a guest
    "qemu-utils",
    "grub-xen-host",
    "ipxe",
    // What scenarios run
    "e2fsprogs",
    "ethtool",
    "fio",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "mount",
    "util-linux",
    // `lab shell`
    "busybox-static",
    // Run here, on what is in the packages
    "gzip",
    "xz-utils",
    "zstd",
];

/// The package that always depends on the newest stock kernel.
const KERNEL: &str = "linux-image-amd64";

/// Longer than any mirror should take for 150 MB.
const DOWNLOAD: Duration = Duration::from_secs(900);

/// A list of packages, each in one version.
pub struct Selection {
    packages: Vec<String>,
    /// The kernel's version, as `uname -r` prints it.
    pub kernel: String,
    /// Names, versions and sums of all files, sorted: what a cache can be keyed by.
    pub manifest: String,
}

impl Selection {
    /// What apt would download today.
    ///
    /// # Errors
    /// apt does not know a package: its lists are empty or out of date, or this is not Debian 12.
    pub fn look_up() -> Result<Self> {
        let mut packages: BTreeSet<String> = PACKAGES.iter().map(|it| (*it).to_owned()).collect();
        let mut fresh: Vec<String> = packages.iter().cloned().collect();
        while !fresh.is_empty() {
            let needed = depends(&fresh)?;
            fresh = needed.into_iter().filter(|name| is_library(name)).collect();
            fresh.retain(|name| packages.insert(name.clone()));
        }
        let image = depends(&[KERNEL.to_owned()])?;
        let image = image.into_iter().find(|name| name.starts_with("linux-image-"));
        let image = image.with_context(|| format!("{KERNEL} depends on no kernel"))?;
        let kernel = image.trim_start_matches("linux-image-").to_owned();
        packages.insert(image);
        let packages: Vec<_> = packages.into_iter().collect();
        let mut apt = Command::new("apt-get");
        apt.args(["--print-uris", "download"]).args(&packages);
        let uris = exec::succeed(&mut apt, Duration::from_secs(120))?;
        // 'URI' FILE SIZE HASH: where a file comes from does not matter.
        let mut files: Vec<_> = uris
            .lines()
            .filter(|line| line.starts_with('\''))
            .filter_map(|line| line.split_once("' ").map(|(_, rest)| rest))
            .collect();
        files.sort_unstable();
        if files.len() != packages.len() {
            bail!("apt knows {} of {} packages:\n{uris}", files.len(), packages.len());
        }
        Ok(Self { manifest: files.join("\n"), packages, kernel })
    }

    /// Downloads all into an empty folder and unpacks them below `root`.
    ///
    /// # Errors
    /// A download failed.
    pub fn unpack(&self, debs: &Path, root: &Path) -> Result<()> {
        let mut apt = Command::new("apt-get");
        apt.arg("download").args(&self.packages).current_dir(debs);
        exec::succeed(&mut apt, DOWNLOAD)?;
        for deb in fs::read_dir(debs)? {
            let mut dpkg = Command::new("dpkg");
            dpkg.arg("-x").arg(deb?.path()).arg(root);
            exec::succeed(&mut dpkg, Duration::from_secs(120))?;
        }
        Ok(())
    }
}

/// Whether a package is a library programs load, not one for a language or an installer.
fn is_library(name: &str) -> bool {
    (name.starts_with("lib") || name == "zlib1g")
        && !["libperl", "libpython"].iter().any(|it| name.starts_with(it))
}

/// What the packages directly depend on, alternatives included.
fn depends(packages: &[String]) -> Result<Vec<String>> {
    let mut apt = Command::new("apt-cache");
    apt.args(["depends", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]);
    apt.args(["--no-replaces", "--no-enhances"]).args(packages);
    let listed = exec::succeed(&mut apt, Duration::from_secs(120))?;
    Ok(names(&listed))
}

/// The names in lines like `  Depends: libc6` and ` |PreDepends: libc6`.
pub(super) fn names(listed: &str) -> Vec<String> {
    let named = listed.lines().filter_map(|line| {
        let line = line.trim_start_matches([' ', '|']);
        line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("PreDepends: "))
    });
    named.filter(|name| !name.starts_with('<')).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read() {
        let listed = "xl\n  PreDepends: dpkg\n |Depends: libc6\n  Depends: <virtual>\n    libx\n";
        assert_eq!(names(listed), ["dpkg", "libc6"]);
    }
}
