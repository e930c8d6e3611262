//! Processes, as `/proc` shows them.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// A process's command line, its words separated by blanks; empty once it is gone.
pub fn command_line(pid: u32) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ").trim_end().to_owned()
}

/// The processes whose environment holds `variable` (`NAME=value`).
pub fn with_variable(variable: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        variables.split(|byte| *byte == 0).any(|it| it == variable.as_bytes())
    })
    .collect()
}

/// Processor time a process has used, in ticks of 10 ms.
fn ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; utime and stime are fields 14 and 15.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Checks that processes with nothing to do use next to no processor time: 10 % of one processor
/// together, which a single spinning thread exceeds many times over.
pub fn idle(pids: &[u32]) -> Result<()> {
    let used = || pids.iter().map(|pid| ticks(*pid)).sum::<Option<u64>>();
    let gone = || format!("one of {pids:?} is gone");
    let before = used().with_context(gone)?;
    std::thread::sleep(Duration::from_secs(2));
    let ticks = used().with_context(gone)? - before;
    ensure!(ticks <= 20, "with nothing to do, {pids:?} used {} ms in two seconds", ticks * 10);
    Ok(())
}
