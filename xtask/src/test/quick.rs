//! Short checks (about a minute) of what has changed since the merge base with the main branch.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{layers, steps};
use crate::exec;
use crate::report::Report;

const GIT: Duration = Duration::from_secs(20);

/// Runs formatting, layers, and for each changed package clippy and unit tests. Installs nothing.
pub fn run() -> Result<Report> {
    let report = steps::fmt()?.and(layers::run()?);
    let mut names: Vec<String> = Vec::new();
    let packages = layers::packages()?;
    for file in changed()? {
        // A package can be in the directory of another one.
        let owner = packages.iter().filter(|package| file.starts_with(&package.dir));
        if let Some(owner) = owner.max_by_key(|package| package.dir.components().count()) {
            names.push(owner.name.clone());
        }
    }
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Ok(report);
    }
    println!("    changed: {}", names.join(" "));
    Ok(report.and(steps::clippy_of(&names)?).and(steps::units_of(&names)?))
}

/// Returns the files that differ from the merge base, including uncommitted changes.
fn changed() -> Result<Vec<PathBuf>> {
    let base = ["origin/main", "main"].into_iter().find_map(|main| {
        let base = git(&["merge-base", "HEAD", main]).ok()?;
        Some(base.trim().to_owned())
    });
    let base = base.context("no main branch to compare with: git fetch origin main")?;
    let mut list = git(&["diff", "--name-only", &base])?;
    list += &git(&["ls-files", "--others", "--exclude-standard"])?;
    Ok(list.lines().map(|name| exec::root().join(Path::new(name))).collect())
}

fn git(args: &[&str]) -> Result<String> {
    exec::succeed(Command::new("git").current_dir(exec::root()).args(args), GIT)
}
