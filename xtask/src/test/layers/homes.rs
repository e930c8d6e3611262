//! Files that may contain `unsafe` and xenstore keys.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;

use super::Package;
use super::source::{self, UnitTests};
use crate::exec;

/// Files and directories that may contain `unsafe`.
pub const UNSAFE_HOMES: &[&str] = &[
    // Memory that a peer can write concurrently.
    "ring/src/shm.rs",
    "ring/src/shm/",
    // The same, for tests with a peer in another process.
    "ring/tests/support/shared_file.rs",
    // io_uring, and memory that the kernel uses.
    "runtime/src/buf.rs",
    "runtime/src/lists.rs",
    "runtime/src/ring.rs",
    "runtime/src/ring/",
    // ioctl, mmap.
    "platforms/",
    // The ioctls of a tap.
    "ports/src/tap/device.rs",
    // Packet memory and rings shared with the kernel, and bpf(2). No crate supports both; rustix
    // provides the rest.
    "ports/src/afxdp/sys.rs",
    // An example: a program without `std` defines its own entry point and memory.
    "frontends/examples/bare-metal/",
];

/// Directory whose files may contain xenstore keys.
const KEY_HOME: &str = "xenbus/src/handshake";

/// Packages that contain keys because they check them.
const CHECKERS: &[&str] = &["xtask", "pvio-lab-agent", "pvio-simulator"];

/// Literals of [`KEY_HOME`] that have the form of a key and are none: kinds of backends, and the
/// name of a script.
const NO_KEYS: &[&str] = &["block-pvio", "pvio-vbd", "pvio-vif"];

/// Keys that no record has, because pvio does not use them.
const UNUSED_KEYS: &[&str] = &["feature-large-sector-size", "physical-device"];

/// Returns every `unsafe` in other files, and every crate without `unsafe` that does not forbid it.
pub fn check_unsafe(packages: &[Package]) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for package in packages {
        let mut has_home = false;
        for file in source::files(&package.dir)? {
            let place = relative(&file);
            if UNSAFE_HOMES.iter().any(|home| place.starts_with(home)) {
                has_home |= file.starts_with(package.dir.join("src")) && package.name != "xtask";
                continue;
            }
            let tokens = source::tokens(&file, UnitTests::Keep)?;
            for token in tokens.iter().filter(|token| token.text == "unsafe") {
                faults.push(format!("{place}:{}: unsafe outside its homes", token.line));
            }
        }
        for root in package.roots.iter().filter(|_| !has_home) {
            let tokens = source::tokens(root, UnitTests::Keep)?;
            let pair = |a: &source::Token, b: &source::Token| {
                a.text == "forbid" && b.text == "unsafe_code"
            };
            if !tokens.windows(2).any(|two| pair(&two[0], &two[1])) {
                faults.push(format!("{}: no #![forbid(unsafe_code)]", relative(root)));
            }
        }
    }
    Ok(faults)
}

/// Returns every xenstore key in other files. Tests, benches and examples play both sides of a
/// device, so they may contain keys, and so may the packages that check.
pub fn check_keys(packages: &[Package]) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let keys = keys()?;
    for package in packages.iter().filter(|package| !CHECKERS.contains(&package.name.as_str())) {
        let src = package.dir.join("src");
        for file in source::files(&src)? {
            let place = relative(&file);
            if place.starts_with(KEY_HOME) || is_unit_test(&file) {
                continue;
            }
            for token in source::tokens(&file, UnitTests::Leave)? {
                if let Some(key) = token.literal.then(|| spelled(&keys, &token.text)).flatten() {
                    faults.push(format!("{place}:{}: spells the key {key}", token.line));
                }
            }
        }
    }
    Ok(faults)
}

/// Returns the keys in the tables of [`KEY_HOME`] (`io/blkif.h`, `io/netif.h`). Keys without a
/// hyphen (`state`, `mode`, `sectors`, `mac`) are not included, since they may occur in messages.
fn keys() -> Result<BTreeSet<String>> {
    let mut keys: BTreeSet<String> = UNUSED_KEYS.iter().map(ToString::to_string).collect();
    for file in source::files(&exec::root().join(KEY_HOME))? {
        let tokens = source::tokens(&file, UnitTests::Leave)?;
        keys.extend(tokens.iter().filter(|token| token.literal).filter_map(|t| key(&t.text)));
    }
    Ok(keys)
}

/// Returns the key that a string literal consists of, without a number at its end (`ring-ref%u`).
fn key(literal: &str) -> Option<String> {
    let text = literal.strip_prefix('"')?.strip_suffix('"')?;
    let text = text.strip_suffix("%u").unwrap_or(text);
    let is_key = text.split('-').all(|part| {
        let mut chars = part.chars().peekable();
        chars.peek().is_some()
            && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    });
    (is_key && text.contains('-') && !NO_KEYS.contains(&text)).then(|| text.to_owned())
}

/// Returns the key that a string literal contains as a separate word; a number may follow
/// (`ring-ref0`, `ring-ref{i}`).
fn spelled<'a>(keys: &'a BTreeSet<String>, literal: &str) -> Option<&'a str> {
    let words = literal.split(|c: char| !(c.is_ascii_alphanumeric() || "-_".contains(c)));
    let mut words = words.map(|word| word.trim_end_matches(|c: char| c.is_ascii_digit()));
    words.find_map(|word| {
        // The digit at the end of `feature-gso-tcpv4` is part of the key.
        let mut found = keys.iter().map(String::as_str);
        found.find(|key| key.trim_end_matches(|c: char| c.is_ascii_digit()) == word)
    })
}

/// Returns whether a file is `tests.rs` or below `tests/`: a module that is declared with
/// `#[cfg(test)]`.
fn is_unit_test(file: &Path) -> bool {
    file.ends_with("tests.rs") || file.components().any(|part| part.as_os_str() == "tests")
}

pub fn relative(file: &Path) -> String {
    file.strip_prefix(exec::root()).unwrap_or(file).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xenstore_key_is_found_in_paths_and_format_strings() {
        let keys = keys().unwrap();
        let spelled = |literal| spelled(&keys, literal);
        assert_eq!(spelled("\"ring-ref\""), Some("ring-ref"));
        assert_eq!(spelled("\"queue-0/ring-ref{i}\""), Some("ring-ref"));
        assert_eq!(spelled("\"ring-ref1\""), Some("ring-ref"));
        assert_eq!(spelled("b\"feature-gso-tcpv4\""), Some("feature-gso-tcpv4"));
    }

    #[test]
    fn text_without_xenstore_key_is_not_matched() {
        let keys = keys().unwrap();
        let spelled = |literal| spelled(&keys, literal);
        assert_eq!(spelled("\"the event-channel-less state\""), None);
        assert_eq!(spelled("\"event-closed\""), None);
        assert_eq!(spelled("\"state\""), None);
    }

    #[test]
    fn keys_come_from_the_tables() {
        assert_eq!(key("\"feature-sg\""), Some("feature-sg".into()));
        assert_eq!(key("\"ring-ref%u\""), Some("ring-ref".into()));
        assert_eq!(key("\"queue-%u\""), None);
        for other in ["\"state\"", "\"pvio-vbd\"", "\"a - b\"", "\"/a-b\"", "7"] {
            assert_eq!(key(other), None, "{other}");
        }
        let keys = keys().unwrap();
        for key in ["frontend-id", "multi-queue-max-queues", "x86_64-abi", "xdp-headroom"] {
            assert!(keys.contains(key), "{key}");
        }
    }
}
