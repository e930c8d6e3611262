//! Selection of scenarios and of the number of machines.

use std::{fs, thread};

use anyhow::{Result, ensure};

use super::agent::Case;

/// Returns the cases that match any of the words.
pub fn choose(words: &[String], cases: Vec<Case>, bench: bool) -> Result<Vec<Case>> {
    let cases: Vec<_> =
        cases.into_iter().filter(|case| case.name.starts_with("bench-") == bench).collect();
    if words.is_empty() || words == ["all"] {
        return Ok(cases);
    }
    for word in words {
        ensure!(cases.iter().any(|case| names(word, &case.id)), "no scenario is called {word}");
    }
    Ok(cases.into_iter().filter(|case| words.iter().any(|word| names(word, &case.id))).collect())
}

/// Returns whether each non-empty part of `word` is equal to that of `id`; a part may end in `*`.
fn names(word: &str, id: &str) -> bool {
    let mut parts = id.split(':');
    word.split(':').all(|wanted| {
        let Some(part) = parts.next() else { return false };
        match wanted.strip_suffix('*') {
            Some(start) => part.starts_with(start),
            None => wanted.is_empty() || wanted == part,
        }
    })
}

/// Returns the number of machines: one per processor, at most two, if there is memory for them.
pub fn jobs() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = available.and_then(|line| line.split_whitespace().next()?.parse().ok());
    let room = available.unwrap_or(0_usize) / (4 << 20);
    processors.min(room).clamp(1, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenario_filter_matches_name_prefix_and_parts() {
        let id = "disk-verify:linux:pv";
        for word in ["disk-verify", "disk-*", "disk-verify:linux", ":linux", "::pv", id] {
            assert!(names(word, id), "{word}");
        }
        for word in ["disk", "disk-verify:pvio", "::pvh", "disk-verify:linux:pv:more"] {
            assert!(!names(word, id), "{word}");
        }
    }
}
