//! Processes in `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Returns a process's command line with spaces between its arguments; empty if the process has
/// ended.
pub fn command_line(pid: u32) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ").trim_end().to_owned()
}

/// Returns the processes whose environment contains `variable` (`NAME=value`).
pub fn with_variable(variable: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        variables.split(|byte| *byte == 0).any(|it| it == variable.as_bytes())
    })
    .collect()
}

/// Returns the processor time of a process in ticks of 10 ms.
fn ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain any character; utime and stime are fields 14 and 15.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Checks that idle processes use almost no processor time: 10 % of one processor together. A
/// single thread in a busy loop exceeds that by far.
pub fn idle(pids: &[u32]) -> Result<()> {
    let used = || pids.iter().map(|pid| ticks(*pid)).sum::<Option<u64>>();
    let gone = || format!("one of {pids:?} is gone");
    let before = used().with_context(gone)?;
    std::thread::sleep(Duration::from_secs(2));
    let ticks = used().with_context(gone)? - before;
    ensure!(ticks <= 20, "with nothing to do, {pids:?} used {} ms in two seconds", ticks * 10);
    Ok(())
}
