//! Who may depend on whom, where `unsafe` and xenstore keys may stand, what the book names.
//!
//! | module | holds |
//! |---|---|
//! | [`dependencies`] | the packages, and the dependencies allowed between them |
//! | [`source`] | a source file as tokens: keywords and string literals, no comments |
//! | [`homes`] | where `unsafe` and xenstore keys may stand |
//! | [`cycles`] | no module imports one that imports it |
//! | [`sizes`] | how long a file may be |
//! | [`book`] | what the book names exists |

mod book;
mod cycles;
mod dependencies;
mod homes;
mod sizes;
mod source;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::exec;
use crate::report::Report;

/// A package of the workspace, as cargo sees it.
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Other packages of the workspace it needs to run.
    needs: Vec<String>,
    /// Other packages of the workspace its tests need.
    tests_need: Vec<String>,
    /// The root source files of its libraries and programs; not of its tests.
    roots: Vec<PathBuf>,
}

/// All the checks.
pub fn run() -> Result<Report> {
    let packages = packages()?;
    let mut report = Report::default();
    let checks = [
        ("dependencies", dependencies::check(&packages)),
        ("unsafe code", homes::check_unsafe(&packages)?),
        ("xenstore keys", homes::check_keys(&packages)?),
        ("import cycles", cycles::check(&packages)?),
        ("sizes", sizes::check(&packages)?),
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

/// The packages of the workspace.
///
/// # Errors
/// cargo does not say.
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
