//! Allowed dependencies of packages and modules, locations of `unsafe` and xenstore keys, names in
//! the documentation.
//!
//! | module | contents |
//! |---|---|
//! | [`dependencies`] | the packages, and the dependencies allowed between them |
//! | [`source`] | a source file as tokens: keywords and string literals, no comments |
//! | [`homes`] | files that may contain `unsafe` and xenstore keys |
//! | [`cycles`] | modules must not import each other in a cycle |
//! | [`sizes`] | maximum length of a file |
//! | [`profiles`] | release builds keep overflow checks |
//! | [`unsafety`] | number of `unsafe` blocks in each file, compared with `ARCHITECTURE.md` |
//! | [`book`] | links, files and items in the documentation must exist |
//! | [`paths`] | full paths of modules, functions and tests |

mod book;
mod cycles;
mod dependencies;
mod homes;
mod paths;
mod profiles;
mod sizes;
mod source;
mod unsafety;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::exec;
use crate::report::Report;

/// Packages that cargo's metadata lacks, since they are not members of the workspace.
const OUTSIDE: &[&str] = &["frontends/examples/bare-metal"];

/// A package of the workspace, from cargo's metadata.
#[derive(Clone, Default)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Packages of the workspace that it depends on.
    needs: Vec<String>,
    /// Packages of the workspace that its tests depend on.
    tests_need: Vec<String>,
    /// Root source files of its libraries and programs, without those of its tests.
    roots: Vec<PathBuf>,
}

/// Runs all checks.
pub fn run() -> Result<Report> {
    let packages = packages()?;
    let all = with_outside(&packages);
    let occurrences = unsafety::count(&all)?;
    let mut report =
        Report { notes: unsafety::per_package(&occurrences, &all), ..Report::default() };
    let checks = [
        ("dependencies", dependencies::check(&packages)),
        ("unsafe code", homes::check_unsafe(&all)?),
        ("unsafe blocks", unsafety::check(&occurrences)?),
        ("xenstore keys", homes::check_keys(&packages)?),
        ("import cycles", cycles::check(&packages)?),
        ("sizes", sizes::check(&all)?),
        ("profiles", profiles::check()?),
        ("book", book::check(&packages)?),
    ];
    for (check, faults) in checks {
        report = report.and(if faults.is_empty() {
            Report::passed()
        } else {
            Report::failed(format!("{check}:\n  {}\n", faults.join("\n  ")))
        });
    }
    Ok(report)
}

/// Writes the tables that [`run`] compares.
///
/// # Errors
/// `cargo metadata` fails, or a page cannot be written.
pub fn write_tables() -> Result<()> {
    unsafety::write(&unsafety::count(&with_outside(&packages()?))?)
}

fn with_outside(packages: &[Package]) -> Vec<Package> {
    let outside = OUTSIDE.iter().map(|dir| Package {
        name: dir.rsplit('/').next().unwrap_or_default().to_owned(),
        dir: exec::root().join(dir),
        ..Package::default()
    });
    packages.iter().cloned().chain(outside).collect()
}

/// Returns the packages of the workspace.
///
/// # Errors
/// `cargo metadata` fails.
pub fn packages() -> Result<Vec<Package>> {
    let mut cargo = exec::cargo();
    cargo.args(["metadata", "--no-deps", "--format-version", "1", "--quiet"]);
    let output = exec::succeed(&mut cargo, Duration::from_secs(60))?;
    let metadata: Value = serde_json::from_str(&output).context("read cargo metadata")?;
    let packages = metadata["packages"].as_array().context("no packages in cargo metadata")?;
    packages.iter().map(package).collect()
}

fn package(package: &Value) -> Result<Package> {
    let text = |value: &Value| value.as_str().map(str::to_owned).context("not a string");
    let mut needs = Vec::new();
    let mut tests_need = Vec::new();
    for dependency in package["dependencies"].as_array().into_iter().flatten() {
        if dependency["path"].is_string() {
            let kind = if dependency["kind"] == "dev" { &mut tests_need } else { &mut needs };
            kind.push(text(&dependency["name"])?);
        }
    }
    let mut roots = Vec::new();
    for target in package["targets"].as_array().into_iter().flatten() {
        let kinds = target["kind"].as_array().into_iter().flatten();
        if kinds.filter_map(Value::as_str).any(|kind| kind == "lib" || kind == "bin") {
            roots.push(text(&target["src_path"])?.into());
        }
    }
    let manifest = PathBuf::from(text(&package["manifest_path"])?);
    let dir = manifest.parent().context("a manifest lies in a folder")?.to_path_buf();
    Ok(Package { name: text(&package["name"])?, dir, needs, tests_need, roots })
}
