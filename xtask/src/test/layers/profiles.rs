//! Release builds keep overflow checks: a parser that overflows on a peer's value must end its
//! device with a panic, and not go on with a wrong number.

use std::fs;

use anyhow::Result;

use crate::exec;

/// Profiles of programs that run with untrusted input.
const PROFILE: &str = "profile.release";
const KEY: &str = "overflow-checks";

/// Returns what is wrong with the profiles of the workspace.
pub fn check() -> Result<Vec<String>> {
    Ok(faults(&fs::read_to_string(exec::root().join("Cargo.toml"))?))
}

fn faults(manifest: &str) -> Vec<String> {
    let mut section = "";
    let (mut is_on, mut faults) = (false, Vec::new());
    for line in manifest.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name;
        } else if let Some((key, value)) = line.split_once('=')
            && key.trim() == KEY
        {
            let on = value.trim().starts_with("true");
            is_on |= on && section == PROFILE;
            if !on {
                faults.push(format!("Cargo.toml: [{section}] turns {KEY} off"));
            }
        }
    }
    if !is_on {
        faults.push(format!("Cargo.toml: [{PROFILE}] does not turn {KEY} on"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_profile_without_overflow_checks_is_a_fault() {
        let on = "[profile.release]\noverflow-checks = true\n";
        assert!(faults(on).is_empty());
        assert_eq!(faults("[profile.release]\nlto = true\n").len(), 1);
        assert_eq!(faults("[profile.dev]\noverflow-checks = true\n").len(), 1);
        let package = format!("{on}[profile.release.package.imago]\noverflow-checks = false\n");
        assert_eq!(faults(&package).len(), 1);
    }
}
