//! Files that may contain `unsafe` and xenstore keys.

use std::path::Path;

use anyhow::Result;

use super::Package;
use super::source::{self, UnitTests};
use crate::exec;

/// Files and directories that may contain `unsafe`.
const UNSAFE_HOMES: &[&str] = &[
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
    "ports/src/tap.rs",
    // Packet memory and rings shared with the kernel, and bpf(2). No crate supports both; rustix
    // provides the rest.
    "ports/src/afxdp/sys.rs",
    // Not part of the product: a program without a runtime defines its own entry point.
    "xtask/nostd-probe/",
];

/// Directory whose files may contain xenstore keys.
const KEY_HOME: &str = "xenbus/src/handshake";

/// Packages that contain keys because they check them.
const CHECKERS: &[&str] = &["xtask", "pvio-lab-agent"];

/// Words that only occur as xenstore keys of devices (`io/blkif.h`, `io/netif.h`). Keys that are
/// also common words (`state`, `mode`, `sectors`, `mac`) are not included, since they may occur in
/// messages.
const KEYS: &[&str] = &[
    "backend-id",
    "ctrl-ring-ref",
    "discard-alignment",
    "discard-enable",
    "discard-granularity",
    "discard-secure",
    "event-channel",
    "event-channel-ctrl",
    "event-channel-rx",
    "event-channel-tx",
    "feature-barrier",
    "feature-ctrl-ring",
    "feature-discard",
    "feature-dynamic-multicast-control",
    "feature-flush-cache",
    "feature-gso-tcpv4",
    "feature-gso-tcpv4-prefix",
    "feature-gso-tcpv6",
    "feature-gso-tcpv6-prefix",
    "feature-ipv6-csum-offload",
    "feature-large-sector-size",
    "feature-max-indirect-segments",
    "feature-multicast-control",
    "feature-no-csum-offload",
    "feature-persistent",
    "feature-rx-copy",
    "feature-rx-flip",
    "feature-rx-notify",
    "feature-sg",
    "feature-split-event-channels",
    "feature-xdp-headroom",
    "frontend-id",
    "hotplug-status",
    "max-ring-page-order",
    "max-ring-pages",
    "multi-queue-max-queues",
    "multi-queue-num-queues",
    "num-ring-pages",
    "physical-device",
    "physical-sector-size",
    "request-multicast-control",
    "request-rx-copy",
    "ring-page-order",
    "ring-ref",
    "rx-ring-ref",
    "sector-size",
    "tx-ring-ref",
    "virtual-device",
    "x86_32-abi",
    "x86_64-abi",
    "xdp-headroom",
];

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
    for package in packages.iter().filter(|package| !CHECKERS.contains(&package.name.as_str())) {
        let src = package.dir.join("src");
        for file in source::files(&src)? {
            let place = relative(&file);
            if place.starts_with(KEY_HOME) || is_unit_test(&file) {
                continue;
            }
            for token in source::tokens(&file, UnitTests::Leave)? {
                if let Some(key) = token.literal.then(|| spelled(&token.text)).flatten() {
                    faults.push(format!("{place}:{}: spells the key {key}", token.line));
                }
            }
        }
    }
    Ok(faults)
}

/// Returns the key that a string literal contains as a separate word; a number may follow
/// (`ring-ref0`, `ring-ref{i}`).
fn spelled(literal: &str) -> Option<&'static str> {
    let words = literal.split(|c: char| !(c.is_ascii_alphanumeric() || "-_".contains(c)));
    let mut words = words.map(|word| word.trim_end_matches(|c: char| c.is_ascii_digit()));
    words.find_map(|word| {
        // The digit at the end of `feature-gso-tcpv4` is part of the key.
        KEYS.iter().copied().find(|key| key.trim_end_matches(|c: char| c.is_ascii_digit()) == word)
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
    fn a_key_is_found_in_paths_and_formats() {
        assert_eq!(spelled("\"ring-ref\""), Some("ring-ref"));
        assert_eq!(spelled("\"queue-0/ring-ref{i}\""), Some("ring-ref"));
        assert_eq!(spelled("\"ring-ref1\""), Some("ring-ref"));
        assert_eq!(spelled("b\"feature-gso-tcpv4\""), Some("feature-gso-tcpv4"));
    }

    #[test]
    fn other_words_are_not_keys() {
        assert_eq!(spelled("\"the event-channel-less state\""), None);
        assert_eq!(spelled("\"event-closed\""), None);
        assert_eq!(spelled("\"state\""), None);
    }
}
