//! The report: table, list and logs.

use serde::Serialize;
use serde_json::Value;

use super::agent::Case;

/// The result of a scenario.
#[derive(Clone, Serialize)]
pub struct Row {
    /// `NAME:BACKEND:KIND`
    pub scenario: String,
    /// `passed`, `failed` or `skipped`.
    pub result: String,
    /// Wall-clock duration of the last run.
    pub seconds: f64,
    /// Number of earlier runs that failed because of the emulator.
    pub retries: u32,
    /// The reason why it did not pass, or why it was run again.
    pub reason: String,
    /// Measurements.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<Value>,
}

impl Row {
    /// Returns whether it did not fail.
    pub fn good(&self) -> bool {
        self.result != "failed"
    }
}

/// Formats the list of cases.
pub fn list(cases: &[Case]) -> String {
    let width = cases.iter().map(|case| case.name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for case in cases {
        let Case { name, backend, kind, proves, .. } = case;
        text += &format!("{name:<width$}  {backend:<5}  {kind:<3}  {proves}\n");
    }
    text
}

/// Formats one row.
pub fn line(row: &Row) -> String {
    let verdict = match row.result.as_str() {
        "passed" => "ok".to_owned(),
        other => other.to_uppercase(),
    };
    let mut text = format!("    {verdict} {} ({:.1} s)", row.scenario, row.seconds);
    if row.retries > 0 {
        text += ", the second time";
    }
    if !row.reason.is_empty() {
        text += &format!(": {}", row.reason);
    }
    text
}

/// Formats the table `scenario result seconds retries reason`, and the summary line.
pub fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.scenario.len()).max().unwrap_or_default().max(8);
    let mut text = format!("{:<width$}  result   seconds  retries  reason\n", "scenario");
    for row in rows {
        let Row { scenario, result, seconds, retries, reason, .. } = row;
        let reason = reason.lines().next().unwrap_or_default();
        let written =
            format!("{scenario:<width$}  {result:<7}  {seconds:>7.1}  {retries:>7}  {reason}");
        text += written.trim_end();
        text.push('\n');
    }
    let count = |result: &str| rows.iter().filter(|row| row.result == result).count();
    let (passed, failed, skipped) = (count("passed"), count("failed"), count("skipped"));
    text += &format!("\n{passed} passed, {failed} failed, {skipped} skipped\n");
    text
}

/// Formats the logs of a scenario that failed.
pub fn logs(logs: &Value) -> String {
    let mut text = String::new();
    for (name, lines) in logs.as_object().into_iter().flatten() {
        for line in lines.as_array().into_iter().flatten() {
            text += &format!("    {name} | {}\n", line.as_str().unwrap_or_default());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_table_is_aligned() {
        let row = |scenario: &str, result: &str, reason: &str| Row {
            scenario: scenario.to_owned(),
            result: result.to_owned(),
            seconds: 1.25,
            retries: 0,
            reason: reason.to_owned(),
            rows: Vec::new(),
        };
        let rows = [row("disk-verify:pvio:pvh", "passed", ""), row("nic", "failed", "a\nb")];
        let expected = "\
scenario              result   seconds  retries  reason
disk-verify:pvio:pvh  passed       1.2        0
nic                   failed       1.2        0  a

1 passed, 1 failed, 0 skipped
";
        assert_eq!(table(&rows), expected);
    }
}
