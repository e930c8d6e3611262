//! `cargo xtask bench xen`: performance of disks and NICs of a stock guest, by the guest's own
//! clock, with pvio, Linux's backends and QEMU's.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::run::{self, Options};

/// The backend that the others are compared with.
const REFERENCE: &str = "linux";

/// A row as measured in dom0.
#[derive(Deserialize)]
struct Measured {
    case: String,
    backend: String,
    unit: String,
    rates: Vec<f64>,
}

/// A row of the report.
#[derive(Serialize)]
struct Row {
    suite: &'static str,
    case: String,
    backend: String,
    /// The median.
    value: f64,
    min: f64,
    max: f64,
    unit: String,
    /// Linux's median, and the ratio of `value` to it.
    reference: f64,
    ratio: f64,
    runs: usize,
}

/// Measures, prints a table with ratios, writes the rows. Returns whether it succeeded.
///
/// # Errors
/// The lab is not available, or a backend could not be measured.
pub fn run(json: Option<&Path>, words: &[String]) -> Result<bool> {
    let options = Options { json: None, pvio: None, keep: false, jobs: 1, bench: true };
    let scenarios = match run::scenarios(words, &options)? {
        Ok(scenarios) => scenarios,
        Err(why) => {
            println!("SKIPPED: {why}");
            return Ok(true);
        }
    };
    let good = scenarios.iter().all(super::report::Row::good);
    let measured: Vec<Measured> = scenarios
        .into_iter()
        .flat_map(|scenario| scenario.rows)
        .map(|row| serde_json::from_value(row).context("a row"))
        .collect::<Result<_>>()?;
    let rows = compared(&measured)?;
    println!("{}", table(&rows));
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&rows)? + "\n";
        fs::write(file, text).with_context(|| file.display().to_string())?;
    }
    Ok(good)
}

fn compared(measured: &[Measured]) -> Result<Vec<Row>> {
    let median = |rates: &[f64]| {
        let mut rates = rates.to_vec();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().context("no rates")
    };
    let mut rows = Vec::new();
    for it in measured {
        let same = |other: &&Measured| other.case == it.case && other.backend == REFERENCE;
        let Some(reference) = measured.iter().find(same) else {
            bail!("nothing of {REFERENCE} to compare {} with", it.case);
        };
        let (value, reference) = (median(&it.rates)?, median(&reference.rates)?);
        rows.push(Row {
            suite: "xen",
            case: it.case.clone(),
            backend: it.backend.clone(),
            value,
            min: it.rates.iter().copied().fold(f64::INFINITY, f64::min),
            max: it.rates.iter().copied().fold(0.0, f64::max),
            unit: it.unit.clone(),
            reference,
            ratio: value / reference,
            runs: it.rates.len(),
        });
    }
    Ok(rows)
}

/// Formats a block of rows for each case, with Linux's row first.
fn table(rows: &[Row]) -> String {
    let mut cases: Vec<&str> = rows.iter().map(|row| row.case.as_str()).collect();
    let mut seen = std::collections::HashSet::new();
    cases.retain(|case| seen.insert(*case));
    let width = rows.iter().map(|row| row.backend.len()).max().unwrap_or_default();
    let mut text = String::new();
    for case in cases {
        let mut here: Vec<_> = rows.iter().filter(|row| row.case == case).collect();
        here.sort_by_key(|row| row.backend != REFERENCE);
        text += &format!("{case} ({})\n", here[0].unit);
        for Row { backend, value, min, max, ratio, .. } in here {
            text += &format!("  {backend:<width$}  {value:>10.0}  {ratio:>5.2} x");
            text += &format!("  ({min:.0} to {max:.0})\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lab_rates_are_compared_with_linux() {
        let measured = |backend: &str, rates: &[f64]| Measured {
            case: "read".to_owned(),
            backend: backend.to_owned(),
            unit: "requests/s".to_owned(),
            rates: rates.to_vec(),
        };
        let both = [measured("pvio map", &[30.0, 10.0, 20.0]), measured("linux", &[40.0])];
        let rows = compared(&both).unwrap();
        assert!((rows[0].ratio - 0.5).abs() < 1e-9 && (rows[0].max - 30.0).abs() < 1e-9);
        let expected = "\
read (requests/s)
  linux             40   1.00 x  (40 to 40)
  pvio map          20   0.50 x  (10 to 30)
";
        assert_eq!(table(&rows), expected);
        assert!(compared(&both[..1]).is_err());
    }
}
