//! Checks that every crate without `publish = false` can be published.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::exec;
use crate::report::Report;

const DEADLINE: Duration = Duration::from_secs(10 * 60);

/// A registry's maximum number of keywords and of categories.
const MOST_WORDS: usize = 5;
/// A registry's maximum length of a keyword in bytes.
const KEYWORD_MOST: usize = 20;

const LICENCES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

/// Parts of cargo's messages about a registry that cannot be reached.
const UNREACHABLE: [&str; 4] = [
    "failed to query replaced source registry",
    "failed to fetch",
    "download of config.json failed",
    "spurious network error",
];

/// Checks the manifests, builds every package, and runs cargo's dry run of publishing them all.
pub fn run() -> Result<Report> {
    let mut metadata = exec::cargo();
    metadata.args(["metadata", "--no-deps", "--format-version", "1", "--quiet"]);
    let output = exec::succeed(&mut metadata, DEADLINE)?;
    let metadata: Value = serde_json::from_str(&output).context("read cargo metadata")?;
    let packages = metadata["packages"].as_array().context("no packages in cargo metadata")?;
    let faults: Vec<String> = packages.iter().flat_map(faults).collect();
    let mut report =
        if faults.is_empty() { Report::passed() } else { Report::failed(faults.join("\n")) };

    let mut package = exec::cargo();
    package.args(["package", "--workspace", "--no-verify", "--allow-dirty", "--offline"]);
    for name in packages.iter().filter(|package| !is_published(package)) {
        package.args(["--exclude", name["name"].as_str().context("a package has a name")?]);
    }
    report = report.and(match exec::succeed(&mut package, DEADLINE) {
        Ok(_) => Report::passed(),
        Err(error) => Report::failed(format!("{error:#}")),
    });

    let mut publish = exec::cargo();
    publish.args(["publish", "--workspace", "--dry-run", "--no-verify", "--allow-dirty"]);
    let ran = exec::run(&mut publish, DEADLINE)?;
    Ok(report.and(if ran.status.success() {
        Report::passed()
    } else if UNREACHABLE.iter().any(|words| ran.output.contains(words)) {
        Report::skipped(
            "cargo publish --dry-run: the registry's index cannot be reached; connect to it",
        )
    } else {
        Report::failed(format!("{}: {}\n{}", exec::shown(&publish), ran.status, ran.output))
    }))
}

fn is_published(package: &Value) -> bool {
    // `publish = false` is an empty list of registries.
    package["publish"].as_array().is_none_or(|registries| !registries.is_empty())
}

/// Returns what a package lacks for a registry or for readers.
fn faults(package: &Value) -> Vec<String> {
    let name = package["name"].as_str().unwrap_or_default();
    if !is_published(package) {
        return Vec::new();
    }
    let mut faults = Vec::new();
    for key in ["description", "license", "rust_version"] {
        if !package[key].is_string() {
            faults.push(format!("{name}: no {key}"));
        }
    }
    for key in ["keywords", "categories"] {
        let words = package[key].as_array().map_or(0, Vec::len);
        if words == 0 || words > MOST_WORDS {
            faults.push(format!("{name}: {words} {key}; 1 to {MOST_WORDS} are accepted"));
        }
    }
    let keywords = package["keywords"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for long in keywords.filter(|keyword| keyword.len() > KEYWORD_MOST) {
        faults.push(format!("{name}: the keyword {long} is longer than {KEYWORD_MOST} bytes"));
    }
    for dependency in package["dependencies"].as_array().into_iter().flatten() {
        // With a version, it would have to be published first, and its own tests may depend on this
        // package.
        let is_ours = dependency["kind"] == "dev" && dependency["path"].is_string();
        if is_ours && dependency["req"] != "*" {
            let needed = &dependency["name"];
            faults.push(format!(
                "{name}: the dev-dependency {needed} has a version; give it a path alone"
            ));
        }
    }
    let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
    let readme = package["readme"].as_str().map(|readme| manifest.with_file_name(readme));
    if !readme.is_some_and(|readme| readme.is_file()) {
        faults.push(format!("{name}: no README.md"));
    }
    // Both licences require a copy of their text.
    for file in LICENCES.iter().filter(|file| !manifest.with_file_name(file).is_file()) {
        faults.push(format!("{name}: no {file}; link to that of the workspace"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn package_with_missing_field_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        for file in LICENCES.into_iter().chain(["README.md"]) {
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        let mut package = json!({
            "name": "a", "description": "d", "license": "l", "rust_version": "1.95",
            "keywords": ["k"], "categories": ["c"], "readme": "README.md",
            "manifest_path": dir.path().join("Cargo.toml"), "publish": null,
            "dependencies": [
                {"name": "b", "kind": "dev", "path": "/b", "req": "*"},
                {"name": "b", "kind": null, "path": "/b", "req": "^0.1.0"},
            ],
        });
        assert!(faults(&package).is_empty());
        for (key, value) in [
            ("description", json!(null)),
            ("license", json!(null)),
            ("keywords", json!([])),
            ("keywords", json!(["a", "b", "c", "d", "e", "f"])),
            ("keywords", json!(["a-keyword-of-21-bytes"])),
            ("categories", json!([])),
            ("dependencies", json!([{"name": "b", "kind": "dev", "path": "/b", "req": "^0.1.0"}])),
            ("readme", json!(null)),
            ("readme", json!("MISSING.md")),
        ] {
            let right = std::mem::replace(&mut package[key], value);
            assert_eq!(faults(&package).len(), 1, "{package}");
            let private = std::mem::replace(&mut package["publish"], json!([]));
            assert!(faults(&package).is_empty(), "publish = false");
            package["publish"] = private;
            package[key] = right;
        }
        for file in LICENCES {
            std::fs::remove_file(dir.path().join(file)).unwrap();
        }
        assert_eq!(faults(&package).len(), LICENCES.len());
    }
}
