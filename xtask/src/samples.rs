//! QEMU's own sample images, which pvio's tests read, from Debian's source package of QEMU.
//! Fetching them needs no root privileges. They are part of QEMU, not of pvio.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::cache;
use crate::{exec, tools};

/// Path of the images in the source package.
const FOLDER: &str = "tests/qemu-iotests/sample_images";
/// Timeout of a download of 35 MB.
const DOWNLOAD: Duration = Duration::from_secs(300);
const QUICK: Duration = Duration::from_secs(60);

/// Returns a directory with the images; downloads them if necessary.
///
/// # Errors
/// apt has no sources, or the download fails.
pub fn fetch() -> Result<PathBuf> {
    let base = cache::base()?;
    let dir = base.join("qemu-samples");
    if dir.is_dir() {
        return Ok(dir);
    }
    fs::create_dir_all(&base).with_context(|| format!("make {}", base.display()))?;
    println!("    fetching QEMU's sample images to {}", dir.display());
    let work = tempfile::Builder::new().prefix("samples-").tempdir_in(&base)?;
    let archive = download(work.path())?;
    let images = work.path().join("images");
    fs::create_dir(&images)?;
    let mut tar = tools::program("tar")?;
    tar.arg("-xJf").arg(archive).arg("-C").arg(&images).arg("--wildcards");
    tar.args(["--strip-components=4", &format!("*/{FOLDER}/*.bz2")]);
    exec::succeed(&mut tar, QUICK)?;
    let packed: Vec<_> = fs::read_dir(&images)?.collect::<Result<_, _>>()?;
    ensure!(!packed.is_empty(), "QEMU's source package has no {FOLDER}");
    for file in packed {
        exec::succeed(tools::program("bunzip2")?.arg(file.path()), QUICK)?;
        // Hundreds of megabytes of zeros.
        let unpacked = file.path().with_extension("");
        exec::succeed(tools::program("fallocate")?.arg("--dig-holes").arg(unpacked), QUICK)?;
    }
    if let Err(error) = fs::rename(&images, &dir) {
        ensure!(dir.is_dir(), "{}: {error}", dir.display());
    }
    Ok(dir)
}

/// Downloads QEMU's source package into a directory; returns the archive.
fn download(work: &Path) -> Result<PathBuf> {
    let [sources, lists, cache, package] =
        ["sources", "lists", "cache", "package"].map(|name| work.join(name));
    for dir in [&sources, &lists.join("partial"), &cache.join("archives/partial"), &package] {
        fs::create_dir_all(dir)?;
    }
    write_sources(&sources)?;
    // Separate lists: those of the system belong to root, and usually do not include sources.
    let apt = |words: &[&str]| {
        let mut apt = Command::new("apt-get");
        for (option, dir) in [
            ("Dir::Etc::SourceParts", &sources),
            ("Dir::State::Lists", &lists),
            ("Dir::Cache", &cache),
        ] {
            apt.arg("-o").arg(format!("{option}={}", dir.display()));
        }
        apt.args(["-o", "Dir::Etc::SourceList=/dev/null", "-o", "APT::Sandbox::User="]);
        apt.args(["-o", "Acquire::Languages=none"]).args(words);
        apt.stdin(Stdio::null()).current_dir(&package);
        exec::succeed(&mut apt, DOWNLOAD)
    };
    apt(&["update"])?;
    apt(&["source", "--download-only", "qemu"])?;
    let mut files = fs::read_dir(&package)?.flatten().map(|entry| entry.path());
    let archive = files.find(|path| path.to_string_lossy().contains(".orig.tar."));
    archive.context("the source package has no archive of QEMU's")
}

/// Writes the apt sources of this machine, with entries for binaries replaced by entries for
/// sources.
fn write_sources(to: &Path) -> Result<()> {
    let etc = Path::new("/etc/apt");
    let parts = fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten();
    let mut files: Vec<_> = parts.map(|entry| entry.path()).collect();
    files.push(etc.join("sources.list"));
    let mut written = 0;
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let name = file.file_name().context("a name")?;
        fs::write(to.join(name), of_sources(&text))?;
        written += 1;
    }
    ensure!(written > 0, "apt has no sources: {} is empty", etc.display());
    Ok(())
}

fn of_sources(text: &str) -> String {
    let line = |line: &str| match line.split_once([' ', '\t']) {
        Some(("deb", rest)) => format!("deb-src {rest}\n"),
        Some(("Types:", _)) => "Types: deb-src\n".to_owned(),
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_sources_in_both_formats_are_converted() {
        assert_eq!(of_sources("# a\ndeb [x=y] b c d\n"), "# a\ndeb-src [x=y] b c d\n");
        assert_eq!(of_sources("Types: deb\nURIs: u\n"), "Types: deb-src\nURIs: u\n");
    }
}
