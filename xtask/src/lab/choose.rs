//! Which scenarios run, and on how many machines.

use std::{fs, thread};

use anyhow::{Result, ensure};

use super::agent::Case;

/// The cases that any of the words names.
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

/// Whether each part of `word` that is not empty is that of `id`; a part may end in `*`.
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

/// Deals the cases to so many machines, those of a backend and a kind of guest together.
pub fn share_out(cases: &[Case], machines: usize) -> Vec<Vec<Case>> {
    let mut parts = vec![Vec::new(); machines.max(1)];
    let same = |a: &Case, b: &Case| a.backend == b.backend && a.kind == b.kind;
    let mut groups: Vec<_> = cases.chunk_by(same).collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    for group in groups {
        let part = parts.iter_mut().min_by_key(|part| part.len()).expect("one at least");
        part.extend_from_slice(group);
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// As many machines as there are processors, two at most, if there is memory for them.
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
    fn machines_get_whole_groups() {
        let case = |backend: &str, kind: &str| Case {
            id: format!("x:{backend}:{kind}"),
            name: "x".to_owned(),
            backend: backend.to_owned(),
            kind: kind.to_owned(),
            proves: String::new(),
        };
        let cases =
            [case("a", "pv"), case("a", "pv"), case("a", "pvh"), case("b", "pv"), case("b", "pv")];
        let parts = share_out(&cases, 2);
        let ids = |part: &[Case]| part.iter().map(|case| case.id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&parts[0]), ["x:a:pv", "x:a:pv", "x:a:pvh"]);
        assert_eq!(ids(&parts[1]), ["x:b:pv", "x:b:pv"]);
        assert_eq!(share_out(&cases, 9).len(), 3);
    }

    #[test]
    fn words_choose_scenarios() {
        let id = "disk-verify:linux:pv";
        for word in ["disk-verify", "disk-*", "disk-verify:linux", ":linux", "::pv", id] {
            assert!(names(word, id), "{word}");
        }
        for word in ["disk", "disk-verify:pvio", "::pvh", "disk-verify:linux:pv:more"] {
            assert!(!names(word, id), "{word}");
        }
    }
}
