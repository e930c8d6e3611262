//! The shared libraries of a program, found below an unpacked root by that root's own dynamic
//! loader. The result is therefore what the program loads later, independently of the host's
//! libraries.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec;

const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// Debian's directories of libraries, relative to the root.
const FOLDERS: &[&str] =
    &["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];

/// Returns the dynamic loader and every library of `program`, as files below `root`.
///
/// # Errors
/// A library, or the required version of one, is not below the root.
pub fn needed(root: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    let mut list = loader(root);
    let ran = exec::run(list.arg("--list").arg(program), Duration::from_secs(20))?;
    if !ran.status.success() {
        bail!("{} cannot run on Debian 12's libraries:\n{}", program.display(), ran.output);
    }
    let mut found = vec![root.join(LOADER)];
    for line in ran.output.lines() {
        let Some(file) = library(line).with_context(|| program.display().to_string())? else {
            continue;
        };
        if !file.starts_with(root) {
            bail!("{}: {} is in none of the packages", program.display(), file.display());
        }
        if !found.contains(&file) {
            found.push(file);
        }
    }
    Ok(found)
}

/// Returns a command that runs a program below the root on this machine, with that root's
/// libraries.
pub fn program(root: &Path, path: &str) -> Command {
    let mut command = loader(root);
    command.arg(root.join(path));
    command
}

fn loader(root: &Path) -> Command {
    let folders: Vec<_> = FOLDERS.iter().map(|it| root.join(it).display().to_string()).collect();
    let mut command = Command::new(root.join(LOADER));
    command.env_clear().args(["--library-path", &folders.join(":")]);
    command
}

/// Returns the file in a line of the loader's list: `libz.so.1 => /usr/lib/libz.so.1 (0x00007f…)`.
fn library(line: &str) -> Result<Option<PathBuf>> {
    let Some((name, place)) = line.trim().split_once(" => ") else {
        return Ok(None);
    };
    if place.starts_with("not found") {
        bail!("library {name} is in none of the packages");
    }
    Ok(place.split_once(" (0x").map(|(file, _)| PathBuf::from(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output_is_parsed() {
        let line = "\tlibz.so.1 => /r/usr/lib/libz.so.1 (0x00007f0000000000)";
        assert_eq!(library(line).unwrap(), Some(PathBuf::from("/r/usr/lib/libz.so.1")));
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007fff)").unwrap(), None);
        assert!(library("\tlibq.so.1 => not found").is_err());
    }
}
