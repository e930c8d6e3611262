//! `cargo xtask bench`: pvio compared with its references, as a table and as JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::exec;

/// Builds `pvio-bench` in release mode and runs one of its suites. Passes its output through, then
/// prints its rows as a table. Returns whether it succeeded.
///
/// # Errors
/// It does not build or run, or writes no rows.
pub fn run(suite: &str, json: Option<&Path>, more: &[String]) -> Result<bool> {
    let mut build = exec::cargo();
    build.args(["build", "--release", "--package", "pvio-benches", "--bin", "pvio-bench"]);
    if suite == "neighbours" {
        // The driver domain is a process of the command.
        build.args(["--package", "pvio", "--bin", "pvio"]);
    }
    if !build.status().context("run cargo")?.success() {
        return Ok(false);
    }
    let scratch = tempfile::tempdir()?;
    let rows = json.map_or_else(|| scratch.path().join("rows.json"), PathBuf::from);
    let mut bench = Command::new(exec::target().join("release/pvio-bench"));
    bench.arg(suite).arg("--json").arg(&rows).args(more).stdin(Stdio::null());
    if !bench.status().context("run pvio-bench")?.success() {
        return Ok(false);
    }
    let text = fs::read_to_string(&rows).with_context(|| format!("read {}", rows.display()))?;
    println!("\n{}", table(&text)?);
    Ok(true)
}

/// Columns of the table: key in the row, heading, number of decimals.
const COLUMNS: &[(&str, &str, usize)] = &[
    ("suite", "suite", 0),
    ("case", "case", 0),
    ("ours", "pvio", 0),
    ("reference", "reference", 0),
    ("unit", "unit", 0),
    ("reference_name", "against", 0),
    ("ratio", "ratio", 3),
    ("ratio_min", "min", 3),
    ("ratio_max", "max", 3),
    ("runs", "runs", 0),
    ("ours_cpu", "cpu ns", 0),
    ("worker_cpu", "worker", 0),
    ("reference_cpu", "reference", 0),
];

/// Formats the rows as a table: text is left-aligned, numbers are right-aligned.
fn table(json: &str) -> Result<String> {
    let rows: Vec<Value> = serde_json::from_str(json).context("rows of pvio-bench")?;
    let mut lines = vec![COLUMNS.iter().map(|(_, name, _)| (*name).to_owned()).collect::<Vec<_>>()];
    for row in &rows {
        let cells = COLUMNS.iter().map(|(key, _, decimals)| match &row[*key] {
            Value::Number(number) => {
                format!("{:.*}", decimals, number.as_f64().unwrap_or(f64::NAN))
            }
            Value::String(text) => text.clone(),
            // Not measured in this suite.
            _ => "-".to_owned(),
        });
        lines.push(cells.collect());
    }
    let is_number = |column: usize| rows.iter().any(|row| row[COLUMNS[column].0].is_number());
    let mut table = String::new();
    for line in &lines {
        let mut written = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
            written += &if is_number(column) {
                format!("{cell:>width$}  ")
            } else {
                format!("{cell:<width$}  ")
            };
        }
        table += written.trim_end();
        table.push('\n');
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bench_rows_are_printed_as_aligned_table() {
        let json = r#"[{"suite":"disk","case":"4k read, depth 1","ours":408000.4,"reference":497000.0,
            "reference_name":"raw io_uring","unit":"IOPS","ratio":0.8209,"ratio_min":0.8,
            "ratio_max":0.85,"runs":7,"ours_cpu":1200.4,"worker_cpu":null,"reference_cpu":900.0}]"#;
        let expected = "\
suite  case                pvio  reference  unit  against       ratio    min    max  runs  cpu ns  worker  reference
disk   4k read, depth 1  408000     497000  IOPS  raw io_uring  0.821  0.800  0.850     7    1200  -             900
";
        assert_eq!(table(json).unwrap(), expected);
    }

    #[test]
    fn bench_output_that_is_no_rows_is_an_error() {
        assert!(table("{}").is_err());
    }
}
