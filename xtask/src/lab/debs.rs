//! Debian packages, downloaded by apt and unpacked without installation, which needs no root
//! privileges.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec;

/// Packages for dom0 and the guests. Libraries that they depend on are added.
const PACKAGES: &[&str] = &[
    // Xen and its tools
    "xen-hypervisor-4.17-amd64",
    "xen-utils-4.17",
    "xen-utils-common",
    "xenstore-utils",
    // QEMU's disk backend, and the firmware and device model of HVM guests
    "qemu-system-xen",
    "qemu-system-data",
    "seabios",
    // Images of other formats, an NBD server, a boot loader that runs as a guest
    "qemu-utils",
    "grub-xen-host",
    "ipxe",
    // Programs that scenarios run
    "e2fsprogs",
    "ethtool",
    "fio",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "mount",
    "util-linux",
    // For `lab shell`
    "busybox-static",
    // Run on the host, to process files of the packages
    "gzip",
    "xz-utils",
    "zstd",
];

/// The package that always depends on the newest stock kernel.
const KERNEL: &str = "linux-image-amd64";

/// Timeout of a download of 150 MB.
const DOWNLOAD: Duration = Duration::from_secs(900);

/// A list of packages with their versions.
pub struct Selection {
    packages: Vec<String>,
    /// The kernel's version, as `uname -r` prints it.
    pub kernel: String,
    /// Names, versions and checksums of all files, sorted; the key of the cache.
    pub manifest: String,
}

impl Selection {
    /// Returns the packages that apt would download now.
    ///
    /// # Errors
    /// apt does not know a package: its lists are empty or outdated, or this is not Debian 12.
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
        // The format is 'URI' FILE SIZE HASH; the URI is not part of the key.
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

    /// Downloads all packages into an empty directory and unpacks them below `root`.
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

/// Returns whether a package is a shared library, not one for a language or an installer.
fn is_library(name: &str) -> bool {
    (name.starts_with("lib") || name == "zlib1g")
        && !["libperl", "libpython"].iter().any(|it| name.starts_with(it))
}

/// Returns the direct dependencies of the packages, including alternatives.
fn depends(packages: &[String]) -> Result<Vec<String>> {
    let mut apt = Command::new("apt-cache");
    apt.args(["depends", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]);
    apt.args(["--no-replaces", "--no-enhances"]).args(packages);
    let listed = exec::succeed(&mut apt, Duration::from_secs(120))?;
    Ok(names(&listed))
}

/// Returns the names in lines such as `  Depends: libc6` and ` |PreDepends: libc6`.
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
    fn apt_dependencies_are_parsed() {
        let listed = "xl\n  PreDepends: dpkg\n |Depends: libc6\n  Depends: <virtual>\n    libx\n";
        assert_eq!(names(listed), ["dpkg", "libc6"]);
    }
}
