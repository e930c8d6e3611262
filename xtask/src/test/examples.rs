//! Runs every example of the libraries.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::exec;
use crate::report::Report;

const BUILD_DEADLINE: Duration = Duration::from_secs(20 * 60);
const DEADLINE: Duration = Duration::from_secs(60);

/// Examples that need two domains on Xen.
const ON_XEN: [&str; 2] = ["grantcost", "selftest"];

/// Builds the examples and runs each, except those of [`ON_XEN`], which are skipped. Each counts as one
/// test.
pub fn run() -> Result<Report> {
    let mut build = exec::cargo();
    build.args(["build", "--workspace", "--all-features", "--examples"]);
    build.args(["--quiet", "--message-format", "json-render-diagnostics"]);
    let examples = programs(&exec::succeed(&mut build, BUILD_DEADLINE)?)?;
    let missing: Vec<&str> = ON_XEN.into_iter().filter(|name| !has(&examples, name)).collect();
    if !missing.is_empty() {
        return Ok(Report::failed(format!("no such example: {}", missing.join(" "))));
    }
    let dir = tempfile::tempdir().context("a directory for the examples")?;
    let on_xen = |name| format!("example {name}: run it in two domains on Xen (docs/xen-linux.md)");
    let mut report = ON_XEN
        .into_iter()
        .fold(Report::default(), |sum, name| sum.and(Report::skipped(on_xen(name))));
    for (name, program) in examples.iter().filter(|(name, _)| !ON_XEN.contains(&name.as_str())) {
        let mut command = Command::new(program);
        if name == "xenstored" {
            // The argument is the path of a socket. The example ends at the end of its standard
            // input, which is empty.
            command.arg(dir.path().join("socket"));
        }
        report = report.and(ends_well(name, &mut command));
    }
    Ok(report)
}

fn has(examples: &[(String, PathBuf)], name: &str) -> bool {
    examples.iter().any(|(example, _)| example == name)
}

fn ends_well(name: &str, command: &mut Command) -> Report {
    match exec::run(command, DEADLINE) {
        Ok(ran) if ran.status.success() => Report::passed(),
        Ok(ran) => Report::failed(format!("example {name}: {}\n{}", ran.status, ran.output)),
        Err(error) => Report::failed(format!("example {name}: {error:#}")),
    }
}

/// Returns the examples in cargo's messages, with the paths of their programs.
fn programs(messages: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut programs = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("read cargo's messages")?;
        let is_example = message["target"]["kind"] == serde_json::json!(["example"]);
        if let (true, Some(program)) = (is_example, message["executable"].as_str()) {
            let name = message["target"]["name"].as_str().context("an example has a name")?;
            programs.push((name.to_owned(), Path::new(program).to_owned()));
        }
    }
    programs.sort();
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_messages_yield_only_examples() {
        let messages = r#"warning: something
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"a"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["example"],"name":"b"},"executable":"/t/b"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"c"},"executable":"/t/c"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(programs(messages).unwrap(), [("b".to_owned(), PathBuf::from("/t/b"))]);
        assert!(programs("{").is_err());
    }

    #[test]
    fn example_that_fails_or_is_missing_is_failed_test() {
        let passed = ends_well("true", &mut Command::new("true"));
        assert_eq!((passed.counts.passed, passed.counts.failed), (1, 0));
        for program in ["false", "/nonexistent/program"] {
            let failed = ends_well(program, &mut Command::new(program));
            assert_eq!((failed.counts.passed, failed.counts.failed), (0, 1), "{program}");
        }
    }
}
