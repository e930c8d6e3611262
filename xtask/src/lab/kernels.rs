//! Kernels that some guests boot instead of the default one: older and newer ones of Debian.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::agent::Case;
use super::cache::{self, Cache};
use super::cpio::Archive;
use super::debs;
use super::kernel::{self, Modules};
use super::libs;
use crate::exec;

/// A kernel, and its Debian package.
struct Kernel {
    /// The name in scenarios such as `kernel-5.10`.
    name: &'static str,
    /// The package that depends on its newest build.
    package: &'static str,
    /// The Debian release with the package, if it is not that of this machine.
    release: Option<&'static str>,
}

const KERNELS: &[Kernel] = &[
    Kernel { name: "5.10", package: "linux-image-amd64", release: Some("bullseye") },
    Kernel { name: "6.12", package: "linux-image-6.12-amd64", release: None },
];

/// Modules that a guest with only a disk and a NIC loads.
const MODULES: &[&str] = &["xen-blkfront", "xen-netfront", "ext4"];

const QUICK: Duration = Duration::from_secs(60);
const FETCH: Duration = Duration::from_secs(600);

/// Provides the kernels that these cases need, as files for dom0: `vmlinux-NAME`, an ELF image, and
/// `modules-NAME.cpio`, to be appended to a guest's image; or `NAME.missing`, with the reason.
///
/// # Errors
/// The disk is full. Kernels that cannot be downloaded only cause their scenarios to be skipped.
pub fn provide(cache: &Cache, cases: &[Case], to: &Path) -> Result<()> {
    for kernel in KERNELS {
        let name = format!("kernel-{}", kernel.name);
        if !cases.iter().any(|case| case.name == name) {
            continue;
        }
        fs::create_dir_all(to)?;
        match kernel.fetched(cache) {
            Ok(dir) => {
                for file in [kernel.image(), kernel.modules()] {
                    fs::copy(dir.join(&file), to.join(&file)).context(file)?;
                }
            }
            Err(error) => {
                fs::write(to.join(format!("{}.missing", kernel.name)), format!("{error:#}"))?;
            }
        }
    }
    Ok(())
}

/// Makes the files visible to a machine in its shared directory, without copying them.
///
/// # Errors
/// The directories are on different file systems.
pub fn share(kernels: &Path, folder: &Path) -> Result<()> {
    let to = folder.join("kernels");
    fs::create_dir(&to)?;
    if kernels.is_dir() {
        for file in fs::read_dir(kernels)? {
            let file = file?;
            fs::hard_link(file.path(), to.join(file.file_name()))?;
        }
    }
    Ok(())
}

impl Kernel {
    fn image(&self) -> String {
        format!("vmlinux-{}", self.name)
    }

    fn modules(&self) -> String {
        format!("modules-{}.cpio", self.name)
    }

    /// Returns the directory with both files; creates it if it does not exist.
    fn fetched(&self, cache: &Cache) -> Result<PathBuf> {
        let base = cache::base()?;
        let apt = self.apt(&base)?;
        let package = apt.newest(self.package)?;
        let dir = base.join(&package);
        if dir.is_dir() {
            return Ok(dir);
        }
        println!("    fetching {package}");
        let work = tempfile::Builder::new().prefix("fetching-").tempdir_in(&base)?;
        let root = work.path().join("root");
        fs::create_dir(&root)?;
        apt.unpack(&package, work.path(), &root)?;
        let version = package.trim_start_matches("linux-image-");
        let packed = fs::read(root.join(format!("boot/vmlinuz-{version}")))?;
        unpack(cache, kernel::payload(&packed)?, &work.path().join(self.image()))?;
        unpack_modules(cache, &root.join("lib/modules").join(version))?;
        let archive = overlay(&root, version)?;
        fs::write(work.path().join(self.modules()), archive)?;
        fs::remove_dir_all(&root)?;
        let from = work.keep();
        if let Err(error) = fs::rename(&from, &dir) {
            fs::remove_dir_all(&from)?;
            ensure!(dir.is_dir(), "{}: {error}", dir.display());
        }
        Ok(dir)
    }

    /// Returns apt with separate lists, if the kernel is from another release.
    fn apt(&self, base: &Path) -> Result<Apt> {
        let Some(release) = self.release else { return Ok(Apt { options: Vec::new() }) };
        let dir = base.join(format!("apt-{release}"));
        for folder in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(folder))?;
        }
        // The mirror in the configuration of this machine.
        let targets = ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"];
        let uris = exec::succeed(Command::new("apt-get").args(targets), QUICK)?;
        let own = uris.lines().find(|line| line.trim_end_matches('/').ends_with("/debian"));
        let own = own.context("this machine's apt has no mirror of Debian's")?;
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let sources = dir.join("sources.list");
        fs::write(&sources, format!("deb [signed-by={keys}] {own} {release} main\n"))?;
        let option = |name: &str, value: &Path| format!("-o{name}={}", value.display());
        let apt = Apt {
            options: vec![
                option("Dir::Etc::sourcelist", &sources),
                option("Dir::Etc::sourceparts", Path::new("/dev/null")),
                option("Dir::State::lists", &dir.join("lists")),
                option("Dir::Cache", &dir.join("cache")),
            ],
        };
        if apt.newest(self.package).is_err() {
            exec::succeed(apt.command("apt-get").arg("update"), FETCH)?;
        }
        Ok(apt)
    }
}

/// apt-get and apt-cache with their options.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// Returns the package of the newest kernel that `package` depends on.
    fn newest(&self, package: &str) -> Result<String> {
        let mut depends = self.command("apt-cache");
        depends.args(["depends", "--no-recommends", "--no-suggests"]).arg(package);
        let listed = exec::succeed(&mut depends, QUICK)?;
        let image = debs::names(&listed).into_iter().find(|it| it.starts_with("linux-image-"));
        image.with_context(|| format!("apt knows no {package}; run: apt-get update"))
    }

    fn unpack(&self, package: &str, work: &Path, root: &Path) -> Result<()> {
        let mut download = self.command("apt-get");
        exec::succeed(download.arg("download").arg(package).current_dir(work), FETCH)?;
        for file in fs::read_dir(work)? {
            let file = file?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                let mut dpkg = Command::new("dpkg");
                exec::succeed(dpkg.arg("-x").arg(&file).arg(root), FETCH)?;
                fs::remove_file(&file)?;
            }
        }
        Ok(())
    }
}

/// Decompresses the kernel in a bzImage. The stream is followed by four bytes with the uncompressed
/// size, which are not part of it.
fn unpack(cache: &Cache, payload: &[u8], to: &Path) -> Result<()> {
    let program = match payload {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "usr/bin/xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "usr/bin/zstd",
        _ => bail!("this kernel is compressed by something else than xz and zstd"),
    };
    let packed = to.with_extension("packed");
    fs::write(&packed, payload.get(..payload.len() - 4).context("an empty kernel")?)?;
    cache.unpack_with(program, &packed, to)?;
    fs::remove_file(packed)?;
    ensure!(fs::read(to)?.starts_with(b"\x7fELF"), "the kernel is no ELF file");
    Ok(())
}

/// Decompresses all modules below a directory: the agent only loads uncompressed ones.
fn unpack_modules(cache: &Cache, dir: &Path) -> Result<()> {
    let mut packed = Vec::new();
    let mut left = vec![dir.join("kernel")];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|extension| extension == "xz") {
                packed.push(path);
            }
        }
    }
    // Many files per command: a process for each of some thousand files would take minutes.
    for some in packed.chunks(500) {
        let mut xz = libs::program(&cache.root(), "usr/bin/xz");
        exec::succeed(xz.arg("-d").args(some), FETCH)?;
    }
    Ok(())
}

/// Returns an archive of the modules, with the list that replaces that of a guest's image.
fn overlay(root: &Path, version: &str) -> Result<Vec<u8>> {
    let modules = Modules::find(root, version)?;
    let mut archive = Archive::new(Vec::new());
    let mut list = String::new();
    for (name, path, needs) in modules.closure(MODULES)? {
        archive.copy(&format!("usr/{path}"), &root.join(&path))?;
        list += &format!("{name} /usr/{path} {}\n", needs.join(" "));
    }
    archive.file("lab/modules", list.as_bytes())?;
    Ok(archive.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_scenario() {
        for kernel in KERNELS {
            let scenarios = include_str!("../../lab-agent/src/scenarios/kernels.rs");
            assert!(scenarios.contains(&format!("kernel-{}", kernel.name)), "{}", kernel.name);
        }
    }
}
