//! QEMU's own sample images, which its tests read: fetched as an ordinary user can, out of Debian's
//! source package. They are QEMU's and no part of pvio.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::cache;
use crate::{exec, tools};

/// Where they are in the package.
const FOLDER: &str = "tests/qemu-iotests/sample_images";
/// Longer than any mirror should take for 35 MB.
const DOWNLOAD: Duration = Duration::from_secs(300);
const QUICK: Duration = Duration::from_secs(60);

/// A folder with the images, fetched if it is not there.
///
/// # Errors
/// apt has no sources, or does not bring them.
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
        // Hundreds of megabytes of zeroes.
        let unpacked = file.path().with_extension("");
        exec::succeed(tools::program("fallocate")?.arg("--dig-holes").arg(unpacked), QUICK)?;
    }
    if let Err(error) = fs::rename(&images, &dir) {
        ensure!(dir.is_dir(), "{}: {error}", dir.display());
    }
    Ok(dir)
}

/// Downloads QEMU's source package into a folder; its archive.
fn download(work: &Path) -> Result<PathBuf> {
    let [sources, lists, cache, package] =
        ["sources", "lists", "cache", "package"].map(|name| work.join(name));
    for dir in [&sources, &lists.join("partial"), &cache.join("archives/partial"), &package] {
        fs::create_dir_all(dir)?;
    }
    write_sources(&sources)?;
    // Lists of its own: those of the machine are root's, and mostly without sources.
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

/// apt's sources of this machine, those of binaries made such of sources.
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
    fn both_ways_to_write_sources_are_read() {
        assert_eq!(of_sources("# a\ndeb [x=y] b c d\n"), "# a\ndeb-src [x=y] b c d\n");
        assert_eq!(of_sources("Types: deb\nURIs: u\n"), "Types: deb-src\nURIs: u\n");
    }
}
